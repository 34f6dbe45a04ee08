"""Sample size planning for a gate.

For scores of 0 or 1, with a share psi of samples whose score changes (discordance), the paired difference of n
independent samples has variance (psi - delta^2) / n. A one-sided 5% test detects delta with 80% power for

    n >= (z_0.95 + z_0.80)^2 (psi - delta^2) / delta^2.

Regardless of the discordance, K unchanged clusters leave an upper bound of 1 - 0.05^(1/K): no smaller gate can be
passed, so at least ln(0.05) / ln(1 - gate) clusters are required.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from lceval.analysis.check.baseline import Baseline
from lceval.core.errors import UserError
from lceval.stats.paired import LEVEL

POWER = 0.80
SMALLEST = 1e-6
"""Smallest gate with a plan: it takes a million clusters."""
_Z = NormalDist().inv_cdf(LEVEL) + NormalDist().inv_cdf(POWER)


@dataclass(frozen=True)
class Detectable:
    """Smallest detectable drops with BASE's samples of one task, in units of the score.

    independent: if the questions on a context change independently; together: if they change together.
    floor: the smallest gate that this many clusters can pass.
    """

    task: str
    n: int
    clusters: int
    independent: float
    together: float
    floor: float


@dataclass(frozen=True)
class SampleSize:
    """samples: minimum independent samples. clusters: minimum clusters of any size. seen: by task, with a BASE."""

    gate: float
    discordance: float
    samples: int
    clusters: int
    seen: tuple[Detectable, ...]


def plan(gate: float, discordance: float, base: Baseline | None = None) -> SampleSize:
    """The sample size required for `gate`.

    Raises:
        UserError: a gate outside (0, 1), a discordance below the gate, or a gate below the drop that BASE detects
            with independent samples.
    """
    if not SMALLEST <= gate < 1:
        raise UserError(
            f"--gate {gate}: a plan assumes scores of 0 or 1; expected a number between 0 and 1, at least {SMALLEST:g}"
        )
    if not gate <= discordance <= 1:
        raise UserError(
            f"--discordance {discordance}: the share of samples whose score changes; expected from --gate {gate} to 1"
        )
    clusters = math.ceil(math.log(1 - LEVEL) / math.log(1 - gate))
    samples = max(clusters, math.ceil(_Z**2 * (discordance - gate**2) / gate**2))
    seen = (
        tuple(_seen(t.task, len(t.samples), len({s.cluster for s in t.samples}), discordance) for t in base.tasks)
        if base
        else ()
    )
    for task in seen:
        if (smallest := max(task.independent, task.floor)) > gate:
            raise UserError(
                f"{task.task}: {task.n} samples in {task.clusters} clusters cannot detect a drop of {gate:g} at "
                f"discordance {discordance:g}, only {smallest:.3g} or more; use {samples:,} samples in at least "
                f"{clusters:,} clusters, or a larger --gate"
            )
    return SampleSize(gate, discordance, samples, clusters, seen)


def visible(n: int, discordance: float) -> float:
    """The drop that n independent samples detect with 80% power."""
    return _Z * math.sqrt(discordance / (n + _Z**2))


def _seen(task: str, n: int, clusters: int, discordance: float) -> Detectable:
    floor = 1 - (1 - LEVEL) ** (1 / clusters)
    return Detectable(task, n, clusters, visible(n, discordance), visible(clusters, discordance), floor)


def render(plan: SampleSize) -> str:
    """The plan as text."""
    lines = [
        f"To detect a drop of {plan.gate:g} at discordance {plan.discordance:g} (one-sided 5%, power {POWER:.0%}):",
        f"{plan.samples:,} samples if the questions on a context change independently, {plan.samples:,} contexts if",
        f"they change together; at least {plan.clusters:,} contexts in any case.",
    ]
    lines += [
        f"{s.task}: {s.n:,} samples in {s.clusters:,} clusters detect {s.independent:.3g} (independent) to "
        f"{s.together:.3g} (together)."
        for s in plan.seen
    ]
    return "\n".join(lines)
