"""`lceval run`: lm-eval's `run` with a run folder that can be resumed.

The folder contains run.json (identity and status), responses.sqlite (responses, written as they arrive) and, once
finished, lm-eval's results_*.json and samples_*.jsonl.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from lceval import identity
from lceval.errors import InfrastructureError, UserError
from lceval.responses import Responses

RUN = "run.json"
RUNNING, FINISHED = "running", "finished"


@dataclass(frozen=True)
class Outcome:
    """A finished run: its folder, its number of samples, and how many of them an earlier start answered."""

    folder: Path
    samples: int
    reused: int


@dataclass(frozen=True)
class OpenRun:
    """A run whose folder this process has locked.

    Attributes:
        identity: everything that must not change between two starts.
        previous: run.json of an earlier start, None on the first.
    """

    config: Any
    folder: Path
    identity: dict[str, Any]
    previous: dict[str, Any] | None

    @property
    def finished(self) -> Outcome | None:
        """The outcome if an earlier start finished the run, else None."""
        if self.previous is None or self.previous["status"] != FINISHED:
            return None
        return Outcome(self.folder, self.previous["samples"], self.previous["samples"])


def run(argv: Sequence[str]) -> Outcome:
    """Run or resume the evaluation that lm-eval's `run` flags describe.

    Raises:
        UserError: bad flags, or a folder that contains another run.
        InfrastructureError: lm-eval did not write its results.
    """
    with opened(argv) as open_run:
        return open_run.finished or evaluate(open_run, load_model)


@contextmanager
def opened(argv: Sequence[str]) -> Iterator[OpenRun]:
    """The run that lm-eval's flags describe, with its folder created and locked.

    Raises:
        UserError: bad flags, or a folder that contains another run.
    """
    config = _configure(argv)
    if os.environ.get("LCEVAL_JUDGE"):
        from lceval.judge import inrun

        inrun.ready()
    from lceval.models import packaged

    folders = {k: packaged.resolve(str(config.model_args[k])) for k in ("pretrained", "peft") if k in config.model_args}
    folder = Path(config.output_path)
    current = identity.of(config, folders)
    with _locked(folder):
        previous = _read(folder)
        if previous is None and any(f.name != ".lock" for f in folder.iterdir()):
            raise UserError(f"{folder} contains files but no {RUN}: choose another --output_path")
        if previous is not None and (changed := identity.differences(previous["identity"], current)):
            raise UserError(f"{folder} contains another run ({'; '.join(changed)}): choose another --output_path")
        yield OpenRun(config, folder, current, previous)


def _configure(argv: Sequence[str]) -> Any:
    """lm-eval's configuration from its flags, with lceval's defaults and checks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lm_eval.models  # noqa: F401  # fills the registry
    from lm_eval._cli.run import Run
    from lm_eval.api.registry import model_registry
    from lm_eval.config.evaluate_config import EvaluatorConfig

    parser = argparse.ArgumentParser(prog="lceval")
    Run(parser.add_subparsers())
    arguments = parser.parse_args(["run", *argv])
    template = getattr(arguments, "apply_chat_template", None)
    if template in ("false", "none"):
        del arguments.apply_chat_template
    arguments.log_samples = True
    if not arguments.output_path:
        raise UserError("--output_path is required: the run folder, e.g. --output_path runs/NAME")
    if arguments.use_cache:
        raise UserError("--use_cache is not supported: the run folder already stores every response")
    if not arguments.tasks and not arguments.config:
        raise UserError("--tasks is required: NAME[,NAME...]; `lceval tasks` and `lm_eval ls tasks` list the names")
    try:
        config = EvaluatorConfig.from_cli(arguments)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    if config.model not in model_registry:
        raise UserError(f"unknown model {config.model!r}; {_nearest(config.model, list(model_registry))}")
    if config.model == "lcft":
        from lceval.models import recipe

        config.model_args["kv"] = str(recipe.parse(str(config.model_args.get("kv", recipe.FULL))))
        if "pretrained" not in config.model_args:
            raise UserError("pretrained is required: --model_args pretrained=NAME (smollm2-135m is the packaged model)")
    if template is None and _has_template(config.model_args):
        config.apply_chat_template = True
        config.fewshot_as_multiturn = True
    return config


