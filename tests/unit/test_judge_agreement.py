"""Cohen's kappa with human labels, its interval, and self-consistency."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lceval.stats import kappa

LABELS = st.sampled_from(["correct", "incorrect", "refusal"])


@settings(deadline=None)
@given(st.lists(st.tuples(LABELS, LABELS), min_size=2, max_size=40))
def test_kappa_matches_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    import warnings

    from sklearn.metrics import cohen_kappa_score

    ours, theirs = zip(*pairs, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = cohen_kappa_score(ours, theirs)
    assert kappa.kappa(ours, theirs) == pytest.approx(expected, nan_ok=True, abs=1e-12)


def test_the_interval_of_kappa_resamples_questions_and_contains_the_estimate() -> None:
    rng = random.Random(1)
    human = [rng.choice(["correct", "incorrect"]) for _ in range(200)]
    ours = [label if rng.random() < 0.8 else "refusal" for label in human]
    clusters = [number // 4 for number in range(200)]
    low, high = kappa.kappa_interval(ours, human, clusters)
    assert low < kappa.kappa(ours, human) < high
    # Copies of a row in its cluster add no evidence; as separate clusters they would.
    copied = kappa.kappa_interval(ours * 4, human * 4, clusters * 4)
    assert copied == pytest.approx((low, high))
    separate = kappa.kappa_interval(ours * 4, human * 4, range(800))
    assert separate[1] - separate[0] < (high - low) * 0.7


def test_the_interval_is_undefined_where_the_bootstrap_is_uninformative() -> None:
    assert math.isnan(kappa.kappa_interval(["a", "b"], ["a", "b"], ["c", "c"])[0])
    assert math.isnan(kappa.kappa_interval(["a", "a"], ["a", "b"], ["c", "d"])[0])


def test_unjudged_rows_are_counted_and_excluded_from_all_metrics() -> None:
    report = kappa.agreement(["a", None, "b", "a"], ["a", "a", "b", "b"], range(4), ["a", "b"])
    assert (report["n"], report["judged"], report["unjudged"], report["coverage"]) == (4, 3, 1, 0.75)
    assert report["accuracy"] == 2 / 3
    assert report["confusion"] == {"a": {"a": 1, "b": 0}, "b": {"a": 1, "b": 1}}
    empty = kappa.agreement([None], ["a"], [0], ["a"])
    assert (empty["accuracy"], empty["kappa"], empty["kappa_interval"]) == (None, None, None)


def test_consistency_is_over_cases_judged_more_than_once() -> None:
    report = kappa.consistency([["a", "b", "a", "a"], ["a", "a", None, "a"], ["a", "b", None, None]])
    assert report == {"repeats": 3, "cases": 3, "unanimous": 2 / 3, "pairs_agree": 5 / 7}
    assert kappa.consistency([["a", "b"]]) is None
