"""`lceval run`: lm-eval's own `run`, into a run folder that can be resumed.

The folder holds run.json (identity and status), responses.sqlite (every response as it came), and, once finished,
lm-eval's results_*.json and samples_*.jsonl.
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
from pathlib import Path
from typing import Any

from lceval import identity
from lceval.errors import InfrastructureError, UserError
from lceval.responses import Responses

RUN = "run.json"
RUNNING, FINISHED = "running", "finished"


@dataclass(frozen=True)
class Outcome:
    """A finished run: its folder, how many samples it has, and how many of them came from an earlier start."""

    folder: Path
    samples: int
    reused: int


@dataclass(frozen=True)
class Opened:
    """A run whose folder is this process's alone, as it was found.

    identity: what must not change between two starts. previous: run.json of an earlier start, None on the first.
    """

    config: Any
    folder: Path
    identity: dict[str, Any]
    previous: dict[str, Any] | None

    @property
    def finished(self) -> Outcome | None:
        """The outcome of a run that an earlier start finished."""
        if self.previous is None or self.previous["status"] != FINISHED:
            return None
        return Outcome(self.folder, self.previous["samples"], self.previous["samples"])


def run(argv: Sequence[str]) -> Outcome:
    """Run an evaluation given as lm-eval's `run` flags, or resume it.

    Raises:
        UserError: bad flags, or a folder that holds another run.
        InfrastructureError: lm-eval did not write its results.
    """
    with opened(argv) as found:
        return found.finished or evaluate(found, load_model)


@contextmanager
def opened(argv: Sequence[str]) -> Iterator[Opened]:
    """The run that lm-eval's flags describe, its folder made and locked.

    Raises:
        UserError: bad flags, or a folder that holds another run.
    """
    config = _configure(argv)
    if os.environ.get("LCEVAL_JUDGE"):
        from lceval.judge import inrun

        inrun.ready()
    from lceval.models import packaged

    folders = {k: packaged.resolve(str(config.model_args[k])) for k in ("pretrained", "peft") if k in config.model_args}
    folder = Path(config.output_path)
    ours = identity.of(config, folders)
    with _locked(folder):
        previous = _read(folder)
        if previous is None and any(f.name != ".lock" for f in folder.iterdir()):
            raise UserError(f"{folder} holds files but no {RUN}: choose another --output_path")
        if previous is not None and (changed := identity.differences(previous["identity"], ours)):
            raise UserError(f"{folder} holds another run ({'; '.join(changed)}): choose another --output_path")
        yield Opened(config, folder, ours, previous)


def _configure(argv: Sequence[str]) -> Any:
    """lm-eval's configuration from its own flags, with our defaults and checks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lm_eval.models  # noqa: F401  # fills the registry
    from lm_eval._cli.run import Run
    from lm_eval.api.registry import model_registry
    from lm_eval.config.evaluate_config import EvaluatorConfig

    parser = argparse.ArgumentParser(prog="lceval")
    Run(parser.add_subparsers())
    given = parser.parse_args(["run", *argv])
    template = getattr(given, "apply_chat_template", None)
    if template in ("false", "none"):
        del given.apply_chat_template
    given.log_samples = True
    if not given.output_path:
        raise UserError("say where the run folder goes: --output_path runs/NAME")
    if given.use_cache:
        raise UserError("leave --use_cache out: the run folder keeps every response and resumes by itself")
    if not given.tasks and not given.config:
        raise UserError("say what to evaluate: --tasks NAME[,NAME…]; `lm_eval ls tasks` lists them")
    try:
        config = EvaluatorConfig.from_cli(given)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    if config.model not in model_registry:
        raise UserError(f"unknown model {config.model!r}; {_nearest(config.model, list(model_registry))}")
    if config.model == "lcft":
        from lceval.models import recipe

        config.model_args["kv"] = str(recipe.parse(str(config.model_args.get("kv", recipe.FULL))))
        if "pretrained" not in config.model_args:
            raise UserError("say which model: --model_args pretrained=NAME (smollm2-135m is the packaged one)")
    if template is None and _has_template(config.model_args):
        config.apply_chat_template = True
        config.fewshot_as_multiturn = True
    return config


