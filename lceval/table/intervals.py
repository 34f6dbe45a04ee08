"""Means over tasks, and a run beside another: estimates whose intervals resample the contexts of every task.

With S_c and F_c the sums of a context's scores in a run and in the one it is compared with, and m_c its samples, task
t has the means s_t = sum(S_c) / sum(m_c) and f_t = sum(F_c) / sum(m_c). For weights w_t that add up to 1 the estimates
are sum(w_t s_t), its difference to sum(w_t f_t), and the ratio of the two. A resample draws, for each task by itself
(stratified), K of its K contexts with both of their sums: what is easy for one run is easy for the other.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lceval.stats import LEVEL, RESAMPLES, SEED

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bounds a block of resamples, and what is kept of one to serve all rows with as many contexts (a byte a number).
_BLOCK_DRAWS = 2_000_000
_KEPT_DRAWS = 40_000_000
_PRODUCT_NUMBERS = 128_000
# Sums round differently in every resample: a spread below this share of the estimate is none.
_NO_SPREAD = 1e-9


class Estimate(NamedTuple):
    """value: None where undefined; lo, hi: None where nothing can be known about it."""

    value: float | None
    lo: float | None = None
    hi: float | None = None


@dataclass(frozen=True)
class Stratum:
    """One task: n finite scores of a run, the same samples' in the run it is compared with, and their contexts.

    theirs: empty where there is nothing to compare with.
    weight: of the task's mean; those of all strata add up to 1.
    """

    ours: Sequence[float]
    theirs: Sequence[float]
    clusters: Sequence[Hashable]
    weight: float = 1.0


def mean(strata: Sequence[Stratum]) -> Estimate:
    """The weighted mean of the tasks' means."""
    draws = _draws(strata)
    value = math.fsum(s.weight * math.fsum(s.ours) / len(s.ours) for s in strata)
    return _bounded(value, None if draws is None else draws[:, 0])


def difference(strata: Sequence[Stratum]) -> Estimate:
    """Ours minus theirs, paired."""
    return _difference(strata, _draws(strata))


def against(strata: Sequence[Stratum]) -> tuple[Estimate, Estimate]:
    """Ours divided by theirs, and ours minus theirs, from the same resamples.

    The ratio is undefined where a score is negative or theirs are 0. A resample in which theirs are 0 and ours are not
    counts as larger than any; one in which both are 0 says nothing, and with more than 5% of those there is no
    interval.
    """
    draws = _draws(strata)
    return _ratio(strata, draws), _difference(strata, draws)


def _difference(strata: Sequence[Stratum], draws: NDArray[Any] | None) -> Estimate:
    value = math.fsum(
        s.weight * math.fsum(a - b for a, b in zip(s.ours, s.theirs, strict=True)) / len(s.ours) for s in strata
    )
    return _bounded(value, None if draws is None else draws[:, 0] - draws[:, 1])


def _ratio(strata: Sequence[Stratum], draws: NDArray[Any] | None) -> Estimate:
    import numpy as np

    below = math.fsum(s.weight * math.fsum(s.theirs) / len(s.theirs) for s in strata)
    if below == 0 or any(min(*s.ours, *s.theirs) < 0 for s in strata):
        return Estimate(None)
    value = math.fsum(s.weight * math.fsum(s.ours) / len(s.ours) for s in strata) / below
    if draws is None:
        return Estimate(value)
    ours, theirs = draws.T
    shares = np.full(len(draws), np.inf)
    np.divide(ours, theirs, out=shares, where=theirs > 0)
    shares = shares[(theirs > 0) | (ours > 0)]
    return _bounded(value, shares if len(shares) >= LEVEL * len(draws) else None)


def _bounded(value: float, draws: NDArray[Any] | None) -> Estimate:
    """The percentile interval; none where the resamples do not differ or its upper end has no limit."""
    import numpy as np

    if draws is None:
        return Estimate(value)
    # "higher": an interpolation beside infinity is no number.
    lo = float(np.quantile(draws, (1 - LEVEL) / 2, method="lower"))
    hi = float(np.quantile(draws, (1 + LEVEL) / 2, method="higher"))
    if not math.isfinite(hi) or float(draws.max() - draws.min()) <= _NO_SPREAD * max(1.0, abs(value)):
        return Estimate(value)
    # A bound that equals the estimate up to rounding must not land on its wrong side.
    return Estimate(value, min(lo, value), max(hi, value))


def _draws(strata: Sequence[Stratum]) -> NDArray[Any] | None:
    """[RESAMPLES, 2] float64, resampled means of ours and theirs; None where a task has a single context."""
    import numpy as np

    total = np.zeros((RESAMPLES, 2))
    for place, stratum in enumerate(strata):
        members: dict[Hashable, list[int]] = {}
        for index, cluster in enumerate(stratum.clusters):
            members.setdefault(cluster, []).append(index)
        if len(members) < 2:
            return None
        # Sorted, so that the order of samples and the names of contexts change nothing.
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
            # Tasks with as many contexts share their draws; in another order these are independent of each other.
            means = means[np.random.default_rng([SEED, place]).permutation(RESAMPLES)]
        total += stratum.weight * means
    return total


def _resampled_means(columns: NDArray[Any]) -> NDArray[Any]:
    """[K, 3], sums of ours and theirs and the samples of each context -> [RESAMPLES, 2]."""
    sizes = columns[:, 2]
    if (sizes == sizes[0]).all():
        # The usual case: every resample has as many samples, and a product with fewer columns takes less time.
        means: NDArray[Any] = _resample(columns[:, :2]) / sizes.sum()
    else:
        sums = _resample(columns)
        means = sums[:, :2] / sums[:, 2:]
    return means


def _resample(columns: NDArray[Any]) -> NDArray[Any]:
    """Sums of K rows drawn with replacement: [K, p] -> [RESAMPLES, p]."""
    import numpy as np

    clusters = len(columns)
    blocks = [_kept_counts(clusters)] if clusters * RESAMPLES <= _KEPT_DRAWS else _counts(clusters)
    return np.concatenate([_product(block, columns) for block in blocks])


def _product(counts: NDArray[Any], columns: NDArray[Any]) -> NDArray[Any]:
    """counts @ columns, a few rows at a time: a block that stays in the processor's cache takes a ninth of the time."""
    import numpy as np

    rows = max(1, _PRODUCT_NUMBERS // len(columns))
    block, sums = np.empty((rows, len(columns))), np.empty((len(counts), columns.shape[1]))
    for start in range(0, len(counts), rows):
        part = counts[start : start + rows]
        np.copyto(block[: len(part)], part)
        np.matmul(block[: len(part)], columns, out=sums[start : start + rows])
    return sums


def _counts(clusters: int) -> Iterator[NDArray[Any]]:
    """Blocks of [resamples, K] uint8: how often each context was drawn."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    rows = max(1, _BLOCK_DRAWS // clusters)
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        drawn = rng.integers(clusters, size=(size, clusters), dtype=np.int64)
        drawn += np.arange(size)[:, None] * clusters
        yield np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters).astype(np.uint8)


@lru_cache(maxsize=4)
def _kept_counts(clusters: int) -> NDArray[Any]:
    import numpy as np

    return np.concatenate(list(_counts(clusters)))
