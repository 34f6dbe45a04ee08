"""Intervals for scores whose samples share contexts.

Scores of questions about one context are correlated, so the unit of resampling is the context
(cluster), not the sample. With s_c the sum of scores and m_c the number of samples of cluster c, the
estimate is the ratio sum(s_c) / sum(m_c), which is the plain mean over samples, and a resample draws
K of the K clusters with replacement.
"""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0

# Bounds the memory of one block of resamples: 2M drawn clusters are some 40 MB of indices and values.
_BLOCK_DRAWS = 2_000_000


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

    lo, hi = _percentiles(pairs, level, resamples, seed)
    # Rounding must not place a bound on the wrong side of the mean.
    return mean, min(lo, mean), max(hi, mean)


def _percentiles(pairs: list[tuple[float, int]], level: float, resamples: int, seed: int) -> tuple[float, float]:
    """The interval's bounds from the (s_c, m_c) of every cluster."""
    import numpy as np

    totals, sizes = np.asarray(sorted(pairs), dtype=np.float64).T
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _BLOCK_DRAWS // len(pairs))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = rng.integers(len(pairs), size=(stop - start, len(pairs)), dtype=np.int32)
        means[start:stop] = totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    lo, hi = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def _wilson_unanimous(proportion: float, trials: int, level: float) -> tuple[float, float]:
    """Wilson score interval of a proportion of 0 or 1.

    Both general bounds (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) simplify: the near one to
    the proportion, the far one to z²/(n + z²) or its complement.
    """
    z_squared = NormalDist().inv_cdf((1 + level) / 2) ** 2
    reach = z_squared / (trials + z_squared)
    return (1 - reach, 1.0) if proportion else (0.0, reach)
