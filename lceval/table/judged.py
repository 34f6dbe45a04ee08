"""What a judge said of a run: in its samples, or in the files that `lceval judge` leaves beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lceval.results import TaskResult

# Forms of tasks whose score is only half of the story without a judge.
_WANT_A_JUDGE = ("rj", "judged")
_NO_METRIC = frozenset({"doc_id", "clipped"})


@dataclass(frozen=True)
class Judged:
    """unjudged: samples without a verdict, None where none is due; judge: its name, None where it is not known.

    metrics: mean over the judged samples.
    worth: its agreement with people, under the keys of a row; empty where it was not calibrated.
    """

    unjudged: int | None
    judge: str | None
    metrics: Mapping[str, float]
    worth: Mapping[str, Any] = field(default_factory=dict)


def judged(task: TaskResult) -> Judged:
    """The verdicts on a task's samples; those of other samples (an older run in the folder) count for nothing."""
    lines = verdicts(task)
    if lines is None:
        if any(sample.unjudged is not None for sample in task.samples):
            return Judged(sum(sample.unjudged is True for sample in task.samples), None, {})
        return Judged(len(task.samples) if _wants_judge(task.task) else None, None, {})
    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and name not in _NO_METRIC:
                values.setdefault(name, []).append(float(value))
    return Judged(
        unjudged=sum(line.get("status") == "unjudged" for line in lines),
        judge=_name(lines),
        metrics={name: math.fsum(found) / len(found) for name, found in values.items()},
        worth=_worth(lines),
    )


def _wants_judge(name: str) -> bool:
    from lceval.tasks import catalogue

    task = catalogue.tasks().get(name) if name.startswith("lc_") else None
    return task is not None and task.output_format in _WANT_A_JUDGE


def verdicts(task: TaskResult) -> list[dict[str, Any]] | None:
    """A line per sample, in order: of the file beside the samples, which came later, else of the run's own judge.

    None where there is neither; a file that is not about these samples counts for nothing.
    """
    if (lines := _beside(task)) is not None:
        return lines
    own = [dict(sample.verdict) for sample in task.samples]
    return own if own and all(own) else None


def _beside(task: TaskResult) -> list[dict[str, Any]] | None:
    if task.file is None:
        return None
    file = task.file.parent / f"judged_{task.task}.jsonl"
    if not file.is_file():
        return None
    lines = _objects(file.read_text(encoding="utf-8").split("\n"))
    if lines is None or [str(line.get("id")) for line in lines] != [sample.id for sample in task.samples]:
        return None
    return lines


def is_judges(metric: str) -> bool:
    """Whether a metric is a judge's."""
    return metric.startswith("judge_") or metric in ("rj_paper", "avg_score", "perfect_rate")


def _objects(lines: Sequence[str]) -> list[dict[str, Any]] | None:
    try:
        found = [json.loads(line) for line in lines if line.strip()]
    except ValueError:
        return None
    return found if all(isinstance(line, dict) for line in found) else None


def _worth(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from lceval.judge import calibrations

    whose = {(str(line.get("judge")), str(line.get("revision", ""))) for line in lines}
    known = calibrations.find(*whose.pop()) if len(whose) == 1 else None
    if known is None:
        return {}
    low, high = known["kappa_interval"] or (None, None)
    return {
        "judge_kappa": known["kappa"],
        "judge_kappa_lo": low,
        "judge_kappa_hi": high,
        "judge_kappa_n": known["judged"],
    }


def _name(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """The judge as every table must name it: one that is a rule says so."""
    from lceval.judge.rule import LABEL, RuleJudge

    name = next((str(line["judge"]) for line in lines if line.get("judge")), None)
    return f"{name} ({LABEL})" if name == RuleJudge.name else name
