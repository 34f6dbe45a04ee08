"""Judged samples: the input of the judge, and the metrics of its grades, for in-run and later judging.

A sample without a valid reply is unjudged: counted, and excluded from all means. A sample that failed in the run scores
0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lceval.judge.client import Verdict
from lceval.judge.rubrics import Case, Label, Rubric
from lceval.judge.verdicts import RATING
from lceval.records.results import number
from lceval.stats.estimates import mean_of
from lceval.tasks import catalogue
from lceval.tasks.mc.letters import gold_letters
from lceval.tasks.scoring import gold_places

PERFECT = 100
RUBRIC = "rj"
"""The rubric of reasoning with citations."""
_RUBRICS = {"rj": "rj", "judged": "loong", "equality": "equality", "letter": "choice", "infinite_letter": "choice"}
_DATASETS = {"financebench": "financebench", "financebenchmulti": "financebench"}
Grades = Mapping[str, Label | float]


@dataclass(frozen=True)
class JudgedSample:
    """A line of a samples file, without its context.

    failed: whether the sample failed in the run; it then scores 0 and is not sent to the judge.
    strata: groups with separate means, e.g. {"level": "1"}.
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
    """The rubric of a task; None for tasks without a judge."""
    entry = catalogue.tasks().get(task)
    if entry is None:
        return None
    return _RUBRICS.get(entry.output_format) or _DATASETS.get(entry.dataset.dataset)


def metrics(rubric: str, grades: Grades, sample: JudgedSample) -> dict[str, float]:
    """The metrics of a sample by the grades of a rubric."""
    match rubric:
        case "loong":
            rating = float(grades[RATING])
            return {"avg_score": rating, "perfect_rate": float(rating == PERFECT)}
        case "financebench":
            verdict = grades["verdict"]
            return {f"judge_{label}": float(verdict == label) for label in ("correct", "incorrect", "refusal")}
        case "equality":
            return {"judge_correct": float(grades["verdict"] == "correct")}
        case "choice":
            letter = grades["letter"]
            return {"judge_acc": float(letter in sample.letters), "judge_parsed": float(letter != "none")}
        case "rj":
            pass
        case _:
            raise NotImplementedError(f"no metrics for the rubric {rubric}: add them here")
    parts = {
        "judge_reasoning": float(grades["reasoning"]),
        "judge_grounding": float(grades["grounding"]),
        "judge_correct": float(grades["answer"]),
    }
    total = sum(parts.values())
    paper = {} if sample.subem is None else {"rj_paper": total + sample.subem}
    return {**parts, "judge_sum": total, **paper}


# Grades of a sample without an answer.
_NO_ANSWER: dict[str, Grades] = {
    "rj": {"reasoning": 0, "grounding": 0, "answer": 0},
    "loong": {RATING: 0.0},
    "financebench": {"verdict": "incorrect"},
    "equality": {"verdict": "incorrect"},
    "choice": {"letter": "none"},
}

Scored = Sequence[tuple[JudgedSample, Mapping[str, float] | None, Verdict]]
"""Samples with their metrics (None if unjudged) and verdicts."""


def cases(samples: Sequence[JudgedSample]) -> list[Case]:
    """What the judge gets: the cases of the samples that did not fail."""
    return [sample.case for sample in samples if not sample.failed]


def judged(
    samples: Sequence[JudgedSample], verdicts: Sequence[Verdict], rubric: Rubric, judge: str, revision: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The stored line of each sample of a task, and the task's means and counts.

    Args:
        verdicts: verdicts on `cases(samples)`, in order.
    """
    remaining, scored, lines = iter(verdicts), [], []
    for sample in samples:
        verdict = Verdict(dict(_NO_ANSWER[rubric.rubric]), "", "", "", 0) if sample.failed else next(remaining)
        scores = None if verdict.grades is None else metrics(rubric.rubric, verdict.grades, sample)
        scored.append((sample, scores, verdict))
        line = {
            "doc_id": sample.doc_id,
            "id": sample.id,
            "cluster": sample.cluster,
            "judge": judge,
            "revision": revision,
            "rubric": rubric.key,
            "status": "unjudged" if scores is None else "error" if sample.failed else "judged",
            "reason": verdict.reason,
            **(scores or {}),
            "grades": verdict.grades,
            "reply": verdict.reply,
            "prompt_hash": verdict.prompt,
            "clipped": verdict.clipped,
        }
        lines.append(line)
    return lines, {"rubric": rubric.key, **_summary(scored)}


def _summary(scored: Scored) -> dict[str, Any]:
    """Means over the judged samples, and counts of unjudged ones."""
    reasons = Counter(verdict.reason for _, scores, verdict in scored if scores is None)
    judged = [(sample, scores) for sample, scores, _ in scored if scores is not None]
    means, intervals = {}, {}
    for metric in dict.fromkeys(name for _, scores in judged for name in scores):
        known = [(scores[metric], sample.cluster) for sample, scores in judged if metric in scores]
        mean = mean_of([value for value, _ in known], [cluster for _, cluster in known])
        means[metric], intervals[metric] = mean.value, mean.interval
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
    strata = {}
    for stratum in sorted({sample.strata[name] for sample, _, _ in scored if name in sample.strata}):
        inside = [scores for sample, scores, _ in scored if sample.strata.get(name) == stratum]
        known = [scores for scores in inside if scores is not None]
        metrics = dict.fromkeys(metric for scores in known for metric in scores)
        strata[stratum] = {"n": len(inside), "unjudged": len(inside) - len(known)} | {
            metric: math.fsum(scores[metric] for scores in known if metric in scores) / len(known) for metric in metrics
        }
    return strata


def sample_of(row: Mapping[str, Any], rubric: str) -> JudgedSample:
    """The sample of a samples-file line, or of an lm-eval sample."""
    doc = row["doc"]
    kv = row.get("kv")
    return JudgedSample(
        doc_id=row.get("doc_id"),
        id=str(doc["id"]),
        cluster=str(doc["cluster"]),
        case=case(doc, str(row["filtered_resps"][0]), documents=rubric == RUBRIC),
        subem=number(row.get("subem")),
        letters=tuple(gold_letters(doc)) if rubric == "choice" else (),
        failed=isinstance(kv, dict) and kv.get("status") == "error",
        strata={name: str(doc[name]) for name in ("level", "set") if name in doc} if rubric == "loong" else {},
    )


def case(row: Mapping[str, Any], output: str, *, documents: bool = True) -> Case:
    """The case of a row and an output.

    Args:
        documents: whether to include the gold documents, with their numbers in the prompt.
    """
    golds = tuple(sorted(gold_places(row))) if documents else ()
    for text in (row["question"], *row["answers"], *(row.get("choices") or ())):
        if not isinstance(text, str):
            raise TypeError(f"{text!r:.40} is not a text")
    return Case(
        question=row["question"],
        gold=tuple(row["answers"]),
        solution=output,
        documents=tuple(f"[DOC {place}]\n{row['docs'][place]['text']}" for place in golds),
        gold_ids=golds,
        choices=tuple(row.get("choices") or ()),
    )
