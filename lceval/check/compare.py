"""Are two runs comparable, and is NEW worse than BASE by more than the gate allows?

pass: the upper one-sided 95% bound of the drop is below the gate. regression: else, where the drop is positive and
Holm's adjusted p over the tasks is below 5%. inconclusive: else. Outputs that are identical pass without statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lceval.check.baseline import GATED, NO_ANSWER, Baseline, Task, keys
from lceval.check.paired import LEVEL, Paired, compare, holm
from lceval.errors import NotComparableError, UserError

Verdict = Literal["pass", "regression", "inconclusive"]
ALPHA = 1 - LEVEL
EXIT = {"pass": 0, "regression": 1, "inconclusive": 5}


@dataclass(frozen=True)
class Flip:
    """One sample that lost: its values in the metric's units, and the drop (positive is worse)."""

    key: str
    base: float | None
    new: float | None
    drop: float


@dataclass(frozen=True)
class TaskCheck:
    """The comparison of one task.

    base, new: mean values, in the metric's units. paired: None where the outputs are identical.
    p_holm: p adjusted over the tasks. errors_base, errors_new: samples without a value.
    flips: every sample that lost, worst first.
    """

    task: str
    metric: str
    higher_is_better: bool
    n: int
    clusters: int
    base: float
    new: float
    paired: Paired | None
    p_holm: float
    errors_base: int
    errors_new: int
    verdict: Verdict
    reason: str
    flips: tuple[Flip, ...]


@dataclass(frozen=True)
class Check:
    """All tasks, and what they say together: a regression of one is one, then what one left open."""

    gate: float
    tasks: tuple[TaskCheck, ...]

    @property
    def verdict(self) -> Verdict:
        found = {task.verdict for task in self.tasks}
        return "regression" if "regression" in found else "inconclusive" if "inconclusive" in found else "pass"


def check(base: Baseline, new: Baseline, *, gate: float, metric: str | None = None) -> Check:
    """Compare two runs, sample by sample.

    Args:
        gate: the drop that is too much, in the metric's units, positive.
        metric: what to gate on; None is each task's headline.

    Raises:
        NotComparableError: the runs did not answer the same questions in the same way.
        UserError: a gate that is not positive, or a metric that a run does not have.
    """
    if not (math.isfinite(gate) and gate > 0):
        raise UserError(f"--gate {gate}: expected a positive number in the metric's units, as 0.05 for five points")
    comparable(base, new)
    others = {task.task: task for task in new.tasks}
    pairs = [_Pairs(task, others[task.task], metric) for task in base.tasks]
    measured = [None if p.identical else compare(p.drops, p.clusters, largest=p.largest) for p in pairs]
    adjusted = holm([1.0 if m is None else m.p for m in measured])
    return Check(gate, tuple(p.judge(m, a, gate) for p, m, a in zip(pairs, measured, adjusted, strict=True)))


def comparable(base: Baseline, new: Baseline) -> None:
    """Refuse, by its first difference, a pair that did not answer the same questions in the same way."""
    if missing := sorted({t.task for t in base.tasks} ^ {t.task for t in new.tasks}):
        raise NotComparableError(f"not comparable: task {missing[0]} is in one of the runs only")
    if base.template != new.template and not ("on" in (base.template, new.template) and _on(base) and _on(new)):
        raise NotComparableError(f"not comparable: chat template {base.template} in BASE, {new.template} in NEW")
    others = {task.task: task for task in new.tasks}
    for old in base.tasks:
        _comparable_task(old, others[old.task])


def _on(run: Baseline) -> bool:
    return run.template != "off"


def _comparable_task(old: Task, new: Task) -> None:
    def differ(what: str, a: object, b: object) -> NotComparableError:
        return NotComparableError(f"not comparable: {old.task}: {what}: {a} in BASE, {b} in NEW")

    for what in ("version", "headline", "filter", "sources"):
        a, b = getattr(old, what), getattr(new, what)
        if a != b:
            raise differ(what, a, b)
    olds = dict(zip(keys(old.samples), old.samples, strict=True))
    news = dict(zip(keys(new.samples), new.samples, strict=True))
    if only := sorted(olds.keys() ^ news.keys()):
        where = "BASE" if only[0] in olds else "NEW"
        raise NotComparableError(
            f"not comparable: {old.task}: sample {only[0]} is in {where} only ({len(olds)} in BASE, {len(news)} in NEW)"
        )
    for key, sample in olds.items():
        if sample.prompt != news[key].prompt:
            raise differ(f"prompt of sample {key}", sample.prompt or "no digest", news[key].prompt or "no digest")
        if sample.cluster != news[key].cluster:
            raise differ(f"cluster of sample {key}", sample.cluster, news[key].cluster)


