"""Judging in the run: with LCEVAL_JUDGE set, lm-eval's `simple_evaluate` gives judged metrics beside its own.

It happens after all answers are there and scored, not in a filter of the tasks: a filter would have to smuggle verdicts
through strings, make the tasks differ by the environment, and hold the evaluated model while a judge is asked. Here the
samples and the results are complete and only gain; `lceval run`, sweeps and plain `lm_eval` all pass through.

A local judge is a process of its own, so that it never shares one with the evaluated model. A judge that fails leaves
samples unjudged: the answers are worth more than the verdicts, and `lceval judge RUN` asks again.
"""

from __future__ import annotations

import functools
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

from lceval.errors import LcevalError, UserError
from lceval.judge import judges, rubrics, samples
from lceval.judge.afterwards import report_of
from lceval.judge.asking import TIMEOUT_S, asking
from lceval.judge.client import Limits, Spent, Verdict
from lceval.judge.judges import VARIABLE
from lceval.judge.rubrics import Case

LIMITS = Limits()
_WORSE_WHEN_HIGH = ("judge_incorrect", "judge_refusal")

Asked = Sequence[tuple[str, Sequence[Case]]]  # rubric and cases, a task each


def ready() -> str | None:
    """The judge that LCEVAL_JUDGE names, found fit to be asked before anything is loaded; None where it is unset.

    Raises:
        UserError: it names none, or what it needs is not there.
    """
    spec = os.environ.get(VARIABLE, "").strip()
    if not spec:
        return None
    try:
        asked = judges.parse(spec)
        if asked.kind == "hf":
            _configured(asked)
        else:
            judges.make(spec, timeout=TIMEOUT_S).close()
    except UserError as error:
        raise UserError(f"{VARIABLE}: {error}") from None
    return spec


def _configured(asked: judges.Spec) -> None:
    from transformers import AutoConfig

    from lceval.models import packaged

    try:
        AutoConfig.from_pretrained(
            packaged.resolve(asked.model), **({"revision": asked.revision} if asked.revision else {})
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the judge {asked.model!r}: {reason}") from None


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    """`simple_evaluate` with verdicts, where LCEVAL_JUDGE asks for them; else as it is."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def simple_evaluate(*args: Any, **kwargs: Any) -> Any:
        spec = _ready_or_exit()
        if spec is None:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        wanted, given.arguments["log_samples"] = given.arguments["log_samples"], True
        results = original(*given.args, **given.kwargs)
        if results is None or given.arguments.get("predict_only"):
            return results
        add(results, spec)
        if not wanted:
            del results["samples"]
        return results

    return simple_evaluate


def _ready_or_exit() -> str | None:
    """Plain lm_eval prints tracebacks: there the one line ends the process."""
    try:
        return ready()
    except UserError as error:
        if Path(sys.argv[0]).stem in ("lm_eval", "lm-eval", "__main__"):
            print(f"lceval: error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        raise


def add(results: dict[str, Any], spec: str) -> None:
    """Judge the samples of lm-eval's results, and write verdicts and means into them; `results["judge"]` says whose."""
    named = {
        task: name for task in results["samples"] if (name := samples.rubric_of(task)) and results["samples"][task]
    }
    if not named:
        return
    rows = {task: _first_filter(results["samples"][task]) for task in named}
    shown = {task: [samples.sample_of(row, name) for row in rows[task]] for task, name in named.items()}
    asked = [(named[task], [s.case for s in found if not s.failed]) for task, found in shown.items()]
    gc.collect()  # plain lm_eval has let the model go
    try:
        report, verdicts = _apart(asked, spec) if judges.parse(spec).kind == "hf" else ask(asked, spec)
    except LcevalError as error:
        print(f"lceval: unjudged: {error}", file=sys.stderr)
        report, verdicts = _nobody(spec), [[Verdict(None, f"failed: {error}", "", "", 0)] * len(c) for _, c in asked]
    for (task, found), given in zip(shown.items(), verdicts, strict=True):
        rubric = rubrics.load(named[task])
        scored = samples.score(found, given, rubric)
        lines = [samples.line(one, report["judge"], report["revision"], rubric) for one in scored]
        names = list(dict.fromkeys(name for _, scores, _ in scored for name in scores or ()))
        for row, line in zip(rows[task], lines, strict=True):
            row |= {**{name: line.get(name) for name in names}, "verdict": line}
            row["metrics"] = [*row["metrics"], *names]
        report["tasks"][task] = {"rubric": rubric.key, **samples.summary(scored)}
        _tell(results, task, str(rows[task][0]["filter"]), names, lines)
    results["judge"] = report


def _first_filter(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["filter"] == rows[0]["filter"]]


def _tell(
    results: dict[str, Any], task: str, of: str, names: Sequence[str], lines: Sequence[Mapping[str, Any]]
) -> None:
    """The means beside lm-eval's own, under its names for them."""
    told = results["results"][task]
    for name in names:
        values = [line[name] for line in lines if line.get(name) is not None]
        several = len(values) > 1
        told[f"{name},{of}"] = math.fsum(values) / len(values)
        told[f"{name}_stderr,{of}"] = statistics.stdev(values) / math.sqrt(len(values)) if several else "N/A"
    told[f"unjudged,{of}"] = sum(line["status"] == "unjudged" for line in lines)
    better = results.setdefault("higher_is_better", {}).setdefault(task, {})
    better |= {**{name: name not in _WORSE_WHEN_HIGH for name in names}, "unjudged": False}


def _nobody(spec: str) -> dict[str, Any]:
    asked = judges.parse(spec)
    who = {"judge": str(asked), "label": str(asked), "revision": asked.revision, "rule_based": asked.kind == "rule"}
    return {**who, "tasks": {}, **vars(Spent())}


def ask(asked: Asked, spec: str) -> tuple[dict[str, Any], list[list[Verdict]]]:
    """The verdicts of every task, and a report without tasks; replies are filed where `lceval judge` finds them."""
    with asking(spec, "judging", limits=LIMITS, wait=True) as (judge, client):
        found = [client.judge_all(rubrics.load(name), cases) for name, cases in asked]
        return report_of(judge, client.spent, {}), found


def _apart(asked: Asked, spec: str) -> tuple[dict[str, Any], list[list[Verdict]]]:
    """`ask` in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="lceval-judge-") as folder:
        cases, said = Path(folder) / "cases.json", Path(folder) / "verdicts.json"
        cases.write_text(json.dumps([spec, [(name, [asdict(case) for case in found]) for name, found in asked]]))
        line = [sys.executable, "-m", "lceval.judge.inrun", str(cases), str(said)]
        ran = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if not said.is_file():
            last = (ran.stderr.strip() or f"it ended with {ran.returncode}").splitlines()[-1]
            raise LcevalError(f"the judge {spec} failed: {last}")
        report, verdicts = json.loads(said.read_text())
    return report, [[Verdict(**verdict) for verdict in found] for found in verdicts]


def _main(cases: Path, said: Path) -> None:
    spec, tasks = json.loads(cases.read_text())
    asked = [(name, [_case(fields) for fields in found]) for name, found in tasks]
    report, verdicts = ask(asked, spec)
    partial = said.with_suffix(".part")
    partial.write_text(json.dumps([report, [[asdict(verdict) for verdict in found] for found in verdicts]]))
    os.replace(partial, said)


def _case(fields: Mapping[str, Any]) -> Case:
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    return Case(**given)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
