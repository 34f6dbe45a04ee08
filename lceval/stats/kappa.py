"""Agreement of two label lists: accuracy, Cohen's kappa with interval, confusion matrix, and self-consistency."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

from lceval.stats.estimates import LEVEL, SEED

RESAMPLES = 2_000


def kappa(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> float:
    """Cohen's kappa, (p_o - p_e) / (1 - p_e); nan for p_e = 1 or without labels."""
    n = len(ours)
    if not n:
        return math.nan
    observed = sum(one == other for one, other in zip(ours, theirs, strict=True)) / n
    first, second = Counter(ours), Counter(theirs)
    expected = sum(first[label] * second[label] for label in first) / n**2
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def kappa_interval(ours: Sequence[str], theirs: Sequence[str], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of kappa over clusters.

    It is nan where the bootstrap is uninformative: with fewer than two clusters, and if one side has a single label, so
    that kappa is 0 in every resample. Resamples with undefined kappa are dropped.
    """
    import numpy as np

    names = list(dict.fromkeys(clusters))
    if len(names) < 2 or len({*ours}) < 2 or len({*theirs}) < 2:
        return math.nan, math.nan
    labels = sorted({*ours, *theirs})
    tables = np.zeros((len(names), len(labels), len(labels)))
    for one, other, cluster in zip(ours, theirs, clusters, strict=True):
        tables[names.index(cluster), labels.index(one), labels.index(other)] += 1
    rng = np.random.default_rng(SEED)
    drawn = np.stack([tables[rng.integers(len(names), size=len(names))].sum(0) for _ in range(RESAMPLES)])
    totals = drawn.sum((1, 2))
    observed = np.trace(drawn, axis1=1, axis2=2) / totals
    expected = (drawn.sum(1) * drawn.sum(2)).sum(1) / totals**2
    defined = expected < 1
    if not defined.any():
        return math.nan, math.nan
    values = (observed[defined] - expected[defined]) / (1 - expected[defined])
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def agreement(
    judged: Sequence[str | None], human: Sequence[str], clusters: Sequence[Hashable], labels: Sequence[str]
) -> dict[str, Any]:
    """Agreement of a judge with human labels. Unjudged rows (None) are counted, but enter only `coverage`.

    `confusion[human][judge]` counts rows. `majority` is the accuracy of the most frequent human label.
    """
    known = [(one, other, c) for one, other, c in zip(judged, human, clusters, strict=True) if one is not None]
    ours, theirs = [one for one, _, _ in known], [other for _, other, _ in known]
    low, high = kappa_interval(ours, theirs, [c for _, _, c in known])
    right = [one == other for one, other, _ in known]
    return {
        "n": len(human),
        "judged": len(known),
        "unjudged": len(human) - len(known),
        "coverage": len(known) / len(human) if human else None,
        "accuracy": _defined(sum(right) / len(right) if right else math.nan),
        "majority": _defined(max(Counter(theirs).values()) / len(theirs) if theirs else math.nan),
        "kappa": _defined(kappa(ours, theirs)),
        "kappa_interval": None if math.isnan(low) else [low, high],
        "clusters": len({c for _, _, c in known}),
        "confusion": {
            one: {other: sum(pair == (other, one) for pair in zip(ours, theirs, strict=True)) for other in labels}
            for one in labels
        },
    }


def consistency(repeats: Sequence[Sequence[str | None]]) -> dict[str, Any] | None:
    """Self-consistency over repeated verdicts; cases judged only once are ignored.

    Args:
        repeats: the labels of all cases, one list per repeat.
    """
    per_case = [[label for label in labels if label is not None] for labels in zip(*repeats, strict=True)]
    several = [labels for labels in per_case if len(labels) > 1]
    if len(repeats) < 2 or not several:
        return None
    pairs = [one == other for labels in several for one, other in combinations(labels, 2)]
    return {
        "repeats": len(repeats),
        "cases": len(several),
        "unanimous": sum(len(set(labels)) == 1 for labels in several) / len(several),
        "pairs_agree": sum(pairs) / len(pairs),
    }


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