class _Pairs:
    """The samples of one task in both runs, with their drops in the metric's units."""

    def __init__(self, base: Task, new: Task, metric: str | None) -> None:
        self.task = base.task
        self.metric = _metric(base, new, metric)
        self.higher = GATED.get(self.metric, self.metric not in base.lower_is_better)
        self.keys = keys(base.samples)
        others = dict(zip(keys(new.samples), new.samples, strict=True))
        self.pairs = [(item, others[key]) for key, item in zip(self.keys, base.samples, strict=True)]
        self.clusters = [item.cluster for item in base.samples]
        self.values = [(a.values.get(self.metric), b.values.get(self.metric)) for a, b in self.pairs]
        same = all(a.answer == b.answer for a, b in self.pairs) and all(a == b for a, b in self.values)
        # Where no answer was kept, or all failed, there is nothing that could be identical.
        self.identical = same and any(item.answer != NO_ANSWER for item in base.samples)
        self._counted = self._count()
        self.drops = [(a - b) if self.higher else (b - a) for a, b in self._counted]
        seen = [value for pair in self._counted for value in pair]
        in_unit = self.metric != "gold_nll" and all(0 <= value <= 1 for value in seen)
        self.largest = 1.0 if in_unit else None

    def _count(self) -> list[tuple[float, float]]:
        """Values with an error as 0, the worst there is; where it is not, an error in one run cannot be compared."""
        zero_is_worst = self.higher and all(v is None or v >= 0 for pair in self.values for v in pair)
        for key, (a, b) in zip(self.keys, self.values, strict=True):
            if (a is None) != (b is None) and not zero_is_worst:
                side = "BASE" if a is None else "NEW"
                raise NotComparableError(
                    f"not comparable: {self.task}: sample {key} has no {self.metric} in {side} (an error?), "
                    "and no value would be its worst; gate on another --metric"
                )
        return [(a or 0.0, b or 0.0) for a, b in self.values]

    def judge(self, paired: Paired | None, p_holm: float, gate: float) -> TaskCheck:
        verdict, reason = _verdict(paired, p_holm, gate)
        lost = [
            Flip(key, a, b, drop)
            for key, (a, b), drop in zip(self.keys, self.values, self.drops, strict=True)
            if drop > 0
        ]
        n = len(self.drops)
        return TaskCheck(
            task=self.task,
            metric=self.metric,
            higher_is_better=self.higher,
            n=n,
            clusters=len(set(self.clusters)),
            base=math.fsum(a for a, _ in self._counted) / n,
            new=math.fsum(b for _, b in self._counted) / n,
            paired=paired,
            p_holm=p_holm,
            errors_base=sum(a is None for a, _ in self.values),
            errors_new=sum(b is None for _, b in self.values),
            verdict=verdict,
            reason=reason,
            flips=tuple(sorted(lost, key=lambda flip: -flip.drop)),
        )


def _verdict(paired: Paired | None, p_holm: float, gate: float) -> tuple[Verdict, str]:
    if paired is None:
        return "pass", "identical outputs"
    significant = p_holm < ALPHA and paired.drop > 0
    if paired.upper < gate:
        if significant:
            return "pass", f"a real drop (p {p_holm:.2g}), but below the gate: at most {paired.upper:.3g} < {gate:g}"
        return "pass", f"drop at most {paired.upper:.3g} < {gate:g}"
    if significant:
        return "regression", f"drop {paired.drop:.3g}, p {p_holm:.2g}"
    open_ = f"the drop may reach {paired.upper:.3g}, and p is {p_holm:.2g}"
    if paired.visible > gate:
        open_ += (
            f"; too little data: {paired.n} samples in {paired.clusters} clusters see a drop of {paired.visible:.3g}"
        )
    return "inconclusive", open_


def _metric(base: Task, new: Task, asked: str | None) -> str:
    """The metric to gate on, which both runs must have."""
    metric = asked or base.headline
    if metric is None:
        raise UserError(f"{base.task} has no metric per sample; nothing to gate on")
    for side, task in (("BASE", base), ("NEW", new)):
        # All samples of a run may have failed; that is a result, not a wrong name.
        failed = metric == base.headline and not any(item.values for item in task.samples)
        if not failed and not any(metric in item.values for item in task.samples):
            known = sorted({name for item in (*base.samples, *new.samples) for name in item.values})
            hint = " (run with diagnose=gold)" if metric in ("gold_nll", "gold_kept") else ""
            raise UserError(
                f"no {metric} in {side}'s samples of {base.task}{hint}; there is {', '.join(known) or 'nothing'}"
            )
    return metric
