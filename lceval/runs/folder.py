"""A run folder: locked while a run is open, written atomically, resumed under the same identity.

It contains run.json (identity and status), responses.sqlite (responses, written as they arrive) and, once finished,
lm-eval's results_*.json and samples_*.jsonl.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lceval.core.errors import InfrastructureError, UserError
from lceval.core.io import read_object, write_json
from lceval.core.safe_text import echo
from lceval.records import identity
from lceval.runs import foreign_code, inputs
from lceval.runs.configuration import configure

RUN = "run.json"
RUNNING, FINISHED = "running", "finished"
SPACE = 8 << 20
"""Bytes that must be free when a run starts; answers and results of a thousand long samples take about as much."""


@dataclass(frozen=True)
class RunOutcome:
    """A finished run: its folder, its number of samples, and how many of them an earlier start answered.

    contexts: number of contexts prefilled for this run, without those that another recipe had prefilled.
    """

    folder: Path
    samples: int
    reused: int
    contexts: int = 0


@dataclass(frozen=True)
class OpenRun:
    """A run whose folder this process has locked.

    Attributes:
        identity: everything that must not change between two starts.
        previous: run.json of an earlier start, None on the first.
        allow_code: task files from elsewhere may run code.
    """

    config: Any
    folder: Path
    identity: dict[str, Any]
    previous: dict[str, Any] | None
    allow_code: bool = False

    @property
    def finished(self) -> RunOutcome | None:
        """The outcome if an earlier start finished the run, else None."""
        if self.previous is None or self.previous["status"] != FINISHED:
            return None
        return RunOutcome(self.folder, self.previous["samples"], self.previous["samples"])


@contextmanager
def opened(argv: Sequence[str]) -> Iterator[OpenRun]:
    """The run that lm-eval's flags describe, with its folder created and locked.

    Raises:
        UserError: bad flags, or a folder that contains another run.
    """
    config = configure(argv)
    if os.environ.get("LCEVAL_JUDGE"):
        from lceval.judge import during_run

        during_run.ready()
    folder = Path(config.output_path)
    with _locked(folder):
        _remove_partial(folder)
        current = identity.of(config, inputs.digests(config))
        previous = _read(folder)
        if previous is None and any(not f.name.startswith(".") for f in folder.iterdir()):
            raise UserError(f"{folder} contains files but no {RUN}: choose another --output_path")
        if previous is not None and (changed := identity.differences(previous["identity"], current)):
            raise UserError(f"{folder} contains another run ({'; '.join(changed)}): choose another --output_path")
        if previous is None or previous["status"] != FINISHED:
            _require_space(folder)
        yield OpenRun(config, folder, current, previous, allow_code=not {*foreign_code.FLAGS}.isdisjoint(argv))


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
    write_json(open_run.folder / RUN, record)
    return record


def finish(open_run: OpenRun, lm: Any, results: dict[str, Any], samples: int, wall_s: float) -> None:
    """Write lm-eval's results and samples, and run.json as finished; `wall_s` is added to that of earlier starts."""
    config, folder = open_run.config, open_run.folder
    results["config"] |= {"model": config.model, "model_args": config.model_args}
    _save(config, folder, lm, results)
    record = begin(open_run)
    record |= {
        "status": FINISHED,
        "samples": samples,
        "task_versions": results["versions"],
        "sources": _sources(results["samples"]),
        **({"judge": {k: judge[k] for k in ("judge", "revision")}} if (judge := results.get("judge")) else {}),
        "chat_template_sha": results["chat_template_sha"],
        "expanded": results["config"].get("lcft", {}).get("expanded"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_s": record["wall_s"] + wall_s,
    }
    write_json(folder / RUN, record)


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
        # An earlier finish may have been killed here, and its files sort later if the clock went back since.
        for file in [*folder.glob("results_*.json"), *folder.glob("samples_*.jsonl")]:
            file.unlink()
        for file in sorted(written, key=lambda file: file.name.startswith("results_")):
            os.replace(file, folder / file.name)


def _sources(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """The sources of each task's rows, from their field `source`."""
    return {
        task: sorted({str(s["doc"]["source"]) for s in rows if isinstance(s["doc"], dict) and "source" in s["doc"]})
        for task, rows in samples.items()
    }


def _read(folder: Path) -> dict[str, Any] | None:
    file = folder / RUN
    if not file.is_file():
        return None
    advice = "choose another --output_path"
    record = read_object(file, advice)
    expected = {"status": str, "identity": dict, **({"samples": int} if record.get("status") == FINISHED else {})}
    if wrong := [key for key, kind in expected.items() if not isinstance(record.get(key), kind)]:
        raise UserError(f"{file}: damaged or of another program ({wrong[0]}={record.get(wrong[0])!r:.60}): {advice}")
    return record


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process; create it if missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write into the run folder {folder}: {error.strerror}: choose another --output_path"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running in {folder}: wait for it, or choose another folder") from None
        yield


def _remove_partial(folder: Path) -> None:
    """Remove what a start that was killed was writing; nobody else writes here, because the folder is locked."""
    for file in folder.glob(".*.part"):
        file.unlink()
    for saving in folder.glob(".saving-*"):
        shutil.rmtree(saving, ignore_errors=True)


def _require_space(folder: Path) -> None:
    """Fail before the model is loaded if the disk cannot take the results."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, SPACE)
    except OSError as error:
        raise InfrastructureError(
            f"{folder}: the disk cannot take {SPACE >> 20} MiB ({error.strerror}): free space and run again"
        ) from None


def report(outcome: RunOutcome) -> None:
    """Print the run folder and the number of reused samples to stderr."""
    fresh = outcome.samples - outcome.reused
    echo(f"{outcome.folder}: {outcome.samples} samples, {outcome.reused} reused, {fresh} run", err=True)