def _has_template(model_args: dict[str, Any]) -> bool:
    """Whether the tokenizer in the model arguments has a chat template."""
    from transformers import AutoTokenizer

    from lceval.models import packaged

    name = model_args.get("tokenizer") or model_args.get("pretrained")
    if not name:
        return False
    try:
        tokenizer = AutoTokenizer.from_pretrained(packaged.resolve(str(name)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the tokenizer of {name!r}: {reason}") from None
    return tokenizer.chat_template is not None


def tasks_of(config: Any) -> tuple[Any, dict[str, Any]]:
    """lm-eval's task manager and the loaded tasks; loaded before any model, so that missing data is reported first."""
    manager = _task_manager(config)
    return manager, manager.load(config.tasks)


def begin(open_run: OpenRun) -> dict[str, Any]:
    """Write run.json of a run that starts or resumes, and return it. A second call changes nothing."""
    config, current = open_run.config, open_run.identity
    record = _read(open_run.folder) or {
        "status": RUNNING,
        "model": config.model,
        "model_args": config.model_args,
        "recipe": config.model_args.get("kv", "-"),
        "tasks": config.tasks,
        "apply_chat_template": config.apply_chat_template,
        "versions": current["versions"],
        "identity": current,
        "fingerprint": identity.fingerprint(current),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": identity.machine(),
        "wall_s": 0.0,
    }
    _write(open_run.folder, record)
    return record


def load_model(config: Any) -> Any:
    """Load the model of a configuration."""
    from lm_eval.api.registry import get_model

    sizes = {
        "batch_size": config.batch_size,
        "max_batch_size": config.max_batch_size,
        "device": config.device,
    }
    return get_model(config.model).create_from_arg_obj(dict(config.model_args), sizes)


def evaluate(open_run: OpenRun, load: Callable[[Any], Any], *, spent_s: float = 0.0) -> Outcome:
    """Answer the remaining requests, score all of them, and finish the run folder.

    Args:
        load: returns the model of a configuration.
        spent_s: seconds spent on this run before this call; `wall_s` includes them.
    """
    from lm_eval import simple_evaluate

    config, folder = open_run.config, open_run.folder
    manager, loaded = tasks_of(config)
    tasks = [loaded.get("groups", {}).get(name) or loaded["tasks"].get(name, name) for name in config.tasks]
    started = time.monotonic()
    record = begin(open_run)
    lm = load(config)
    store = Responses(folder / "responses.sqlite")
    _collect_environment_once()
    seeds = dict(zip(_SEEDS, config.seed, strict=True)) if config.seed else {}
    # Closed also on failure: a sweep reuses the model, which must not answer other cells from this folder.
    with closing(store):
        store.attach(lm)
        results = simple_evaluate(
            model=lm,
            tasks=tasks,
            num_fewshot=config.num_fewshot,
            batch_size=config.batch_size,
            device=config.device,
            limit=config.limit,
            samples=config.samples,
            write_out=config.write_out,
            log_samples=True,
            system_instruction=config.system_instruction,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            gen_kwargs=config.gen_kwargs,
            task_manager=manager,
            predict_only=config.predict_only,
            confirm_run_unsafe_code=config.confirm_run_unsafe_code,
            metadata=config.metadata,
            **seeds,
        )
    outcome = Outcome(folder, len(store.requested), len(store.reused))
    if results is None:  # not the main process of a distributed run
        return outcome
    results["config"] |= {"model": config.model, "model_args": config.model_args}
    _save(config, folder, lm, results)
    record |= {
        "status": FINISHED,
        "samples": outcome.samples,
        "task_versions": results["versions"],
        "sources": _sources(results["samples"]),
        **({"judge": {k: judge[k] for k in ("judge", "revision")}} if (judge := results.get("judge")) else {}),
        "chat_template_sha": results["chat_template_sha"],
        "expanded": results["config"].get("lcft", {}).get("expanded"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_s": record["wall_s"] + spent_s + time.monotonic() - started,
    }
    _write(folder, record)
    return outcome


def _collect_environment_once() -> None:
    """Let lm_eval reuse its description of the environment: it calls `pip list` in every run, which takes seconds."""
    from torch.utils import collect_env

    if not hasattr(collect_env.get_pretty_env_info, "cache_info"):
        collect_env.get_pretty_env_info = cache(collect_env.get_pretty_env_info)


_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def own_tasks(metadata: dict[str, Any] | None) -> Any:
    """lm-eval's task manager with lceval's tasks only: indexing lm-eval's own tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    folder = str(Path(__file__).parent / "tasks")
    return TaskManager(include_path=folder, include_defaults=False, metadata=metadata)


def _task_manager(config: Any) -> Any:
    """lm-eval's task manager, with the names in `config.tasks` resolved."""
    from lm_eval.tasks import TaskManager

    names = [name for text in config.tasks for name in text.split(",")]
    own = own_tasks(config.metadata)
    if not config.include_path and all(own.match_tasks([name]) for name in names):
        config.tasks = own.match_tasks(names)
        return own
    try:
        return config.process_tasks(config.metadata)
    except ValueError as error:
        known = TaskManager(include_path=config.include_path).all_tasks
        unknown = str(error).partition(": ")[2].split(", ")
        raise UserError("; ".join(f"unknown task {name!r}; {_nearest(name, known)}" for name in unknown)) from None


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    return (
        f"did you mean {' or '.join(near)}?"
        if near
        else "see `lceval tasks`, `lm_eval ls tasks` and `lceval run --help`"
    )


def _save(config: Any, folder: Path, lm: Any, results: dict[str, Any]) -> None:
    """Write lm-eval's files to a temporary folder and move them into the run folder only if all were written."""
    from lm_eval.loggers import EvaluationTracker

    # lm-eval suppresses errors while saving, so the files themselves are counted.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as partial:
        tracker = EvaluationTracker(output_path=partial)
        tracker.general_config_tracker.log_experiment_args(
            model_source=config.model,
            model_args=config.model_args,
            system_instruction=config.system_instruction,
            chat_template=lm.chat_template(config.apply_chat_template) if config.apply_chat_template else None,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        results["samples"] = samples
        written = [file for file in Path(partial).rglob("*") if file.is_file()]
        if len(written) != 1 + len(results["configs"]):
            raise InfrastructureError(f"lm-eval did not write its results into {folder}: is the disk full?")
        for file in written:
            os.replace(file, folder / file.name)


def _sources(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """The sources of each task's rows, from their field `source`."""
    return {
        task: sorted({str(s["doc"]["source"]) for s in rows if isinstance(s["doc"], dict) and "source" in s["doc"]})
        for task, rows in samples.items()
    }


def _read(folder: Path) -> dict[str, Any] | None:
    file = folder / RUN
    return json.loads(file.read_text()) if file.is_file() else None


def _write(folder: Path, record: dict[str, Any]) -> None:
    partial = folder / f".{RUN}"
    partial.write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
    os.replace(partial, folder / RUN)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process; create it if missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the run folder {folder}: {error.strerror}") from None
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running in {folder}: wait for it, or choose another folder") from None
        yield


def report(outcome: Outcome) -> None:
    """Print the run folder and the number of reused samples to stderr."""
    fresh = outcome.samples - outcome.reused
    print(f"{outcome.folder}: {outcome.samples} samples, {outcome.reused} reused, {fresh} run", file=sys.stderr)
