"""Ratios, differences and means over tasks, compared with scipy, statsmodels and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from lceval.stats import estimates
from lceval.stats.estimates import Estimate, Stratum, against, cluster_bootstrap, difference, mean

# A 2.5% quantile of 10,000 draws of a normal has a standard error of 0.027 deviations, so two of them
# differ by 0.038; 4 of these are allowed.
DRAWN_TWICE = 4 * 0.038


def ratio(*strata: Stratum) -> Estimate:
    return against(strata)[0]


def paired(n: int = 120, seed: int = 3) -> Stratum:
    """Correlated scores, like those of one question under two recipes."""
    rng = np.random.default_rng(seed)
    theirs = rng.gamma(3.0, size=n)
    ours = theirs * rng.uniform(0.4, 1.0, size=n)
    return Stratum(ours.tolist(), theirs.tolist(), range(n))


def test_ratio_and_difference_agree_with_scipys_paired_bootstrap() -> None:
    sample = paired()
    share, delta = against([sample])
    for estimate, statistic in (
        (share, lambda a, b, axis=-1: a.mean(axis=axis) / b.mean(axis=axis)),
        (delta, lambda a, b, axis=-1: a.mean(axis=axis) - b.mean(axis=axis)),
    ):
        theirs = stats.bootstrap(
            (sample.ours, sample.theirs), statistic, paired=True, n_resamples=10_000, method="percentile", rng=5
        )
        assert estimate.value == pytest.approx(statistic(np.array(sample.ours), np.array(sample.theirs)), rel=1e-12)
        tolerance = DRAWN_TWICE * theirs.standard_error
        assert estimate.lo == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
        assert estimate.hi == pytest.approx(theirs.confidence_interval.high, abs=tolerance)


def test_the_ratio_of_clustered_means_has_the_width_of_the_delta_method() -> None:
    """The delta method's error of R = mean(s) / mean(f) is that of mean(s - R f) / mean(f), clusters taken together.

    With 150 clusters it is normal enough: bounds at 1.96 errors, to a tenth of an error.
    """
    rng = np.random.default_rng(7)
    clusters = rng.integers(0, 150, size=600)
    theirs = rng.uniform(1, 2, size=600) + rng.uniform(0, 1, size=150)[clusters]
    ours = 0.6 * theirs + rng.uniform(-0.25, 0.25, size=150)[clusters] + rng.uniform(-0.2, 0.2, size=600)
    estimate = ratio(Stratum(ours.tolist(), theirs.tolist(), clusters.tolist()))
    share = ours.mean() / theirs.mean()
    fit = sm.OLS(ours - share * theirs, np.ones(600)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    error = float(fit.bse[0]) / theirs.mean()
    assert estimate.value == pytest.approx(share, rel=1e-12)
    assert estimate.lo == pytest.approx(share - 1.96 * error, abs=0.1 * error)
    assert estimate.hi == pytest.approx(share + 1.96 * error, abs=0.1 * error)
    unpaired = ratio(Stratum(ours.tolist(), rng.permutation(theirs).tolist(), clusters.tolist()))
    assert estimate.hi is not None
    assert estimate.lo is not None
    assert unpaired.hi is not None
    assert unpaired.lo is not None
    assert estimate.hi - estimate.lo < unpaired.hi - unpaired.lo


def test_the_difference_of_clustered_means_has_the_width_of_a_cluster_robust_regression() -> None:
    rng = np.random.default_rng(9)
    clusters = rng.integers(0, 150, size=500)
    drops = rng.normal(0.2, 0.3, size=150)[clusters] + rng.normal(0, 0.3, size=500)
    theirs = rng.uniform(0, 1, size=500)
    estimate = difference([Stratum((theirs - drops).tolist(), theirs.tolist(), clusters.tolist())])
    fit = sm.OLS(-drops, np.ones(500)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    lo, hi = fit.conf_int()[0]
    assert estimate.value == pytest.approx(-drops.mean())
    assert estimate.lo == pytest.approx(lo, abs=0.1 * fit.bse[0])
    assert estimate.hi == pytest.approx(hi, abs=0.1 * fit.bse[0])


def test_three_contexts_reach_the_best_and_the_worst_of_their_27_draws() -> None:
    """Each extreme draw has 3.7%, more than the 2.5% cut off."""
    ours, theirs = [1.0, 0.0, 2.0], [2.0, 1.0, 2.0]
    draws = [
        sum(ours[i] for i in drawn) / sum(theirs[i] for i in drawn) for drawn in itertools.product(range(3), repeat=3)
    ]
    assert ratio(Stratum(ours, theirs, "abc")) == (3 / 5, min(draws), max(draws))


def test_a_single_task_has_the_interval_of_its_own_row() -> None:
    """Other draws of the same bootstrap."""
    rng = np.random.default_rng(1)
    scores, clusters = rng.uniform(size=200).tolist(), rng.integers(0, 60, size=200).tolist()
    value, lo, hi = cluster_bootstrap(scores, clusters)
    estimate = mean([Stratum(scores, [], clusters)])
    tolerance = DRAWN_TWICE * (hi - lo) / (2 * 1.96)
    assert estimate.value == pytest.approx(value)
    assert estimate.lo == pytest.approx(lo, abs=tolerance)
    assert estimate.hi == pytest.approx(hi, abs=tolerance)


def test_a_mean_over_tasks_is_resampled_within_each_task() -> None:
    """The variance of w_1 s_1 + w_2 s_2 with independent tasks is w_1² v_1 + w_2² v_2, also with as many contexts."""
    rng = np.random.default_rng(2)
    tasks = [rng.gamma(2.0, size=150), rng.gamma(4.0, size=150), rng.gamma(1.0, size=90)]
    weights = [0.25, 0.25, 0.5]
    estimate = mean([Stratum(t.tolist(), [], range(len(t)), w) for t, w in zip(tasks, weights, strict=True)])
    value = sum(w * t.mean() for t, w in zip(tasks, weights, strict=True))
    error = math.sqrt(sum(w**2 * t.var() / len(t) for t, w in zip(tasks, weights, strict=True)))
    assert estimate.value == pytest.approx(value)
    assert estimate.lo == pytest.approx(value - 1.96 * error, abs=0.15 * error)
    assert estimate.hi == pytest.approx(value + 1.96 * error, abs=0.15 * error)


def test_a_ratio_over_tasks_is_the_ratio_of_means_and_not_the_mean_of_ratios() -> None:
    easy = Stratum([0.9, 0.9], [1.0, 1.0], "ab", 0.5)
    hard = Stratum([0.0, 0.1], [0.1, 0.1], "ab", 0.5)
    share, delta = against([easy, hard])
    assert share.value == pytest.approx((0.9 + 0.05) / (1.0 + 0.1))
    assert delta.value == pytest.approx((0.9 + 0.05 - 1.0 - 0.1) / 2)


@pytest.mark.parametrize(
    ("stratum", "expected"),
    [
        (Stratum([1.0, 0.0], [0.0, 0.0], "ab"), Estimate(None)),
        (Stratum([-1.0, 2.0], [1.0, 1.0], "ab"), Estimate(None)),
        (Stratum([1.0, 0.0], [1.0, 1.0], "aa"), Estimate(0.5)),
        (Stratum([0.1, 0.7, 0.3], [0.1, 0.7, 0.3], "abc"), Estimate(1.0)),
        (Stratum([0.0, 0.0, 0.0], [0.3, 0.7, 0.3], "abc"), Estimate(0.0)),
        (Stratum([1.0, 1.0], [0.0, 1.0], "ab"), Estimate(2.0)),
        (Stratum([0.0, 0.0, 1.0], [0.0, 0.0, 1.0], "abc"), Estimate(1.0)),
    ],
    ids=[
        "theirs are 0",
        "a negative score",
        "one context",
        "nothing changed",
        "all lost",
        "no upper limit in a quarter of the draws",
        "one context with anything to lose",
    ],
)
def test_no_ratio_or_interval_where_it_is_undefined(stratum: Stratum, expected: Estimate) -> None:
    assert ratio(stratum) == expected


def test_a_task_with_a_single_context_gives_a_mean_without_interval() -> None:
    known, single = paired(), Stratum([1.0, 2.0], [2.0, 2.0], "aa", 0.5)
    assert mean([Stratum(known.ours, [], known.clusters, 0.5), single]).lo is None
    assert difference([single]).value == -0.5 * 0.5


def test_sample_order_and_context_names_do_not_matter() -> None:
    sample = paired(60)
    order = np.random.default_rng(0).permutation(60).tolist()
    shuffled = Stratum([sample.ours[i] for i in order], [sample.theirs[i] for i in order], [f"x{i}" for i in order])
    assert against([shuffled]) == against([sample])


def test_cached_and_uncached_draws_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = paired(50)
    whole = against([sample])
    monkeypatch.setattr(estimates, "_CACHED_DRAWS", 0)
    assert against([sample]) == whole
    monkeypatch.setattr(estimates, "_BLOCK_DRAWS", 3333)
    for estimate, before in zip(against([sample]), whole, strict=True):
        assert estimate == pytest.approx(before, rel=0.05)
