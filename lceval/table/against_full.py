"""A run beside the run of recipe `full` that differs in nothing else: the share of its score that is retained.

Over the samples that both answered to the same prompt, with sums s_c and f_c of a context's scores under the recipe and
under `full`, retention = sum(s_c) / sum(f_c). The interval resamples contexts, each with both of its sums, because what
is easy under one recipe is easy under the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lceval.results import Run, Sample, TaskResult
from lceval.stats import LEVEL, RESAMPLES, SEED, cluster_bootstrap

FULL = "full"
KEYS = ("retention", "retention_lo", "retention_hi", "nll_delta", "nll_delta_lo", "nll_delta_hi")
_BLOCK_DRAWS = 2_000_000


@dataclass(frozen=True)
class Retention:
    """share: 1 where nothing was lost, None where `full` scores 0; lo, hi: None where undefined; n: paired samples."""

    share: float | None
    lo: float | None
    hi: float | None
    n: int


def reference(of: tuple[Run, TaskResult], among: Sequence[tuple[Run, TaskResult]]) -> int | None:
    """Place in `among` of the first run under `full` with the model, adapter, task and context of `of`."""
    return next((i for i, other in enumerate(among) if other[0].recipe == FULL and _key(other) == _key(of)), None)


def pairs(samples: Sequence[Sample], full: Sequence[Sample]) -> Iterator[tuple[int, int]]:
    """Places of the samples with the same name and, where both say it, the same prompt; each is used once."""
    places: dict[str, list[int]] = {}
    for index, sample in enumerate(full):
        places.setdefault(sample.id, []).append(index)
    for index, sample in enumerate(samples):
        waiting = places.get(sample.id, [])
        for place in waiting:
            theirs = full[place].prompt_hash
            if sample.prompt_hash == theirs or not (sample.prompt_hash and theirs):
                waiting.remove(place)
                yield index, place
                break


def retention(task: TaskResult, full: TaskResult) -> Retention:
    """What `task` keeps of the score of `full`; errors count as 0, as in the table.

    Undefined for metrics where lower is better or scores may be negative.
    """
    both = [(task.samples[i], full.samples[j]) for i, j in pairs(task.samples, full.samples)]
    scores = [(s.cluster, s.score or 0.0, f.score or 0.0) for s, f in both]
    if not scores or not task.higher_is_better or min(min(s, f) for _, s, f in scores) < 0:
        return Retention(None, None, None, len(scores))
    members: dict[str, list[tuple[float, float]]] = {}
    for cluster, ours, theirs in scores:
        members.setdefault(cluster, []).append((ours, theirs))
    sums = sorted((math.fsum(s for s, _ in m), math.fsum(f for _, f in m)) for m in members.values())
    total = math.fsum(f for _, f in sums)
    if total == 0:
        return Retention(None, None, None, len(scores))
    share = math.fsum(s for s, _ in sums) / total
    lo, hi = _interval(sums)
    return Retention(share, None if lo is None else min(lo, share), None if hi is None else max(hi, share), len(scores))


def compared(task: TaskResult, full: TaskResult) -> dict[str, float | None]:
    """The keys of `KEYS`: what is kept of the score, and what is added to the NLL of the gold answer."""
    kept = retention(task, full)
    both = [(task.samples[i], full.samples[j]) for i, j in pairs(task.samples, full.samples)]
    both = [(s, f) for s, f in both if "gold_nll" in s.diagnosis and "gold_nll" in f.diagnosis]
    added = [s.diagnosis["gold_nll"] - f.diagnosis["gold_nll"] for s, f in both]
    bounds = cluster_bootstrap(added, [s.cluster for s, _ in both])
    values = (kept.share, kept.lo, kept.hi, *(x if math.isfinite(x) else None for x in bounds))
    return dict(zip(KEYS, values, strict=True))


def _interval(sums: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Percentile bootstrap of sum(s) / sum(f) over contexts; None where resamples divide by 0 or do not differ."""
    import numpy as np

    ours, theirs = np.asarray(sums, dtype=np.float64).T
    rng = np.random.default_rng(SEED)
    shares = np.empty(RESAMPLES)
    block = max(1, _BLOCK_DRAWS // len(sums))
    for start in range(0, RESAMPLES, block):
        stop = min(start + block, RESAMPLES)
        drawn = rng.integers(len(sums), size=(stop - start, len(sums)), dtype=np.int32)
        below = theirs[drawn].sum(axis=1)
        # A resample in which `full` scores nothing says nothing about the share.
        shares[start:stop] = np.divide(
            ours[drawn].sum(axis=1), below, out=np.full(stop - start, np.nan), where=below > 0
        )
    defined = shares[~np.isnan(shares)]
    if len(defined) < LEVEL * RESAMPLES or np.ptp(defined) == 0:
        return None, None
    lo, hi = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lo), float(hi)


def _key(of: tuple[Run, TaskResult]) -> tuple[object, ...]:
    run, task = of
    return run.model, run.pretrained, run.peft, task.task, task.version, task.headline, task.filters[:1], task.context
