"""The interval is the documented one: over clusters, by percentiles, undefined where uninformative."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lceval.adapt.evaluate import compare
from lceval.analysis.check import baseline
from lceval.analysis.check.compare import check
from lceval.analysis.pairs import results
from lceval.analysis.report.payload import collect
from lceval.analysis.table import build
from lceval.records.results import Run, Sample, TaskResult
from lceval.stats.estimates import cluster_bootstrap

SCORE = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1), st.floats(-50, 50))
SAMPLES = st.lists(st.tuples(SCORE, st.integers(0, 7)), min_size=1, max_size=37)
# No deadline: a busy machine is not a failure.
unhurried = settings(deadline=None)


def bootstrap(samples, **options):
    scores, clusters = zip(*samples, strict=True)
    return cluster_bootstrap(scores, clusters, resamples=500, **options)


def same(a, b):
    """Bit for bit, with NaN equal to NaN."""
    return np.array_equal(a, b, equal_nan=True)


def test_the_mean_is_the_plain_mean_over_samples_however_uneven_the_clusters():
    mean, _, _ = cluster_bootstrap([1, 1, 1, 1, 0, 0.5], ["a", "a", "a", "a", "b", "c"])
    assert mean == 4.5 / 6


def test_unclustered_interval_agrees_with_scipys_percentile_bootstrap():
    rng = np.random.default_rng(5)
    scores = rng.gamma(2.0, size=111)
    _, lo, hi = cluster_bootstrap(scores.tolist(), range(111))
    theirs = stats.bootstrap(
        (scores,), np.mean, n_resamples=10_000, method="percentile", vectorized=True, rng=rng
    ).confidence_interval
    # A 2.5% quantile of 10,000 draws of a normal has a standard error of
    # sqrt(0.025 * 0.975 / 10,000) / phi(1.96) = 0.027 deviations; two of them differ by 0.038; allow 4 of it.
    tolerance = 4 * 0.038 * scores.std() / math.sqrt(111)
    assert lo == pytest.approx(theirs.low, abs=tolerance)
    assert hi == pytest.approx(theirs.high, abs=tolerance)


@pytest.mark.parametrize(("right", "n"), [(13, 40), (1, 63), (99, 100)])
def test_unclustered_right_or_wrong_resamples_are_binomial(right, n):
    """The resampled number right is Binomial(n, right/n), whose quantiles are known exactly.

    The drawn quantile may be the next count where the exact one sits on a step: one count is allowed.
    """
    scores = [1.0] * right + [0.0] * (n - right)
    _, lo, hi = cluster_bootstrap(scores, range(n))
    assert lo * n == pytest.approx(stats.binom.ppf(0.025, n, right / n), abs=1.001)
    assert hi * n == pytest.approx(stats.binom.ppf(0.975, n, right / n), abs=1.001)


def test_three_clusters_reach_their_worst_and_best_resample():
    """Each of the 27 draws has 3.7%, more than the 2.5% cut off, so the bounds are the extreme draws."""
    scores, clusters = [0, 0, 0, 1, 0, 1], ["a", "a", "a", "b", "b", "c"]
    assert cluster_bootstrap(scores, clusters) == (2 / 6, 0.0, 1.0)


def test_two_uneven_clusters_give_the_ratio_not_the_mean_of_cluster_means():
    """Draws aa, ab, ba, bb: ratios 1/4, 2/5, 2/5, 1; at a level of 0.4 only the middle ones are left."""
    assert cluster_bootstrap([1, 0, 0, 0, 1], ["a"] * 4 + ["b"], level=0.4) == (2 / 5, 2 / 5, 2 / 5)


def test_agrees_with_resampling_the_clusters_one_by_one():
    rng = np.random.default_rng(11)
    clusters = rng.integers(0, 23, size=100)
    scores = np.clip(rng.normal(size=23)[clusters] + rng.normal(size=100), -2, 2)
    names = np.unique(clusters)
    draws = []
    for _ in range(10_000):
        drawn = rng.choice(names, size=len(names))
        sums = [(scores[clusters == name].sum(), (clusters == name).sum()) for name in names]
        totals = np.array(sums)[np.searchsorted(names, drawn)].sum(axis=0)
        draws.append(totals[0] / totals[1])
    _, lo, hi = cluster_bootstrap(scores.tolist(), clusters.tolist())
    tolerance = 4 * 0.038 * np.std(draws)
    assert lo == pytest.approx(np.quantile(draws, 0.025), abs=tolerance)
    assert hi == pytest.approx(np.quantile(draws, 0.975), abs=tolerance)


def test_ten_copies_of_every_sample_in_its_cluster_do_not_narrow_the_interval():
    scores = [1.0, 0.0, 0.5, 1.0, 0.0, 0.25, 0.0]
    once = cluster_bootstrap(scores, range(7))
    assert cluster_bootstrap(scores * 10, [*range(7)] * 10) == pytest.approx(once)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("clusters", [2, 16, 63])
def test_unanimous_scores_get_wilson_with_clusters_as_trials(value, clusters):
    _, lo, hi = cluster_bootstrap([value] * clusters * 3, [*range(clusters)] * 3)
    wilson = stats.binomtest(int(value) * clusters, clusters).proportion_ci(0.95, method="wilson")
    assert (lo, hi) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    assert (hi == 1.0) if value else (lo == 0.0)


@pytest.mark.parametrize(
    ("scores", "clusters"),
    [([1.0], ["a"]), ([0.0, 1.0, 1.0], ["a"] * 3), ([1.0, 1.0], ["a"] * 2), ([0.1] * 7, range(7))],
    ids=["one sample", "one cluster", "one unanimous cluster", "no variation"],
)
def test_no_interval_where_the_bootstrap_is_uninformative(scores, clusters):
    mean, lo, hi = cluster_bootstrap(scores, clusters)
    assert mean == pytest.approx(sum(scores) / len(scores))
    assert math.isnan(lo)
    assert math.isnan(hi)


def test_no_scores_give_no_numbers():
    assert all(math.isnan(value) for value in cluster_bootstrap([], []))


def test_resampling_in_blocks_gives_the_same_interval(monkeypatch):
    """Blocks bound the memory; with 3 resamples per block none is lost or repeated (sums may round differently)."""
    rng = random.Random(1)
    scores = [rng.random() for _ in range(111)]
    whole = cluster_bootstrap(scores, range(111))
    monkeypatch.setattr("lceval.stats.estimates._BLOCK_DRAWS", 333)
    assert cluster_bootstrap(scores, range(111)) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (([1.0], ["a", "b"]), {}),
        (([math.nan, 1.0], ["a", "b"]), {}),
        (([0.0, 1.0], ["a", "b"]), {"level": 1.0}),
        (([0.0, 1.0], ["a", "b"]), {"resamples": 0}),
    ],
    ids=["lengths", "nan", "level", "resamples"],
)
def test_invalid_arguments_are_refused(arguments, options):
    with pytest.raises(ValueError, match=r"scores|level"):
        cluster_bootstrap(*arguments, **options)


@unhurried
@given(SAMPLES, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(samples, rng):
    shuffled = rng.sample(samples, len(samples))
    assert same(bootstrap(shuffled), bootstrap(samples))


@unhurried
@given(SAMPLES, st.permutations(range(8)))
def test_the_names_of_clusters_do_not_matter(samples, names):
    renamed = [(score, f"context {names[cluster]}") for score, cluster in samples]
    assert same(bootstrap(renamed), bootstrap(samples))


@unhurried
@given(SAMPLES)
def test_the_interval_contains_the_mean_and_stays_within_the_scores(samples):
    mean, lo, hi = bootstrap(samples)
    scores = [score for score, _ in samples]
    if math.isnan(lo):
        assert math.isnan(hi)
    elif len(set(scores)) > 1:
        slack = 1e-9
        assert min(scores) - slack <= lo <= mean <= hi <= max(scores) + slack
    else:
        assert 0 <= lo <= mean <= hi <= 1


@unhurried
@given(SAMPLES)
def test_a_higher_level_never_narrows_the_interval(samples):
    _, lo, hi = bootstrap(samples, level=0.8)
    _, wider_lo, wider_hi = bootstrap(samples, level=0.99)
    assert math.isnan(lo) or (wider_lo <= lo and hi <= wider_hi)


def test_the_same_seed_gives_the_same_interval():
    scores = [0.1, 0.9, 0.4, 0.4, 0.7]
    assert cluster_bootstrap(scores, range(5), seed=3) == cluster_bootstrap(scores, range(5), seed=3)


@pytest.mark.parametrize("scores", [[0.0] * 8, [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]], ids=["all zero", "mixed"])
def test_every_command_has_the_same_interval_of_the_same_samples(scores: list[float]) -> None:
    samples = [
        Sample(f"q{i}", f"c{i // 2}", score, None, None, {}, "ok", metrics={"subem": score})
        for i, score in enumerate(scores)
    ]
    task = TaskResult("lc_squad_ao_2k", "1.0", "subem", context="full", samples=tuple(samples))
    runs = [
        Run(Path(name), name, "lcft", "m", peft, "full", True, {}, (task,))
        for name, peft in (("base", None), ("new", "adapter"))
    ]
    row = build(runs).rows[0]
    expected = [row["score"], row["ci_lo"], row["ci_hi"]]
    assert None not in expected
    trained = compare(results(runs))[0]["base"]
    assert [trained["value"], trained["low"], trained["high"]] == expected
    (checked,) = check(baseline.of(runs[0]), baseline.of(runs[1]), gate=0.1).tasks
    assert [checked.base, *(checked.base_interval or [])] == expected
    reported = collect(runs)["rows"][0]
    assert [reported[key] for key in ("score", "ci_lo", "ci_hi")] == expected
