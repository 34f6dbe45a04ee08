"""`lceval judge RUN`: judge metrics for finished runs, stored next to their unchanged results.

A run folder gets `judged_<task>.jsonl` (one line per sample: grades and reply) and `judge.json` (means with intervals),
both of the latest judge. The replies of all judges stay in the reply cache, so that judging again is free. A sample
without a valid reply is unjudged: counted, and excluded from all means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lceval.core.errors import UserError
from lceval.core.io import read_objects, write_json, write_objects
from lceval.core.safe_text import printable
from lceval.judge import rubrics, scores
from lceval.judge.client import Client
from lceval.records.results import read_folder

SUMMARY = "judge.json"
UNUSABLE = ("unparsable", "empty", "cut")
"""Reasons for which a retry is useless: the reply is cached and has no verdict."""


def judge_folder(folder: Path, client: Client) -> dict[str, Any]:
    """Judge the run in a folder and write the verdicts into the folder; returns the content of `judge.json`.

    Raises:
        UserError: no run, an unfinished run, several runs, or no task with a rubric.
    """
    runs = read_folder(folder)
    if len(runs) > 1:
        raise UserError(f"{folder} contains {len(runs)} evaluations: pass the folder of one")
    run = runs[0]
    chosen = [(task.task, task.file, name) for task in run.tasks if task.file and (name := scores.rubric_of(task.task))]
    if not chosen and not run.finished:
        raise UserError(f"{run.path} is not finished: rerun the same command to resume it, then judge")
    if not chosen:
        names = ", ".join(task.task for task in run.tasks)
        raise UserError(
            f"{run.path} has no judgeable task ({names}): expected rj, Loong, FinanceBench or generated letters"
        )
    home = chosen[0][1].parent
    tasks = {}
    for task, file, name in chosen:
        rubric, samples = rubrics.load(name), list(_samples(file, name))
        verdicts = client.judge_all(rubric, scores.cases(samples))
        lines, tasks[task] = scores.judged(samples, verdicts, rubric, client.judge.name, client.judge.revision)
        write_objects(home / f"judged_{task}.jsonl", lines)
    report = {"run": run.label, **client.report({"tasks": tasks})}
    write_json(home / SUMMARY, report)
    return report


def _samples(file: Path, rubric: str) -> Iterator[scores.JudgedSample]:
    """The samples of a file under its first filter."""
    first: str | None = None
    for where, row in read_objects(file):
        name = str(row.get("filter", "none"))
        first = first or name
        if name != first:
            continue
        try:
            yield scores.sample_of(row, rubric)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: not a sample of an lceval task ({error!r:.80})") from None


def missing(report: Mapping[str, Any]) -> int:
    """Number of unjudged samples that a retry may judge."""
    return sum(
        count
        for task in report["tasks"].values()
        for reason, count in task["reasons"].items()
        if reason not in UNUSABLE
    )


def render(report: Mapping[str, Any]) -> str:
    """The report as text."""
    judge = f"{report['judge']} ({report['label']})" if report["rule_based"] else report["judge"]
    lines = []
    for name, task in report["tasks"].items():
        reasons = "".join(f"; {count} {reason}" for reason, count in task["reasons"].items())
        lines.append(f"{report['run']} {name} by {judge}, rubric {task['rubric']}")
        lines.append(f"{task['judged']} of {task['n']} judged, {task['unjudged']} unjudged{reasons}")
        for metric, value in task["scores"].items():
            interval = task["intervals"][metric]
            bounds = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "-"
            lines.append(f"  {metric:<18}{value:>8.3f}  {bounds}")
        for stratum in ("level", "set"):
            for value, row in task.get(f"by_{stratum}", {}).items():
                means = ", ".join(f"{k} {v:.3f}" for k, v in row.items() if k not in ("n", "unjudged"))
                lines.append(f"  {stratum} {value}: n {row['n']}, unjudged {row['unjudged']}, {means or 'none judged'}")
    return "\n".join(map(printable, lines))
