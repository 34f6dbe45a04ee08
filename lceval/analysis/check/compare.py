"""Comparison of two runs: whether they are comparable, and whether NEW is worse than BASE by more than the gate.

pass: the upper one-sided 95% bound of the drop is below the gate. regression: otherwise, if the drop is positive and
its p-value, Holm-adjusted over the tasks, is below 5%. inconclusive: otherwise. Identical outputs pass without a test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lceval.analysis.check.baseline import GATED, NO_ANSWER, Baseline, BaselineTask, Item
from lceval.analysis.pairs import unique_names
from lceval.core.errors import NotComparableError, UserError
from lceval.stats.estimates import mean_of
from lceval.stats.paired import LEVEL, Paired, compare, holm

Verdict = Literal["pass", "regression", "inconclusive"]
Pairs = Mapping[str, tuple[Item, Item]]
ALPHA = 1 - LEVEL
EXIT = {"pass": 0, "regression": 1, "inconclusive": 5}


@dataclass(frozen=True)
class Flip:
    """One sample that got worse: its values in the metric's units, and the drop (positive is worse)."""

    key: str
    base: float | None
    new: float | None
    drop: float


@dataclass(frozen=True)
class TaskCheck:
    """The comparison of one task.

    base, new: mean values, in the metric's units; base_interval, new_interval: their 95% intervals, as in a table.
    paired: None for identical outputs.
    p_holm: p adjusted over the tasks. errors_base, errors_new: samples without a value.
    flips: every sample that got worse, largest drop first.
    """

    task: str
    metric: str
    higher_is_better: bool
    n: int
    clusters: int
    base: float
    new: float
    base_interval: list[float] | None
    new_interval: list[float] | None
    paired: Paired | None
    p_holm: float
    errors_base: int
    errors_new: int
    verdict: Verdict
    reason: str
    flips: tuple[Flip, ...]


@dataclass(frozen=True)
class Check:
    """All tasks, and the overall verdict: regression if any task has one, else inconclusive if any task is."""

    gate: float
    tasks: tuple[TaskCheck, ...]

    @property
    def verdict(self) -> Verdict:
        verdicts = {task.verdict for task in self.tasks}
        return "regression" if "regression" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"


def check(base: Baseline, new: Baseline, *, gate: float, metric: str | None = None) -> Check:
    """Compare two runs, sample by sample.

    Args:
        gate: the smallest unacceptable drop, in the metric's units, positive.
        metric: the gate metric; None: each task's headline.

    Raises:
        NotComparableError: the runs differ in tasks, samples, prompts or scoring.
        UserError: a gate that is not positive, or a metric missing from a run.
    """
    if not (math.isfinite(gate) and gate > 0):
        raise UserError(
            f"--gate {gate}: expected a positive number in the metric's units, for example 0.05 for five points"
        )
    if missing := sorted({t.task for t in base.tasks} ^ {t.task for t in new.tasks}):
        raise NotComparableError(f"not comparable: task {missing[0]} is in only one of the runs")
    templates = base.template, new.template
    if len({*templates}) > 1 and not ("on" in templates and "off" not in templates):
        raise NotComparableError(f"not comparable: chat template {base.template} in BASE, {new.template} in NEW")
    others = {task.task: task for task in new.tasks}
    paired = [(task, others[task.task], _pairs(task, others[task.task])) for task in base.tasks]
    compared = [_compare(*sides, metric) for sides in paired]
    adjusted = holm([1.0 if task.paired is None else task.paired.p for task in compared])
    verdicts = [_verdict(task.paired, p_holm, gate) for task, p_holm in zip(compared, adjusted, strict=True)]
    return Check(
        gate,
        tuple(
            replace(task, p_holm=p_holm, verdict=verdict, reason=reason)
            for task, p_holm, (verdict, reason) in zip(compared, adjusted, verdicts, strict=True)
        ),
    )


def _pairs(old: BaselineTask, new: BaselineTask) -> Pairs:
    """Samples of a task in both runs, by unique name; the error names the first difference in prompts or scoring."""

    def differ(field: str, a: object, b: object) -> NotComparableError:
        return NotComparableError(f"not comparable: {old.task}: {field}: {a} in BASE, {b} in NEW")

    for field in ("version", "headline", "filter", "sources"):
        a, b = getattr(old, field), getattr(new, field)
        if a != b:
            raise differ(field, a, b)
    olds, news = (
        dict(zip(unique_names(item.id for item in task.samples), task.samples, strict=True)) for task in (old, new)
    )
    if only := sorted(olds.keys() ^ news.keys()):
        where = "BASE" if only[0] in olds else "NEW"
        raise NotComparableError(
            f"not comparable: {old.task}: sample {only[0]} is only in {where} ({len(olds)} in BASE, {len(news)} in NEW)"
        )
    pairs = {key: (sample, news[key]) for key, sample in olds.items()}
    for key, (ours, theirs) in pairs.items():
        if ours.prompt != theirs.prompt:
            raise differ(f"prompt of sample {key}", ours.prompt or "no digest", theirs.prompt or "no digest")
        if ours.cluster != theirs.cluster:
            raise differ(f"cluster of sample {key}", ours.cluster, theirs.cluster)
    return pairs


