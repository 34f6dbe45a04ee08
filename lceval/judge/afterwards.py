"""`lceval judge RUN`: judged metrics for runs that are done, beside their own results, which stay as they are.

A run folder gets `judged_<task>.jsonl` (a line a sample: grades, the judge's reply) and `judge.json` (means with
intervals). Both are those of the last judge asked; its replies, and those of earlier judges, stay in the file of
replies, so that asking again costs nothing. A sample whose judge failed is unjudged: counted, and in no mean.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lceval.errors import UserError
from lceval.judge import rubrics
from lceval.judge.client import Client, Verdict
from lceval.judge.grader import RUBRIC, case
from lceval.judge.judges import Judge
from lceval.judge.rubrics import Case, Label
from lceval.judge.rule import RuleJudge
from lceval.judge.verdicts import RATING
from lceval.results import Run, TaskResult, read_folder
from lceval.stats import cluster_bootstrap
from lceval.tasks import catalogue
from lceval.tasks.mc.letters import gold_letters

SUMMARY = "judge.json"
PERFECT = 100
_FORMS = {"rj": "rj", "judged": "loong", "letter": "choice", "infinite_letter": "choice"}
_DATASETS = {"financebench": "financebench", "financebenchmulti": "financebench"}
READ = ("unparsable", "empty", "cut")
"""Reasons of replies that came and gave no verdict: asking again gives the same."""

Grades = Mapping[str, Label | float]


@dataclass(frozen=True)
class Sample:
    """A line of a samples file, without its context.

    failed: whether the run itself has no answer; such a sample scores 0 there, and here, and is not shown to a judge.
    strata: what means are also given for, e.g. {"level": "1"}.
    """

    doc_id: Any
    id: str
    cluster: str
    case: Case
    subem: float | None
    letters: tuple[str, ...]
    failed: bool
    strata: Mapping[str, str]


def rubric_of(task: str) -> str | None:
    """The rubric that a task is judged by; None for tasks that need no judge."""
    known = catalogue.tasks().get(task)
    if known is None:
        return None
    return _FORMS.get(known.form) or _DATASETS.get(known.dataset.dataset)


def _rj(grades: Grades, sample: Sample) -> dict[str, float]:
    parts = {
        "judge_reasoning": float(grades["reasoning"]),
        "judge_grounding": float(grades["grounding"]),
        "judge_correct": float(grades["answer"]),
    }
    total = sum(parts.values())
    paper = {} if sample.subem is None else {"rj_paper": total + sample.subem}
    return {**parts, "judge_sum": total, **paper}


def _loong(grades: Grades, sample: Sample) -> dict[str, float]:
    rating = float(grades[RATING])
    return {"avg_score": rating, "perfect_rate": float(rating == PERFECT)}


def _financebench(grades: Grades, sample: Sample) -> dict[str, float]:
    return {f"judge_{label}": float(grades["verdict"] == label) for label in ("correct", "incorrect", "refusal")}


def _choice(grades: Grades, sample: Sample) -> dict[str, float]:
    return {"judge_acc": float(grades["letter"] in sample.letters), "judge_parsed": float(grades["letter"] != "none")}


METRICS: dict[str, Callable[[Grades, Sample], dict[str, float]]] = {
    "rj": _rj,
    "loong": _loong,
    "financebench": _financebench,
    "choice": _choice,
}
# What a sample that has no answer is given.
_NOTHING: dict[str, Grades] = {
    "rj": {"reasoning": 0, "grounding": 0, "answer": 0},
    "loong": {RATING: 0.0},
    "financebench": {"verdict": "incorrect"},
    "choice": {"letter": "none"},
}


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
    spent = client.spent
    report = {
        "run": run.label,
        "judge": judge.name,
        "label": judge.label,
        "revision": judge.revision,
        "rule_based": isinstance(judge, RuleJudge),
        "tasks": tasks,
        "calls": spent.calls,
        "reused": spent.reused,
        "tokens_in": spent.tokens_in,
        "tokens_out": spent.tokens_out,
        "retried": dict(spent.retried),
        "served": dict(spent.served),
    }
    _write(home / SUMMARY, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _nothing(run: Run) -> str:
    names = ", ".join(task.task for task in run.tasks)
    if not run.finished:
        return f"{run.path} is not finished: run the same line again, then judge"
    return f"{run.path} has nothing for a judge ({names}): judged are rj, Loong, FinanceBench and generated letters"


def _judge_task(task: TaskResult, file: Path, name: str, client: Client, home: Path) -> dict[str, Any]:
    samples = list(_samples(file, name))
    rubric = rubrics.load(name)
    asked = [sample for sample in samples if not sample.failed]
    verdicts = dict(zip(map(id, asked), client.judge_all(rubric, [s.case for s in asked]), strict=True))
    lines, scored = [], []
    for sample in samples:
        verdict = verdicts.get(id(sample)) or Verdict(dict(_NOTHING[name]), "", "", "", 0)
        scores = None if verdict.grades is None else METRICS[name](verdict.grades, sample)
        scored.append((sample, scores, verdict))
        lines.append(
            {
                "doc_id": sample.doc_id,
                "id": sample.id,
                "cluster": sample.cluster,
                "judge": client.judge.name,
                "rubric": rubric.key,
                "status": "unjudged" if scores is None else "error" if sample.failed else "judged",
                "reason": verdict.reason,
                **(scores or {}),
                "grades": verdict.grades,
                "reply": verdict.reply,
                "prompt_hash": verdict.prompt,
                "clipped": verdict.clipped,
            }
        )
    _write(home / f"judged_{task.task}.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    return {"rubric": rubric.key, **_summary(scored)}


Scored = Sequence[tuple[Sample, Mapping[str, float] | None, Verdict]]


def _summary(scored: Scored) -> dict[str, Any]:
    """Means over the judged samples, with what is missing."""
    reasons = Counter(verdict.reason for _, scores, verdict in scored if scores is None)
    judged = [(sample, scores) for sample, scores, _ in scored if scores is not None]
    means, intervals = {}, {}
    for metric in dict.fromkeys(name for _, scores in judged for name in scores):
        known = [(scores[metric], sample.cluster) for sample, scores in judged if metric in scores]
        mean, low, high = cluster_bootstrap([value for value, _ in known], [cluster for _, cluster in known])
        means[metric], intervals[metric] = mean, None if math.isnan(low) else [low, high]
    return {
        "n": len(scored),
        "judged": len(judged),
        "unjudged": len(scored) - len(judged),
        "coverage": len(judged) / len(scored),
        "reasons": dict(reasons),
        "errors": sum(sample.failed for sample, _, _ in scored),
        "clipped": sum(verdict.clipped > 0 for _, _, verdict in scored),
        "scores": means,
        "intervals": intervals,
        **{f"by_{name}": _by(scored, name) for name in dict.fromkeys(n for s, _, _ in scored for n in s.strata)},
    }


def _by(scored: Scored, name: str) -> dict[str, dict[str, Any]]:
    """The means of each stratum."""
    made = {}
    for stratum in sorted({sample.strata[name] for sample, _, _ in scored if name in sample.strata}):
        inside = [scores for sample, scores, _ in scored if sample.strata.get(name) == stratum]
        known = [scores for scores in inside if scores is not None]
        metrics = dict.fromkeys(metric for scores in known for metric in scores)
        made[stratum] = {"n": len(inside), "unjudged": len(inside) - len(known)} | {
            metric: math.fsum(scores[metric] for scores in known if metric in scores) / len(known) for metric in metrics
        }
    return made


def _samples(file: Path, rubric: str) -> Iterable[Sample]:
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
                    yield _sample(row, rubric)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise UserError(f"{file}:{number}: no sample of a task of ours ({error!r:.80})") from None


def _sample(row: Mapping[str, Any], rubric: str) -> Sample:
    doc = row["doc"]
    kv = row.get("kv")
    subem = row.get("subem")
    return Sample(
        doc_id=row.get("doc_id"),
        id=str(doc["id"]),
        cluster=str(doc["cluster"]),
        case=case(doc, str(row["filtered_resps"][0]), documents=rubric == RUBRIC),
        subem=float(subem) if isinstance(subem, int | float) else None,
        letters=tuple(gold_letters(doc)) if rubric == "choice" else (),
        failed=isinstance(kv, dict) and kv.get("status") == "error",
        strata={name: str(doc[name]) for name in ("level", "set") if name in doc} if rubric == "loong" else {},
    )


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
