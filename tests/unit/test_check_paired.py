"""The statistics of the gate: compared with other implementations, and error rates by simulation.

A simulation draws 1,000 pairs of runs. With a true rate of 5% the expected count is 50 with a standard deviation of
6.9. `NOISE` is its 99.9% quantile (73); a rate of 9% exceeds it with probability 97%.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, permutation_test
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from lceval.analysis.check.sample_size import plan
from lceval.stats.paired import EXACT_CLUSTERS, Paired, bound, compare, holm, mcnemar, sign_flip

SIMULATIONS = 1_000
NOISE = int(binom.ppf(0.999, SIMULATIONS, 0.05))
Array = np.ndarray[Any, Any]


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 0), (7, 2), (30, 18), (2, 9)])
def test_mcnemar_is_exact(lost: int, gained: int) -> None:
    two_sided = their_mcnemar([[0, lost], [gained, 0]], exact=True).pvalue
    ours = mcnemar(lost, gained)
    assert ours == pytest.approx(binom.sf(lost - 1, lost + gained, 0.5), abs=1e-15)
    assert min(1.0, 2 * min(ours, mcnemar(gained, lost))) == pytest.approx(two_sided, rel=1e-12)


@pytest.mark.parametrize("p_values", [[0.01], [0.04, 0.01, 0.03], [0.5, 0.001, 0.02, 0.02, 1.0], [0.2, 0.2]])
def test_holm_matches_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], rel=1e-12)


@pytest.mark.parametrize("sums", [[1.0, 2.0, -1.0, 0.5], [0.3, 0.1, 0.2, 0.6, -0.1, 0.4, 0.0, 0.2], [2.0, -2.0]])
def test_sign_flips_match_scipy(sums: list[float]) -> None:
    theirs = permutation_test(
        (np.asarray(sums),), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="greater"
    )
    p, method = sign_flip(np.asarray(sums))
    assert (p, method) == (pytest.approx(theirs.pvalue, abs=1e-12), "sign-flip exact")


def test_random_sign_flips_of_many_clusters_match_scipy() -> None:
    sums = np.linspace(-1, 1.6, EXACT_CLUSTERS + 3)
    p, method = sign_flip(sums)
    theirs = permutation_test(
        (sums,),
        np.sum,
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="greater",
        vectorized=True,
        batch=4096,
    )
    assert method == "sign-flip"
    # 9,999 draws: four standard errors.
    assert p == pytest.approx(theirs.pvalue, abs=4 * math.sqrt(theirs.pvalue * (1 - theirs.pvalue) / 9_999))
    assert sign_flip(sums) == (p, method)
    assert sign_flip(np.ones(40))[0] == 1e-4


@pytest.mark.parametrize(("lost", "n"), [(0, 5), (0, 60), (1, 20), (7, 50), (50, 50)])
def test_without_gains_the_bound_is_clopper_pearsons(lost: int, n: int) -> None:
    (_, theirs) = proportion_confint(lost, n, alpha=0.1, method="beta")
    ours = bound(np.array([1.0] * lost + [0.0] * (n - lost)), np.ones(n), largest=1.0, draws=200_000)
    assert ours == pytest.approx(theirs, rel=0.02)


def test_without_changes_the_bound_is_the_rule_of_three_over_contexts() -> None:
    for clusters in (1, 2, 5, 60):
        result = compare([0.0] * 4 * clusters, [i // 4 for i in range(4 * clusters)], largest=1.0)
        assert result.upper == pytest.approx(1 - 0.05 ** (1 / clusters), rel=0.03)
        assert (result.drop, result.p, result.changed) == (0, 1, 0)
        assert result.visible > result.upper


@pytest.mark.parametrize(
    ("drops", "contexts"),
    [([0.1, -0.1, 0.0], 1), ([0.1, -0.1, 0.0, 0.2, 0.1], 5), ([0.0] * 20, 20), ([0.1] * 20, 20)],
    ids=["one context", "few contexts", "no change", "equal changes"],
)
def test_an_unbounded_metric_has_no_bound_from_too_few_contexts(drops: list[float], contexts: int) -> None:
    result = compare(drops, [i % contexts for i in range(len(drops))], largest=None)
    assert (result.upper, result.lower, result.visible) == (math.inf, -math.inf, math.inf)


def test_the_test_depends_on_scores_and_clusters() -> None:
    assert compare([1, 0, -1, 1], "abcd", largest=1.0).method == "mcnemar"
    assert compare([1, 0, -1, 1], "aabc", largest=1.0).method == "sign-flip exact"
    assert compare([0.5, 0, -1, 1], "abcd", largest=1.0).method == "sign-flip exact"


@pytest.mark.parametrize(("drops", "clusters"), [([], []), ([1.0], ["a", "b"]), ([math.nan], ["a"])])
def test_invalid_drops_are_refused(drops: list[float], clusters: list[str]) -> None:
    with pytest.raises(ValueError, match="drops"):
        compare(drops, clusters, largest=1.0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.integers(0, 5)), min_size=1, max_size=20),
    st.randoms(),
)
def test_order_and_names_do_not_matter_and_the_drop_is_antisymmetric(
    rows: list[tuple[float, int]], random: Any
) -> None:
    def measured(rows: list[tuple[float, int]], name: str = "", sign: int = 1) -> Paired:
        return compare([sign * d for d, _ in rows], [f"{name}{c}" for _, c in rows], largest=1.0, draws=500)

    result = measured(rows)
    shuffled = rows[:]
    random.shuffle(shuffled)
    assert measured(shuffled, "other") == result
    mirrored = measured(rows, sign=-1)
    assert mirrored.drop == -result.drop
    assert result.lower <= result.drop <= result.upper


# A simulated pair of runs: drops [n] and their clusters [n].
Pair = tuple[Array, Array]
rng = np.random.default_rng()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same draws in every test, independent of other tests."""
    global rng
    rng = np.random.default_rng(20_260_101)