def _compare(old: BaselineTask, new: BaselineTask, pairs: Pairs, requested: str | None) -> TaskCheck:
    """One task, before p is adjusted and judged."""
    metric = _metric(old, new, requested)
    higher = GATED.get(metric, metric not in old.lower_is_better)
    values = {key: (a.values.get(metric), b.values.get(metric)) for key, (a, b) in pairs.items()}
    # An error counts as 0; in one run only, it is not comparable unless 0 is the worst value.
    zero_is_worst = higher and all(v is None or v >= 0 for pair in values.values() for v in pair)
    for key, (a, b) in values.items():
        if (a is None) != (b is None) and not zero_is_worst:
            side = "BASE" if a is None else "NEW"
            raise NotComparableError(
                f"not comparable: {old.task}: sample {key} has no {metric} in {side} (an error?), "
                "and the metric has no worst value to score it; choose another --metric"
            )
    counted = [(a or 0.0, b or 0.0) for a, b in values.values()]
    drops = [(a - b) if higher else (b - a) for a, b in counted]
    clusters = [item.cluster for item in old.samples]
    same = all(a.answer == b.answer for a, b in pairs.values()) and all(a == b for a, b in values.values())
    # Runs without any answer are not identical: nothing was compared.
    identical = same and any(item.answer != NO_ANSWER for item in old.samples)
    in_unit = metric != "gold_nll" and all(0 <= value <= 1 for pair in counted for value in pair)
    worse = [Flip(key, *pair, drop) for (key, pair), drop in zip(values.items(), drops, strict=True) if drop > 0]
    base_mean, new_mean = (mean_of(side, clusters) for side in zip(*counted, strict=True))
    return TaskCheck(
        task=old.task,
        metric=metric,
        higher_is_better=higher,
        n=len(drops),
        clusters=len(set(clusters)),
        base=base_mean.value or 0.0,
        new=new_mean.value or 0.0,
        base_interval=base_mean.interval,
        new_interval=new_mean.interval,
        paired=None if identical else compare(drops, clusters, largest=1.0 if in_unit else None),
        p_holm=1.0,
        errors_base=sum(a is None for a, _ in values.values()),
        errors_new=sum(b is None for _, b in values.values()),
        verdict="inconclusive",
        reason="",
        flips=tuple(sorted(worse, key=lambda flip: -flip.drop)),
    )


def _verdict(paired: Paired | None, p_holm: float, gate: float) -> tuple[Verdict, str]:
    if paired is None:
        return "pass", "identical outputs"
    significant = p_holm < ALPHA and paired.drop > 0
    if paired.upper < gate:
        if significant:
            return "pass", f"a significant drop (p {p_holm:.2g}) below the gate: at most {paired.upper:.3g} < {gate:g}"
        return "pass", f"drop at most {paired.upper:.3g} < {gate:g}"
    if significant:
        return "regression", f"drop {paired.drop:.3g}, p {p_holm:.2g}"
    bound = f"may be up to {paired.upper:.3g}" if math.isfinite(paired.upper) else "has no upper bound"
    reason = f"the drop {bound}, p {p_holm:.2g}"
    if paired.visible > gate:
        detects = f"detect a drop of {paired.visible:.3g}" if math.isfinite(paired.visible) else "detect no drop"
        reason += f"; too little data: {paired.n} samples in {paired.clusters} clusters {detects}"
    return "inconclusive", reason


def _metric(base: BaselineTask, new: BaselineTask, requested: str | None) -> str:
    """The gate metric, required in both runs."""
    metric = requested or base.headline
    if metric is None:
        raise NotComparableError(f"not comparable: {base.task} has no per-sample metric (run with --predict_only?)")
    for side, task in (("BASE", base), ("NEW", new)):
        # A run in which all samples failed is a result, not a wrong metric name.
        failed = metric == base.headline and not any(item.values for item in task.samples)
        if not failed and not any(metric in item.values for item in task.samples):
            known = sorted({name for item in (*base.samples, *new.samples) for name in item.values})
            hint = " (run with diagnose=gold)" if metric in ("gold_nll", "gold_kept") else ""
            raise UserError(
                f"no {metric} in {side}'s samples of {base.task}{hint}; available: {', '.join(known) or 'none'}"
            )
    return metric
