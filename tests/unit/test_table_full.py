"""A run beside its own under `full`: paired by sample, by context in the intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from lceval.results import Run, Sample, TaskResult
from lceval.table import KEYS, build
from lceval.table.against_full import FULL, pairs

NOTHING = {"retention": None, "retention_lo": None, "retention_hi": None, "nll_delta": None}


def run(scores, *, recipe=FULL, nll=None, context="full", peft=None, prompts="p", task="t"):
    samples = tuple(
        Sample(
            f"q{i}",
            f"c{i // 2}",
            s,
            None,
            None,
            {},
            "ok",
            {} if nll is None else {"gold_nll": nll + 0.01 * i},
            "",
            prompts,
        )
        for i, s in enumerate(scores)
    )
    result = TaskResult(task, "1", "subem", filters=("none",), context=context, samples=samples)
    return Run(recipe, recipe, "lcft", "m", peft, recipe, True, {}, (result,))  # type: ignore[arg-type]


def last(*runs):
    return build(runs).rows[-1]


def test_retention_is_the_share_of_the_score_and_the_nll_what_is_added():
    row = last(run([1, 1, 1, 0, 1, 0], nll=1.0), run([1, 0, 0, 0, 1, 0], recipe="int4", nll=1.5))
    assert row["retention"] == pytest.approx(2 / 4)
    assert row["nll_delta"] == pytest.approx(0.5)
    assert set(row) == set(KEYS)


def test_its_interval_is_scipys_over_contexts():
    rng = np.random.default_rng(3)
    full = rng.integers(0, 2, 120).astype(float)
    ours = full * rng.integers(0, 2, 120)
    row = last(run(list(full)), run(list(ours), recipe="int4"))
    sums = [x.reshape(60, 2).sum(1) for x in (ours, full)]
    expected = bootstrap(
        sums, lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True, method="percentile", rng=1
    ).confidence_interval
    assert (row["retention_lo"], row["retention_hi"]) == pytest.approx(tuple(expected), abs=0.01)


@pytest.mark.parametrize(
    "full",
    [
        run([0, 0, 0, 0]),
        run([1, 1, 1, 1], context="gold"),
        run([1, 1, 1, 1], peft="ao"),
        run([1, 1, 1, 1], task="other"),
        run([1, 1, 1, 1], recipe="snapkv:0.5"),
    ],
    ids=["full scores nothing", "another context", "another adapter", "another task", "no full"],
)
def test_without_a_score_to_keep_it_is_undefined(full):
    row = last(full, run([1, 0, 1, 0], recipe="int4"))
    assert {key: row[key] for key in NOTHING} == NOTHING


def test_full_is_not_compared_with_another_full():
    assert last(run([1, 1]), run([1, 0]))["retention"] is None


def test_samples_are_paired_by_name_and_prompt():
    (ours,), (theirs,) = run([1, 0, 1]).tasks, run([1, 1]).tasks
    assert list(pairs(ours.samples, theirs.samples)) == [(0, 0), (1, 1)]
    (other,) = run([1, 1], prompts="another").tasks
    assert list(pairs(ours.samples, other.samples)) == []