def _has_template(model_args: dict[str, Any]) -> bool:
    """Whether the tokenizer that the model arguments name has a chat template."""
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
    """lm-eval's task manager, and what it loaded: rows are built before any model, so that missing data shows first."""
    manager = _task_manager(config)
    return manager, manager.load(config.tasks)


def begin(found: Opened) -> dict[str, Any]:
    """Write run.json of a run that starts or goes on; returns it. A second call changes nothing."""
    config, ours = found.config, found.identity
    record = _read(found.folder) or {
        "status": RUNNING,
        "model": config.model,
        "model_args": config.model_args,
        "recipe": config.model_args.get("kv", "-"),
        "tasks": config.tasks,
        "apply_chat_template": config.apply_chat_template,
        "versions": ours["versions"],
        "identity": ours,
        "fingerprint": identity.fingerprint(ours),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": identity.machine(),
        "wall_s": 0.0,
    }
    _write(found.folder, record)
    return record


def load_model(config: Any) -> Any:
    """The model that a configuration names."""
    from lm_eval.api.registry import get_model

    sizes = {
        "batch_size": config.batch_size,
        "max_batch_size": config.max_batch_size,
        "device": config.device,
    }
    return get_model(config.model).create_from_arg_obj(dict(config.model_args), sizes)


def evaluate(found: Opened, load: Callable[[Any], Any], *, spent_s: float = 0.0) -> Outcome:
    """Answer what is not answered yet, score, and finish the run folder.

    Args:
        load: gives the model of a configuration.
        spent_s: seconds that answering has taken before, which `wall_s` includes.
    """
    from lm_eval import simple_evaluate

    config, folder = found.config, found.folder
    manager, loaded = tasks_of(config)
    tasks = [loaded.get("groups", {}).get(name) or loaded["tasks"].get(name, name) for name in config.tasks]
    started = time.monotonic()
    record = begin(found)
    lm = load(config)
    store = Responses(folder / "responses.sqlite")
    seeds = dict(zip(_SEEDS, config.seed, strict=True)) if config.seed else {}
    # Closed also where this fails: a model that goes on elsewhere must not answer from this folder.
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


_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def own_tasks(metadata: dict[str, Any] | None) -> Any:
    """lm-eval's task manager of our tasks alone: indexing lm-eval's own takes seconds."""
    from lm_eval.tasks import TaskManager

    folder = str(Path(__file__).parent / "tasks")
    return TaskManager(include_path=folder, include_defaults=False, metadata=metadata)


def _task_manager(config: Any) -> Any:
    """lm-eval's task manager, with the names in `config.tasks` resolved."""
    from lm_eval.tasks import TaskManager

    asked = [name for text in config.tasks for name in text.split(",")]
    ours = own_tasks(config.metadata)
    if not config.include_path and all(ours.match_tasks([name]) for name in asked):
        config.tasks = ours.match_tasks(asked)
        return ours
    try:
        return config.process_tasks(config.metadata)
    except ValueError as error:
        known = TaskManager(include_path=config.include_path).all_tasks
        unknown = str(error).partition(": ")[2].split(", ")
        raise UserError("; ".join(f"unknown task {name!r}; {_nearest(name, known)}" for name in unknown)) from None


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "see `lm_eval ls tasks` and `lm_eval run --help`"


def _save(config: Any, folder: Path, lm: Any, results: dict[str, Any]) -> None:
    """Let lm-eval write its files, then move them into the run folder: all of them or none."""
    from lm_eval.loggers import EvaluationTracker

    # lm-eval swallows errors while saving, so the files themselves are looked for.
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
    """Per task, where its rows came from, as the rows say."""
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
    """The folder, made if need be, for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error.strerror}") from None
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running in {folder}: wait for it, or choose another folder") from None
        yield


def report(outcome: Outcome) -> None:
    """Say on stderr where the run is and what it reused."""
    fresh = outcome.samples - outcome.reused
    print(f"{outcome.folder}: {outcome.samples} samples, {outcome.reused} reused, {fresh} run", file=sys.stderr)
