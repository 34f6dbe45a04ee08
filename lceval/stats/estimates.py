"""The one statistic of scores whose samples share contexts: means and paired comparisons with intervals.

Scores of questions about one context are correlated, so the unit of resampling is the context (cluster), not the
sample. With S_c and F_c the sums of a context's scores in a run and in its reference run, and m_c its samples, task
t has the means s_t = sum(S_c) / sum(m_c) and f_t = sum(F_c) / sum(m_c). For weights w_t that add up to 1 the estimates
are sum(w_t s_t), its difference to sum(w_t f_t), and the ratio of the two. A resample draws, for each task separately
(stratified), K of its K contexts with both of their sums, because the scores of the two runs are correlated.

There is no interval where the bootstrap is uninformative: with a single context, and where all resamples are equal.
Means of scores that are all 0 or all 1 get the Wilson score interval of their contexts instead.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0

# Bounds of a block of resamples, and of the counts cached for all rows with equally many contexts (1 byte each).
_BLOCK_DRAWS = 2_000_000
_CACHED_DRAWS = 40_000_000
# Sums round differently in every resample: a smaller relative spread counts as zero.
_NO_SPREAD = 1e-9


class Estimate(NamedTuple):
    """value: None where undefined; lo, hi: None without an interval."""

    value: float | None
    lo: float | None = None
    hi: float | None = None

    @property
    def interval(self) -> list[float] | None:
        """[lo, hi], or None."""
        return None if self.lo is None or self.hi is None else [self.lo, self.hi]


@dataclass(frozen=True)
class Stratum:
    """One task: n finite scores of a run, those of the same samples in the reference run, and their contexts.

    theirs: empty without a reference run.
    weight: weight of the task's mean; the weights of all strata sum to 1.
    """

    ours: Sequence[float]
    theirs: Sequence[float]
    clusters: Sequence[Hashable]
    weight: float = 1.0


def cluster_bootstrap(
    scores: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float, float, float]:
    """Mean score with the percentile bootstrap interval over clusters.

    The result is bitwise independent of sample order and cluster names: sums are exactly rounded, and
    clusters are drawn in the order of their (s_c, m_c).

    The bounds are NaN where the bootstrap is uninformative: with fewer than two clusters, and when every
    cluster has the same mean (all resamples are equal, an interval of width zero). Exception: scores that
    are all 0 or all 1 get the Wilson score interval of K successes (or none) in K trials, K the number of
    clusters; counting clusters instead of samples is conservative, since the samples of a cluster may be
    copies of one another.

    Args:
        scores: n finite scores.
        clusters: n labels, the context each score belongs to.
        level: Coverage, in (0, 1).
        resamples: Bootstrap resamples.
        seed: Seed of the resampling; equal input and seed give the same interval.

    Returns:
        (mean, lo, hi); NaN where undefined, all three without scores.

    Raises:
        ValueError: Different lengths, a score that is not finite, a level outside (0, 1), no resamples.
    """
    if len(scores) != len(clusters):
        raise ValueError(f"{len(scores)} scores but {len(clusters)} cluster labels")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level} must lie in (0, 1) and resamples {resamples} be at least 1")
    if not all(math.isfinite(score) for score in scores):
        raise ValueError("scores must be finite; score an error explicitly (as 0)")
    if not scores:
        return math.nan, math.nan, math.nan

    mean = math.fsum(scores) / len(scores)
    members: dict[Hashable, list[float]] = {}
    for score, cluster in zip(scores, clusters, strict=True):
        members.setdefault(cluster, []).append(score)
    if len(members) < 2:
        return mean, math.nan, math.nan
    if all(score == 0 for score in scores) or all(score == 1 for score in scores):
        return (mean, *_wilson_unanimous(mean, len(members), level))
    pairs = [(math.fsum(values), len(values)) for values in members.values()]
    if all(math.isclose(total / size, mean, rel_tol=1e-12, abs_tol=1e-15) for total, size in pairs):
        return mean, math.nan, math.nan

    import numpy as np

    columns = np.asarray(sorted(pairs), dtype=np.float64)
    sums = np.concatenate([block @ columns for block in _counts(len(pairs), resamples, seed, np.int32)])
    lo, hi = map(float, np.quantile(sums[:, 0] / sums[:, 1], [(1 - level) / 2, (1 + level) / 2]))
    # Rounding must not place a bound on the wrong side of the mean.
    return mean, min(lo, mean), max(hi, mean)


def mean(strata: Sequence[Stratum]) -> Estimate:
    """The weighted mean of the tasks' means; of one task, its `cluster_bootstrap`."""
    if len(strata) == 1:
        return mean_of(strata[0].ours, strata[0].clusters)
    draws = _draws(strata)
    value = math.fsum(s.weight * math.fsum(s.ours) / len(s.ours) for s in strata)
    if draws is not None and {score for s in strata for score in s.ours} in ({0}, {1}):
        # Kish's effective number of contexts.
        effective = 1 / math.fsum(s.weight**2 / len({*s.clusters}) for s in strata)
        return Estimate(value, *_wilson_unanimous(round(value), effective, LEVEL))
    return _bounded(value, None if draws is None else draws[:, 0])


