"""In-run judging: with LCEVAL_JUDGE set, lm-eval's `simple_evaluate` also returns judge metrics.

Judging follows generation and scoring instead of being a task filter: a filter would have to encode verdicts as
strings, make the tasks depend on the environment, and keep the evaluated model in memory. Here verdicts are only added
to complete results. `lceval run`, sweeps and plain `lm_eval` all use this function.

A local judge runs in a separate process, apart from the evaluated model. If a judge fails, samples are unjudged and the
run still succeeds; `lceval judge RUN` retries them.
"""

from __future__ import annotations

import gc
import inspect
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lceval.core.credentials import without_secrets
from lceval.core.errors import LcevalError, UserError
from lceval.core.io import write_text
from lceval.core.safe_text import echo
from lceval.judge import backends, rubrics, scores
from lceval.judge.backends import VARIABLE
from lceval.judge.backends.hf import loaded
from lceval.judge.client import Limits, Spent, Verdict
from lceval.judge.connect import connect
from lceval.judge.rubrics import Case

LIMITS = Limits()
_WORSE_WHEN_HIGH = ("judge_incorrect", "judge_refusal")

Batch = Sequence[tuple[str, Sequence[Case]]]  # (rubric, cases) of each task


def ready() -> str | None:
    """The validated judge of LCEVAL_JUDGE, before any model is loaded; None if unset.

    Raises:
        UserError: the name is invalid, or a requirement of the judge is missing.
    """
    spec = os.environ.get(VARIABLE, "").strip()
    if not spec:
        return None
    try:
        parsed = backends.parse(spec)
        if parsed.kind == "hf":
            from transformers import AutoConfig

            loaded(AutoConfig, parsed)
        else:
            backends.make(spec, timeout=LIMITS.timeout).close()
    except UserError as error:
        raise UserError(f"{VARIABLE}: {error}") from None
    return spec


def evaluate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`simple_evaluate` with verdicts if LCEVAL_JUDGE is set; else unchanged.

    Under plain lm_eval, which prints tracebacks, an invalid judge is printed in one line and exits.
    """
    try:
        spec = ready()
    except UserError as error:
        if Path(sys.argv[0]).stem in ("lm_eval", "lm-eval", "__main__"):
            echo(f"lceval: error: {error}", err=True)
            raise SystemExit(error.exit_code) from None
        raise
    if spec is None:
        return original(*args, **kwargs)
    call = inspect.signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    log_samples, call.arguments["log_samples"] = call.arguments["log_samples"], True
    results = original(*call.args, **call.kwargs)
    if results is None or call.arguments.get("predict_only"):
        return results
    add(results, spec)
    if not log_samples:
        del results["samples"]
    return results


def add(results: dict[str, Any], spec: str) -> None:
    """Judge the samples of lm-eval's results and add verdicts, means and the judge (`results["judge"]`)."""
    logged = results["samples"]
    rubric_names = {task: name for task in logged if (name := scores.rubric_of(task)) and logged[task]}
    if not rubric_names:
        return
    # Under the first filter.
    rows = {task: [row for row in logged[task] if row["filter"] == logged[task][0]["filter"]] for task in rubric_names}
    task_samples = {task: [scores.sample_of(row, name) for row in rows[task]] for task, name in rubric_names.items()}
    batch = [(rubric_names[task], scores.cases(samples)) for task, samples in task_samples.items()]
    gc.collect()  # frees the evaluated model, which plain lm_eval no longer references
    try:
        report, verdicts = _in_subprocess(batch, spec) if backends.parse(spec).kind == "hf" else ask(batch, spec)
    except LcevalError as error:
        echo(f"lceval: unjudged: {error}", err=True)
        report, verdicts = _failed(spec), [[Verdict(None, f"failed: {error}", "", "", 0)] * len(c) for _, c in batch]
    for (task, samples), task_verdicts in zip(task_samples.items(), verdicts, strict=True):
        rubric = rubrics.load(rubric_names[task])
        lines, summary = scores.judged(samples, task_verdicts, rubric, report["judge"], report["revision"])
        names = list(summary["scores"])
        for row, line in zip(rows[task], lines, strict=True):
            row |= {**{name: line.get(name) for name in names}, "verdict": line}
            row["metrics"] = [*row["metrics"], *names]
        report["tasks"][task] = summary
        _add_means(results, task, rows[task], summary)
    results["judge"] = report


def _add_means(results: dict[str, Any], task: str, rows: Sequence[Mapping[str, Any]], summary: dict[str, Any]) -> None:
    """Add the means to lm-eval's results, in its naming scheme."""
    means, filter_name = results["results"][task], rows[0]["filter"]
    for name, mean in summary["scores"].items():
        values = [row[name] for row in rows if row[name] is not None]
        means[f"{name},{filter_name}"] = mean
        means[f"{name}_stderr,{filter_name}"] = (
            statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else "N/A"
        )
    means[f"unjudged,{filter_name}"] = summary["unjudged"]
    better = results.setdefault("higher_is_better", {}).setdefault(task, {})
    better |= {**{name: name not in _WORSE_WHEN_HIGH for name in summary["scores"]}, "unjudged": False}


def _failed(spec: str) -> dict[str, Any]:
    """The report of a judge that failed."""
    parsed = backends.parse(spec)
    judge = {"judge": str(parsed), "label": str(parsed), "revision": parsed.revision}
    return {**judge, "rule_based": parsed.kind == "rule", "tasks": {}, **vars(Spent())}


def ask(batch: Batch, spec: str) -> tuple[dict[str, Any], list[list[Verdict]]]:
    """A report without tasks, and the verdicts of every task; replies are stored in the cache of `lceval judge`."""
    with connect(spec, "judging", LIMITS, wait=True) as client:
        verdicts = [client.judge_all(rubrics.load(name), cases) for name, cases in batch]
        return client.report({"tasks": {}}), verdicts


def _in_subprocess(batch: Batch, spec: str) -> tuple[dict[str, Any], list[list[Verdict]]]:
    """`ask` in a separate process."""
    with tempfile.TemporaryDirectory(prefix="lceval-judge-") as folder:
        inputs, outputs = Path(folder) / "cases.json", Path(folder) / "verdicts.json"
        inputs.write_text(json.dumps([spec, [(name, [asdict(case) for case in cases]) for name, cases in batch]]))
        command = [sys.executable, "-m", "lceval.judge.during_run", str(inputs), str(outputs)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if not outputs.is_file():
            last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise LcevalError(f"the judge {spec} failed: {without_secrets(last)}")
        report, verdicts = json.loads(outputs.read_text())
    return report, [[Verdict(**verdict) for verdict in of_task] for of_task in verdicts]


def _main(inputs: Path, outputs: Path) -> None:
    spec, tasks = json.loads(inputs.read_text())
    report, verdicts = ask([(name, [_case(fields) for fields in cases]) for name, cases in tasks], spec)
    write_text(outputs, json.dumps([report, [[asdict(verdict) for verdict in of_task] for of_task in verdicts]]))


def _case(fields: Mapping[str, Any]) -> Case:
    arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    return Case(**arguments)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
