"""Verdicts of a judge on a run: in its samples, or in the files that `lceval judge` writes next to them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lceval.core.io import read_objects
from lceval.core.paths import not_a_link
from lceval.records.results import TaskResult, number

# Output formats whose tasks need a judge for a complete score.
_JUDGED_FORMATS = ("rj", "judged")
_NO_METRIC = frozenset({"doc_id", "clipped"})


@dataclass(frozen=True)
class Judged:
    """Verdicts on one task.

    unjudged: samples without a verdict; None for tasks without a judge.
    judge: its name; None if unknown.
    metrics: mean over the judged samples.
    agreement: of the judge with human labels, under the keys of a row; empty if uncalibrated.
    """

    unjudged: int | None
    judge: str | None
    metrics: Mapping[str, float]
    agreement: Mapping[str, Any] = field(default_factory=dict)


def judged(task: TaskResult) -> Judged:
    """The verdicts on a task's samples; those on other samples (an older run in the folder) are ignored."""
    lines = verdicts(task)
    if lines is None:
        if any(sample.unjudged is not None for sample in task.samples):
            return Judged(sum(sample.unjudged is True for sample in task.samples), None, {})
        return Judged(len(task.samples) if _needs_judge(task.task) else None, None, {})
    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in _NO_METRIC and not isinstance(value, bool) and (known := number(value)) is not None:
                values.setdefault(name, []).append(known)
    return Judged(
        unjudged=sum(line.get("status") == "unjudged" for line in lines),
        judge=_name(lines),
        metrics={name: math.fsum(numbers) / len(numbers) for name, numbers in values.items()},
        agreement=_agreement(lines),
    )


def _needs_judge(name: str) -> bool:
    from lceval.tasks import catalogue

    task = catalogue.tasks().get(name) if name.startswith("lc_") else None
    return task is not None and task.output_format in _JUDGED_FORMATS


def verdicts(task: TaskResult) -> list[dict[str, Any]] | None:
    """One line per sample, in order: from `lceval judge`, whose file is newer, else from the run's own judge.

    None without either; a file about other samples is ignored.
    """
    if (lines := _verdict_file(task)) is not None:
        return lines
    logged = [dict(sample.verdict) for sample in task.samples]
    return logged if logged and all(logged) else None


def _verdict_file(task: TaskResult) -> list[dict[str, Any]] | None:
    if task.file is None:
        return None
    file = not_a_link(task.file.parent / f"judged_{task.task}.jsonl")
    if not os.path.isfile(file):
        return None
    lines = [line for _, line in read_objects(file)]
    if [str(line.get("id")) for line in lines] != [sample.id for sample in task.samples]:
        return None
    return lines


def is_judges(metric: str) -> bool:
    """Whether a metric comes from a judge."""
    return metric.startswith("judge_") or metric in ("rj_paper", "avg_score", "perfect_rate")


def _agreement(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from lceval.judge import kappas

    judges = {(str(line.get("judge")), str(line.get("revision", ""))) for line in lines}
    calibration = kappas.find(*judges.pop()) if len(judges) == 1 else None
    if calibration is None:
        return {}
    low, high = calibration["kappa_interval"] or (None, None)
    return {
        "judge_kappa": calibration["kappa"],
        "judge_kappa_lo": low,
        "judge_kappa_hi": high,
        "judge_kappa_n": calibration["judged"],
    }


def _name(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """The judge's name in tables; the rule-based judge is labelled as such."""
    from lceval.judge.backends.rule import LABEL, RuleJudge

    name = next((str(line["judge"]) for line in lines if line.get("judge")), None)
    return f"{name} ({LABEL})" if name == RuleJudge.name else name