def unclustered(n: int, discordance: float, drop: float) -> Pair:
    lost = (discordance + drop) / 2
    return rng.choice([1.0, 0.0, -1.0], n, p=[lost, 1 - discordance, discordance - lost]), np.arange(n)


def correlated(clusters: int, size: int, drop: float) -> Pair:
    """Scores of 0 or 1 that share each context's difficulty, in contexts of different size."""
    label = np.repeat(np.arange(clusters), rng.integers(1, 2 * size, clusters))
    ease = rng.beta(1.5, 1.5, clusters)
    # Each run also has its own noise per context, so that the drops are correlated too.
    luck = rng.normal(0, 0.15, (2, clusters))
    p_base, p_new = (
        np.clip(ease * (1 - 2 * drop) + 2 * drop - loss + own, 0, 1) for loss, own in zip((0, drop), luck, strict=True)
    )
    base, new = (rng.random(len(label)) < p[label] for p in (p_base, p_new))
    return base.astype(float) - new, label


def breaking(clusters: int, size: int, drop: float) -> Pair:
    """A few contexts lose most answers and the others none: a case that bounds from the observed spread miss."""
    label = np.repeat(np.arange(clusters), size)
    broken = rng.random(clusters) < drop / 0.8
    return ((rng.random(len(label)) < 0.8) & broken[label]).astype(float), label


def nll(clusters: int, size: int, drop: float, skewed: bool = False) -> Pair:
    """Changes of an NLL per token, with a component shared by the questions of a context."""
    label = np.repeat(np.arange(clusters), rng.integers(1, 2 * size, clusters))
    shared = rng.lognormal(0, 0.8, clusters) - math.exp(0.32) if skewed else rng.normal(0, 0.3, clusters)
    return drop + shared[label] + rng.normal(0, 0.3, len(label)), label


Draw = Callable[[float], Pair]
SHARES: dict[str, Draw] = {
    "12 samples": lambda drop: unclustered(12, 0.3, drop),
    "60 samples": lambda drop: unclustered(60, 0.2, drop),
    "400 samples": lambda drop: unclustered(400, 0.1 + drop / 2, drop),
    "6 contexts": lambda drop: correlated(6, 4, drop),
    "20 contexts": lambda drop: correlated(20, 5, drop),
    "80 contexts": lambda drop: correlated(80, 4, drop),
}
BREAKING: dict[str, Draw] = {
    "20 contexts, some break": lambda drop: breaking(20, 6, drop),
    "80 contexts, some break": lambda drop: breaking(80, 4, drop),
}
NLLS: dict[str, Draw] = {
    "nll of 6 contexts": lambda drop: nll(6, 3, drop),
    "nll of 12 contexts": lambda drop: nll(12, 4, drop),
    "nll of 40 contexts": lambda drop: nll(40, 3, drop),
}
SKEWED: dict[str, Draw] = {
    "skewed nll of 8 contexts": lambda drop: nll(8, 3, drop, skewed=True),
    "skewed nll of 30 contexts": lambda drop: nll(30, 3, drop, skewed=True),
}


