"""Test and confidence bounds for paired differences of samples that share contexts.

A sample's drop d_i is the loss of NEW against BASE, so positive is worse. Samples of one context (cluster) are
correlated, so the unit is the cluster c of K, with S_c the sum of its drops and m_c its samples; the estimate is the
ratio sum(S_c) / sum(m_c), the plain mean over samples.

Test: McNemar's exact test if every cluster has one sample and every score is 0 or 1, else a sign-flip test over
clusters (under the null, BASE and NEW are exchangeable within a cluster).

Bound: with weights w ~ Dirichlet(1, ..., 1) over the K clusters *and one unseen cluster with the largest possible
loss*, the bound is the 95% quantile of sum(w_c S_c) / sum(w_c m_c) (Gaffke 2005). For drops of 0 or 1 in clusters of
one it is exactly Clopper-Pearson's bound, so K clusters without a change give 1 - 0.05^(1/K), never 0. A percentile or
t bound would be 0 if the one failing context in twenty was not sampled. For unbounded losses (an NLL), the unseen
cluster lies half the observed range beyond the worst one, and the bound is never below Student's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
DRAWS = 20_000
PERMUTATIONS = 9_999
SEED = 0
# Up to this many changed clusters all 2^k sign patterns are enumerated, above it PERMUTATIONS random ones.
EXACT_CLUSTERS = 14
# Minimum clusters for a bound of an unbounded loss: the range of fewer predicts the next one too poorly.
MIN_CLUSTERS = 6
# Normal quantiles that convert the width of a 95% bound into the drop detected with 80% power.
_Z_LEVEL, _Z_POWER = 1.6448536269514722, 0.8416212335729143
_BLOCK = 2_000_000

Method = Literal["mcnemar", "sign-flip exact", "sign-flip"]


@dataclass(frozen=True)
class Paired:
    """Result of a comparison of n paired samples.

    drop: mean over samples, positive is worse.
    lower, upper: one-sided 95% bounds of the drop; infinite if the data give no bound.
    p: one-sided p-value of the drop.
    changed: number of samples whose value differs.
    visible: the drop (or the gate, if nothing is lost) detected with 80% power by a comparison of this size.
    """

    n: int
    clusters: int
    drop: float
    lower: float
    upper: float
    p: float
    method: Method
    changed: int
    visible: float


def compare(
    drops: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    largest: float | None,
    draws: int = DRAWS,
    permutations: int = PERMUTATIONS,
) -> Paired:
    """Test and bound the mean drop.

    Args:
        drops: n finite numbers.
        clusters: n labels, the context of each sample.
        largest: maximum loss or gain of a sample (1 for a score in [0, 1]); None if unbounded. Then there is no bound
            below MIN_CLUSTERS clusters, nor if all clusters have the same mean.
        draws: number of draws for the bound. permutations: of the sign-flip test, if not enumerated.

    Raises:
        ValueError: no drops, different lengths, or a drop that is not finite.
    """
    import numpy as np

    if not drops or len(drops) != len(clusters):
        raise ValueError(f"{len(drops)} drops and {len(clusters)} cluster labels")
    if not all(math.isfinite(drop) for drop in drops):
        raise ValueError("drops must be finite")
    members: dict[Hashable, list[float]] = {}
    for drop, cluster in zip(drops, clusters, strict=True):
        members.setdefault(cluster, []).append(drop)
    # Sorted, so that sample order and cluster names do not matter.
    pairs = sorted((math.fsum(values), len(values)) for values in members.values())
    sums, sizes = np.asarray(pairs, dtype=np.float64).T
    lost, gained = sum(drop > 0 for drop in drops), sum(drop < 0 for drop in drops)
    p: float
    method: Method
    if len(members) == len(drops) and all(drop in (-1, 0, 1) for drop in drops):
        p, method = mcnemar(lost, gained), "mcnemar"
    else:
        p, method = sign_flip(sums, permutations=permutations)
    upper = bound(sums, sizes, largest=largest, draws=draws)
    mean = math.fsum(drops) / len(drops)
    return Paired(
        n=len(drops),
        clusters=len(members),
        drop=mean,
        lower=-bound(-sums[::-1], sizes[::-1], largest=largest, draws=draws),
        upper=upper,
        p=p,
        method=method,
        changed=lost + gained,
        visible=(upper - mean) * (1 + _Z_POWER / _Z_LEVEL),
    )


def mcnemar(lost: int, gained: int) -> float:
    """P(at least `lost` of lost + gained discordant pairs are losses) with equal probabilities: exact, one-sided."""
    from scipy.stats import binom

    return float(binom.sf(lost - 1, lost + gained, 0.5))


def sign_flip(sums: NDArray[Any], *, permutations: int = PERMUTATIONS) -> tuple[float, Method]:
    """P(sum of cluster drops with random signs >= the observed sum), one-sided.

    sums: [K] float64, the sum of drops of each cluster. Unchanged clusters carry no information.
    """
    import numpy as np

    moved = sums[sums != 0]
    # With a tolerance, because patterns that tie with the observed one must count.
    observed = math.fsum(moved) - 1e-9 * float(np.abs(moved).sum())
    if len(moved) <= EXACT_CLUSTERS:
        totals = np.zeros(1)
        for value in moved:
            totals = np.concatenate([totals + value, totals - value])
        return float(np.mean(totals >= observed)), "sign-flip exact"
    rng = np.random.default_rng(SEED)
    hits, block = 0, max(1, _BLOCK // len(moved))
    for start in range(0, permutations, block):
        rows = min(block, permutations - start)
        signs = rng.integers(0, 2, size=(rows, len(moved)), dtype=np.int8) * 2.0 - 1.0
        hits += int(np.count_nonzero(signs @ moved >= observed))
    return (1 + hits) / (1 + permutations), "sign-flip"


def bound(sums: NDArray[Any], sizes: NDArray[Any], *, largest: float | None, draws: int = DRAWS) -> float:
    """One-sided upper bound of the mean drop; infinite if there is none.

    sums, sizes: [K] float64, drops and samples of each cluster. largest: as in `compare`.
    """
    import numpy as np

    student = -math.inf
    if largest is None:
        means = sums / sizes
        if len(sums) < MIN_CLUSTERS or np.ptp(means) == 0:
            return math.inf
        largest = float(means.max() + np.ptp(means) / 2)
        student = _student(sums, sizes)
    # Identical clusters share one gamma variate: the sum of their exponentials.
    kinds, counts = np.unique(np.column_stack([sums, sizes]), axis=0, return_counts=True)
    kinds = np.vstack([kinds, [largest * sizes.max(), sizes.max()]])
    shapes = np.append(counts, 1).astype(np.float64)
    rng = np.random.default_rng(SEED)
    ratios = np.empty(draws)
    block = max(1, _BLOCK // len(shapes))
    for start in range(0, draws, block):
        stop = min(start + block, draws)
        weighted = rng.standard_gamma(shapes, size=(stop - start, len(shapes))) @ kinds
        ratios[start:stop] = weighted[:, 0] / weighted[:, 1]
    return max(student, float(np.quantile(ratios, LEVEL)))


def _student(sums: NDArray[Any], sizes: NDArray[Any]) -> float:
    """Ratio estimate plus t quantile (K - 1 degrees) times its linearised, cluster-robust standard error."""
    from scipy.stats import t

    k, total = len(sums), float(sizes.sum())
    mean = float(sums.sum()) / total
    error = math.sqrt(k / (k - 1) * float(((sums - mean * sizes) ** 2).sum())) / total
    return mean + float(t.ppf(LEVEL, k - 1)) * error


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values, in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
