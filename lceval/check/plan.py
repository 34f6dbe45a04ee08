"""How many samples a gate needs, before anything is run.

For scores of 0 or 1, with a share psi of samples whose score changes (discordance), the paired difference of n
independent samples has variance (psi - delta^2) / n. A one-sided 5% test sees delta with 80% power from

    n = (z_0.95 + z_0.80)^2 (psi - delta^2) / delta^2

on. Whatever the discordance, K clusters without any change leave a drop of 1 - 0.05^(1/K) possible: a gate below that
cannot be passed, so it needs ln(0.05) / ln(1 - gate) clusters as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from lceval.check.baseline import Baseline
from lceval.check.paired import LEVEL
from lceval.errors import UserError

POWER = 0.80
_Z = NormalDist().inv_cdf(LEVEL) + NormalDist().inv_cdf(POWER)


@dataclass(frozen=True)
class Seen:
    """What BASE's samples of one task can see, in points of the score.

    independent: the drop seen if the questions on a context change one by one; together: if they change all at once.
    floor: the smallest gate that this many clusters can pass.
    """

    task: str
    n: int
    clusters: int
    independent: float
    together: float
    floor: float


@dataclass(frozen=True)
class Plan:
    """samples: independent ones, at least. clusters: at least, whatever their size. seen: by task, with a BASE."""

    gate: float
    discordance: float
    samples: int
    clusters: int
    seen: tuple[Seen, ...]


def plan(gate: float, discordance: float, base: Baseline | None = None) -> Plan:
    """The size that `gate` needs.

    Raises:
        UserError: a gate outside (0, 1), a discordance below the gate, or a gate that BASE cannot see even
            if all its samples are independent.
    """
    if not 0 < gate < 1:
        raise UserError(f"--gate {gate}: a plan is for scores of 0 or 1; expected a number between 0 and 1")
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
        if (least := max(task.independent, task.floor)) > gate:
            raise UserError(
                f"{task.task}: {task.n} samples in {task.clusters} clusters cannot see a drop of {gate:g} at a "
                f"discordance of {discordance:g}, only {least:.3g} or more; it takes {samples:,} samples in at least "
                f"{clusters:,} clusters, or a wider --gate"
            )
    return Plan(gate, discordance, samples, clusters, seen)


def visible(n: int, discordance: float) -> float:
    """The drop that n independent samples see with 80% power."""
    return _Z * math.sqrt(discordance / (n + _Z**2))


def _seen(task: str, n: int, clusters: int, discordance: float) -> Seen:
    floor = 1 - (1 - LEVEL) ** (1 / clusters)
    return Seen(task, n, clusters, visible(n, discordance), visible(clusters, discordance), floor)


def render(found: Plan) -> str:
    """The plan in sentences."""
    lines = [
        f"A drop of {found.gate:g} at a discordance of {found.discordance:g}, one-sided 5%, power {POWER:.0%}:",
        f"{found.samples:,} samples, if the questions on a context change one by one; as many contexts, if they change",
        f"together. At least {found.clusters:,} contexts in any case.",
    ]
    lines += [
        f"{s.task}: {s.n:,} samples in {s.clusters:,} clusters see {s.independent:.3g} (one by one) to "
        f"{s.together:.3g} (together)."
        for s in found.seen
    ]
    return "\n".join(lines)
