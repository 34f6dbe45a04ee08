"""Comparison of two runs: whether they are comparable, and whether NEW is worse than BASE by more than the gate.

pass: the upper one-sided 95% bound of the drop is below the gate. regression: otherwise, if the drop is positive and
its p-value, Holm-adjusted over the tasks, is below 5%. inconclusive: otherwise. Identical outputs pass without a test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lceval.analysis.check.baseline import GATED, NO_ANSWER, Baseline, BaselineTask, keys
from lceval.core.errors import NotComparableError, UserError
from lceval.stats.estimates import mean_of
from lceval.stats.paired import LEVEL, Paired, compare, holm

Verdict = Literal["pass", "regression", "inconclusive"]
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
    comparable(base, new)
    others = {task.task: task for task in new.tasks}
    pairs = [_Pairs(task, others[task.task], metric) for task in base.tasks]
    measured = [None if p.identical else compare(p.drops, p.clusters, largest=p.largest) for p in pairs]
    adjusted = holm([1.0 if m is None else m.p for m in measured])
    return Check(gate, tuple(p.judge(m, a, gate) for p, m, a in zip(pairs, measured, adjusted, strict=True)))


def comparable(base: Baseline, new: Baseline) -> None:
    """Require the same tasks, samples, prompts and scoring; the error names the first difference."""
    if missing := sorted({t.task for t in base.tasks} ^ {t.task for t in new.tasks}):
        raise NotComparableError(f"not comparable: task {missing[0]} is in only one of the runs")
    if base.template != new.template and not ("on" in (base.template, new.template) and _on(base) and _on(new)):
        raise NotComparableError(f"not comparable: chat template {base.template} in BASE, {new.template} in NEW")
    others = {task.task: task for task in new.tasks}
    for old in base.tasks:
        _comparable_task(old, others[old.task])


def _on(run: Baseline) -> bool:
    return run.template != "off"


def _comparable_task(old: BaselineTask, new: BaselineTask) -> None:
    def differ(field: str, a: object, b: object) -> NotComparableError:
        return NotComparableError(f"not comparable: {old.task}: {field}: {a} in BASE, {b} in NEW")

    for field in ("version", "headline", "filter", "sources"):
        a, b = getattr(old, field), getattr(new, field)
        if a != b:
            raise differ(field, a, b)
    olds = dict(zip(keys(old.samples), old.samples, strict=True))
    news = dict(zip(keys(new.samples), new.samples, strict=True))
    if only := sorted(olds.keys() ^ news.keys()):
        where = "BASE" if only[0] in olds else "NEW"
        raise NotComparableError(
            f"not comparable: {old.task}: sample {only[0]} is only in {where} ({len(olds)} in BASE, {len(news)} in NEW)"
        )
    for key, sample in olds.items():
        if sample.prompt != news[key].prompt:
            raise differ(f"prompt of sample {key}", sample.prompt or "no digest", news[key].prompt or "no digest")
        if sample.cluster != news[key].cluster:
            raise differ(f"cluster of sample {key}", sample.cluster, news[key].cluster)


class _Pairs:
    """The samples of one task in both runs, with their drops in the metric's units."""

    def __init__(self, base: BaselineTask, new: BaselineTask, metric: str | None) -> None:
        self.task = base.task
        self.metric = _metric(base, new, metric)
        self.higher = GATED.get(self.metric, self.metric not in base.lower_is_better)
        self.keys = keys(base.samples)
        others = dict(zip(keys(new.samples), new.samples, strict=True))
        self.pairs = [(item, others[key]) for key, item in zip(self.keys, base.samples, strict=True)]
        self.clusters = [item.cluster for item in base.samples]
        self.values = [(a.values.get(self.metric), b.values.get(self.metric)) for a, b in self.pairs]
        same = all(a.answer == b.answer for a, b in self.pairs) and all(a == b for a, b in self.values)
        # Runs without any answer are not identical: nothing was compared.
        self.identical = same and any(item.answer != NO_ANSWER for item in base.samples)
        self._counted = self._count()
        self.drops = [(a - b) if self.higher else (b - a) for a, b in self._counted]
        observed = [value for pair in self._counted for value in pair]
        in_unit = self.metric != "gold_nll" and all(0 <= value <= 1 for value in observed)
        self.largest = 1.0 if in_unit else None

    def _count(self) -> list[tuple[float, float]]:
        """Values with errors as 0; an error in one run only is not comparable unless 0 is the worst value."""
        zero_is_worst = self.higher and all(v is None or v >= 0 for pair in self.values for v in pair)
        for key, (a, b) in zip(self.keys, self.values, strict=True):
            if (a is None) != (b is None) and not zero_is_worst:
                side = "BASE" if a is None else "NEW"
                raise NotComparableError(
                    f"not comparable: {self.task}: sample {key} has no {self.metric} in {side} (an error?), "
                    "and the metric has no worst value to score it; choose another --metric"
                )
        return [(a or 0.0, b or 0.0) for a, b in self.values]

    def judge(self, paired: Paired | None, p_holm: float, gate: float) -> TaskCheck:
        verdict, reason = _verdict(paired, p_holm, gate)
        worse = [
            Flip(key, a, b, drop)
            for key, (a, b), drop in zip(self.keys, self.values, self.drops, strict=True)
            if drop > 0
        ]
        base, new = (mean_of(values, self.clusters) for values in zip(*self._counted, strict=True))
        return TaskCheck(
            task=self.task,
            metric=self.metric,
            higher_is_better=self.higher,
            n=len(self.drops),
            clusters=len(set(self.clusters)),
            base=base.value or 0.0,
            new=new.value or 0.0,
            base_interval=base.interval,
            new_interval=new.interval,
            paired=paired,
            p_holm=p_holm,
            errors_base=sum(a is None for a, _ in self.values),
            errors_new=sum(b is None for _, b in self.values),
            verdict=verdict,
            reason=reason,
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
        raise UserError(f"{base.task} has no per-sample metric to gate on")
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
