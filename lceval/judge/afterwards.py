"""`lceval judge RUN`: judged metrics for runs that are done, beside their own results, which stay as they are.

A run folder gets `judged_<task>.jsonl` (a line a sample: grades, the judge's reply) and `judge.json` (means with
intervals). Both are those of the last judge asked; its replies, and those of earlier judges, stay in the file of
replies, so that asking again costs nothing. A sample whose judge failed is unjudged: counted, and in no mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lceval.errors import UserError
from lceval.judge import rubrics, samples
from lceval.judge.client import Client, Spent
from lceval.judge.judges import Judge
from lceval.judge.rule import RuleJudge
from lceval.judge.samples import rubric_of
from lceval.results import Run, TaskResult, read_folder

__all__ = ["SUMMARY", "judge_folder", "missing", "render", "report_of", "rubric_of"]

SUMMARY = "judge.json"
READ = ("unparsable", "empty", "cut")
"""Reasons of replies that came and gave no verdict: asking again gives the same."""


def judge_folder(folder: Path, judge: Judge, client: Client) -> dict[str, Any]:
    """Judge what a run folder has, and write the verdicts into it; the content of its `judge.json`.

    Raises:
        UserError: no run, an unfinished one, several in one folder, or none of its tasks has a rubric.
    """
    runs = read_folder(folder)
    if len(runs) > 1:
        raise UserError(f"{folder} holds {len(runs)} evaluations: name the folder of one")
    run = runs[0]
    chosen = [(task, task.file, name) for task in run.tasks if task.file and (name := rubric_of(task.task))]
    if not chosen:
        raise UserError(_nothing(run))
    home = chosen[0][1].parent
    tasks = {}
    for task, file, name in chosen:
        tasks[task.task] = _judge_task(task, file, name, client, home)
    report = {"run": run.label, **report_of(judge, client.spent, tasks)}
    _write(home / SUMMARY, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def report_of(judge: Judge, spent: Spent, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Whose verdicts these are, the means of each task, and what asking took."""
    return {
        "judge": judge.name,
        "label": judge.label,
        "revision": judge.revision,
        "rule_based": isinstance(judge, RuleJudge),
        "tasks": dict(tasks),
        "calls": spent.calls,
        "reused": spent.reused,
        "tokens_in": spent.tokens_in,
        "tokens_out": spent.tokens_out,
        "retried": dict(spent.retried),
        "served": dict(spent.served),
    }


def _nothing(run: Run) -> str:
    names = ", ".join(task.task for task in run.tasks)
    if not run.finished:
        return f"{run.path} is not finished: run the same line again, then judge"
    return f"{run.path} has nothing for a judge ({names}): judged are rj, Loong, FinanceBench and generated letters"


def _judge_task(task: TaskResult, file: Path, name: str, client: Client, home: Path) -> dict[str, Any]:
    rubric = rubrics.load(name)
    found = list(_samples(file, name))
    scored = samples.score(found, client.judge_all(rubric, [s.case for s in found if not s.failed]), rubric)
    judge = client.judge
    lines = (json.dumps(samples.line(one, judge.name, judge.revision, rubric), ensure_ascii=False) for one in scored)
    _write(home / f"judged_{task.task}.jsonl", "".join(f"{line}\n" for line in lines))
    return {"rubric": rubric.key, **samples.summary(scored)}


def _samples(file: Path, rubric: str) -> Iterable[samples.Sample]:
    """The samples of a file, as its first filter left them."""
    first: str | None = None
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = str(row.get("filter", "none"))
                first = first or name
                if name == first:
                    yield samples.sample_of(row, rubric)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise UserError(f"{file}:{number}: no sample of a task of ours ({error!r:.80})") from None


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def missing(report: Mapping[str, Any]) -> int:
    """Unjudged samples that asking again may judge."""
    return sum(
        count for task in report["tasks"].values() for reason, count in task["reasons"].items() if reason not in READ
    )


def render(report: Mapping[str, Any]) -> str:
    """The report as text."""
    judge = f"{report['judge']} ({report['label']})" if report["rule_based"] else report["judge"]
    lines = []
    for name, task in report["tasks"].items():
        why = "".join(f"; {count} {reason}" for reason, count in task["reasons"].items())
        lines.append(f"{report['run']} {name} by {judge}, rubric {task['rubric']}")
        lines.append(f"{task['judged']} of {task['n']} judged, {task['unjudged']} unjudged{why}")
        for metric, value in task["scores"].items():
            interval = task["intervals"][metric]
            bounds = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "-"
            lines.append(f"  {metric:<18}{value:>8.3f}  {bounds}")
        for stratum in ("level", "set"):
            for value, found in task.get(f"by_{stratum}", {}).items():
                shown = ", ".join(f"{k} {v:.3f}" for k, v in found.items() if k not in ("n", "unjudged"))
                lines.append(
                    f"  {stratum} {value}: n {found['n']}, unjudged {found['unjudged']}, {shown or 'none judged'}"
                )
    return "\n".join(lines)