def mean_of(scores: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """The mean of scores, by `cluster_bootstrap`."""
    return Estimate(*(value if math.isfinite(value) else None for value in cluster_bootstrap(scores, clusters)))


def difference(strata: Sequence[Stratum]) -> Estimate:
    """Ours minus theirs, paired."""
    return _difference(strata, _draws(strata))


def against(strata: Sequence[Stratum]) -> tuple[Estimate, Estimate]:
    """Ours divided by theirs, and ours minus theirs, from the same resamples.

    The ratio is undefined if a score is negative or the mean of theirs is 0. A resample with only theirs at 0 counts
    as infinite; one with both at 0 is dropped, and with more than 5% of those there is no interval.
    """
    draws = _draws(strata)
    return _ratio(strata, draws), _difference(strata, draws)


def recovery(strata: Sequence[Stratum]) -> Estimate:
    """The mean of ours divided by that of theirs; either may be negative, and theirs must be above 0 on average.

    Resamples in which the mean of theirs is not above 0 are dropped; with more than 5% of those there is no interval.
    """
    value = math.fsum(s.weight * math.fsum(s.ours) / len(s.ours) for s in strata)
    possible = math.fsum(s.weight * math.fsum(s.theirs) / len(s.theirs) for s in strata)
    if possible <= 0:
        return Estimate(None)
    draws = _draws(strata)
    if draws is None:
        return Estimate(value / possible)
    ours, theirs = draws[draws[:, 1] > 0].T
    return _bounded(value / possible, ours / theirs if len(ours) >= LEVEL * len(draws) else None)


def _difference(strata: Sequence[Stratum], draws: NDArray[Any] | None) -> Estimate:
    value = math.fsum(
        s.weight * math.fsum(a - b for a, b in zip(s.ours, s.theirs, strict=True)) / len(s.ours) for s in strata
    )
    return _bounded(value, None if draws is None else draws[:, 0] - draws[:, 1])


def _ratio(strata: Sequence[Stratum], draws: NDArray[Any] | None) -> Estimate:
    import numpy as np

    reference = math.fsum(s.weight * math.fsum(s.theirs) / len(s.theirs) for s in strata)
    if reference == 0 or any(min(*s.ours, *s.theirs) < 0 for s in strata):
        return Estimate(None)
    value = math.fsum(s.weight * math.fsum(s.ours) / len(s.ours) for s in strata) / reference
    if not math.isfinite(value):
        return Estimate(None)
    if draws is None:
        return Estimate(value)
    ours, theirs = draws.T
    shares = np.full(len(draws), np.inf)
    np.divide(ours, theirs, out=shares, where=theirs > 0)
    shares = shares[(theirs > 0) | (ours > 0)]
    return _bounded(value, shares if len(shares) >= LEVEL * len(draws) else None)


def _bounded(value: float, draws: NDArray[Any] | None) -> Estimate:
    """The percentile interval; none if the resamples are identical or the upper bound is infinite."""
    import numpy as np

    if draws is None:
        return Estimate(value)
    # Without interpolation, which is NaN next to infinity.
    lo = float(np.quantile(draws, (1 - LEVEL) / 2, method="lower"))
    hi = float(np.quantile(draws, (1 + LEVEL) / 2, method="higher"))
    if not math.isfinite(hi) or float(draws.max() - draws.min()) <= _NO_SPREAD * max(1.0, abs(value)):
        return Estimate(value)
    # Rounding must not place a bound on the wrong side of the estimate.
    return Estimate(value, min(lo, value), max(hi, value))


def _wilson_unanimous(proportion: float, trials: float, level: float) -> tuple[float, float]:
    """Wilson score interval of a proportion of 0 or 1.

    Both general bounds (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) simplify: the near one to
    the proportion, the far one to z²/(n + z²) or its complement.
    """
    z_squared = NormalDist().inv_cdf((1 + level) / 2) ** 2
    reach = z_squared / (trials + z_squared)
    return (1 - reach, 1.0) if proportion else (0.0, reach)


def _draws(strata: Sequence[Stratum]) -> NDArray[Any] | None:
    """[RESAMPLES, 2] float64, resampled means of ours and theirs; None if a task has a single context."""
    import numpy as np

    total = np.zeros((RESAMPLES, 2))
    for place, stratum in enumerate(strata):
        members: dict[Hashable, list[int]] = {}
        for index, cluster in enumerate(stratum.clusters):
            members.setdefault(cluster, []).append(index)
        if len(members) < 2:
            return None
        # Sorted, so that sample order and context names do not matter.
        columns = sorted(
            (
                math.fsum(stratum.ours[i] for i in inside),
                math.fsum(stratum.theirs[i] for i in inside) if stratum.theirs else 0.0,
                float(len(inside)),
            )
            for inside in members.values()
        )
        means = _resampled_means(np.asarray(columns))
        if place:
            # Tasks with equally many contexts share draws; permuting them makes the tasks independent.
            means = means[np.random.default_rng([SEED, place]).permutation(RESAMPLES)]
        total += stratum.weight * means
    return total


def _resampled_means(columns: NDArray[Any]) -> NDArray[Any]:
    """[K, 3], per context the sums of ours and theirs and the sample count -> [RESAMPLES, 2]."""
    sizes = columns[:, 2]
    if (sizes == sizes[0]).all():
        # The usual case: every resample has the same number of samples, and one column less is faster.
        means: NDArray[Any] = _resample(columns[:, :2]) / sizes.sum()
    else:
        sums = _resample(columns)
        means = sums[:, :2] / sums[:, 2:]
    return means


def _resample(columns: NDArray[Any]) -> NDArray[Any]:
    """Sums of K rows drawn with replacement: [K, p] -> [RESAMPLES, p]."""
    import numpy as np

    clusters = len(columns)
    blocks = _cached_counts(clusters) if clusters * RESAMPLES <= _CACHED_DRAWS else _counts(clusters)
    return np.concatenate([block @ columns for block in blocks])


def _counts(
    clusters: int, resamples: int = RESAMPLES, seed: int = SEED, dtype: Any = "int64"
) -> Iterator[NDArray[Any]]:
    """Blocks of [resamples, K] uint8: the number of draws of each context; `dtype` of the drawn indices."""
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK_DRAWS // clusters)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = rng.integers(clusters, size=(size, clusters), dtype=dtype).astype(np.int64)
        drawn += np.arange(size)[:, None] * clusters
        yield np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters).astype(np.uint8)


@lru_cache(maxsize=4)
def _cached_counts(clusters: int) -> tuple[NDArray[Any], ...]:
    return tuple(_counts(clusters))