def compared(draw: Draw, drop: float, largest: float | None) -> Paired:
    drops, clusters = draw(drop)
    return compare(drops.tolist(), clusters.tolist(), largest=largest, draws=1_000, permutations=999)


def p_value(pair: Pair) -> float:
    """The p-value of `compare`, without the bounds."""
    drops, label = pair
    if len(set(label)) == len(drops):
        return mcnemar(int((drops > 0).sum()), int((drops < 0).sum()))
    return sign_flip(np.bincount(label, drops), permutations=999)[0]


def upper(pair: Pair, largest: float | None) -> float:
    """The upper bound of `compare` alone."""
    drops, label = pair
    return bound(np.bincount(label, drops), np.bincount(label).astype(float), largest=largest, draws=1_000)


@pytest.mark.parametrize("name", [*SHARES, *NLLS])
def test_the_simulation_matches_compare(name: str) -> None:
    draw, largest = ((SHARES | NLLS)[name], 1.0 if name in SHARES else None)
    pair = draw(0.1)
    result = compare(pair[0].tolist(), pair[1].tolist(), largest=largest, permutations=999)
    assert p_value(pair) == result.p if len(pair[0]) <= 60 else p_value(pair) == pytest.approx(result.p, abs=0.06)
    assert upper(pair, largest) == pytest.approx(result.upper, rel=0.1)


@pytest.mark.parametrize("name", [*SHARES, *NLLS])
def test_false_alarms_without_a_drop_are_at_most_5_percent(name: str) -> None:
    draw = (SHARES | NLLS)[name]
    assert sum(p_value(draw(0.0)) < 0.05 for _ in range(SIMULATIONS)) <= NOISE


@pytest.mark.parametrize("gate", [0.05, 0.15])
@pytest.mark.parametrize("name", [*SHARES, *BREAKING])
def test_false_passes_with_a_drop_at_the_gate_are_at_most_5_percent(name: str, gate: float) -> None:
    draw = (SHARES | BREAKING)[name]
    assert sum(upper(draw(gate), 1.0) < gate for _ in range(SIMULATIONS)) <= NOISE


@pytest.mark.parametrize("name", [*NLLS, *SKEWED])
def test_false_passes_with_an_nll_rise_at_the_gate_are_at_most_5_percent(name: str) -> None:
    draw = (NLLS | SKEWED)[name]
    assert sum(upper(draw(0.5), None) < 0.5 for _ in range(SIMULATIONS)) <= NOISE


def test_a_planned_sample_size_has_80_percent_power() -> None:
    n = plan(0.02, 0.10).samples
    alarms = sum(p_value(unclustered(n, 0.10, 0.02)) < 0.05 for _ in range(SIMULATIONS))
    passes = sum(upper(unclustered(n, 0.10, 0.0), 1.0) < 0.02 for _ in range(SIMULATIONS))
    # Exact tests have slightly less power: 78% and 75% in 4,000 draws; three standard deviations of 1,000 are 4%.
    assert 0.74 < alarms / SIMULATIONS < 0.82
    assert 0.71 < passes / SIMULATIONS < 0.79


def test_a_large_drop_is_detected_and_no_drop_passes() -> None:
    result = [compared(SHARES["400 samples"], 0.08, 1.0) for _ in range(100)]
    assert sum(f.p < 0.05 and f.drop > 0 for f in result) >= 98
    result = [compared(SHARES["400 samples"], 0.0, 1.0) for _ in range(100)]
    assert sum(f.upper < 0.06 for f in result) >= 95
    result = [compared(NLLS["nll of 12 contexts"], 0.6, None) for _ in range(100)]
    assert sum(f.p < 0.05 and f.drop > 0 for f in result) >= 98
