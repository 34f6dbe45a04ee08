"""Fitting a context to a length: fill, spread, contract."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.tasks.compose import Contract, Fitter, fill, spread
from lceval.tasks.leakage import LeakIndex
from lceval.tasks.parsing import normalize


class Meter:
    """Stub of a token meter with a chat template of a known size."""

    def __init__(self, template_tokens):
        self.template_tokens = template_tokens


@given(st.integers(0, 3000), st.lists(st.integers(1, 200), max_size=60))
def test_fill_never_exceeds_the_capacity_and_selects_no_candidate_twice(capacity, costs):
    chosen = fill(capacity, costs)
    assert sum(costs[index] for index in chosen) <= capacity
    assert len(set(chosen)) == len(chosen)


def test_fill_ends_with_the_candidate_that_fits_best():
    assert fill(100, [40, 40, 40, 7, 12, 19, 21]) == [0, 3, 4, 1]


@given(st.integers(1, 6), st.integers(0, 40), st.integers())
def test_spread_keeps_everything_and_puts_one_gold_in_each_segment(golds, fillers, seed):
    gold = [f"g{index}" for index in range(golds)]
    filler = [f"f{index}" for index in range(fillers)]
    order = spread(gold, filler, random.Random(seed))
    assert sorted(order) == sorted(gold + filler)
    assert [item for item in order if item in filler] == filler
    places = [place for place, item in enumerate(order) if item in gold]
    assert [place * golds // len(order) for place in places] == pytest.approx(range(golds), abs=1)


def test_golds_reach_every_depth():
    places = {
        place
        for seed in range(300)
        for place, item in enumerate(spread(["g"] * 4, ["f"] * 9, random.Random(seed)))
        if item == "g"
    }
    assert places == set(range(13))


def test_fitter_corrects_for_costs_that_do_not_add_up_and_keeps_the_error():
    costs = random.Random(7).choices(range(5, 60), k=400)
    renderings = []

    def arrange(chosen):
        renderings.append(chosen)
        exact = 100 + sum(costs[index] for index in chosen) + (30 if chosen else 0)
        return chosen, [exact - 4, exact]

    fitter = Fitter(Contract.guaranteed(2048))
    for attempts in (2, 1):  # the second context starts with the error of the first
        renderings.clear()
        _, reached = fitter.fit(costs, arrange)
        assert 2046 <= max(reached) <= 2048
        assert len(renderings) - 1 <= attempts


def test_fitter_returns_none_if_nothing_fits():
    assert Fitter(Contract.guaranteed(1024)).fit([500], lambda chosen: (chosen, [10 + 500 * len(chosen)])) is None
    assert Fitter(Contract.guaranteed(1024)).fit([5], lambda chosen: (chosen, [2000])) is None


def test_the_contract_includes_the_template_only_if_there_is_no_room_for_both():
    assert Contract.guaranteed(2048).allows([2008, 2048])
    assert not Contract.guaranteed(2048).allows([2007, 2040])
    assert not Contract.guaranteed(2048).allows([2040, 2049])
    assert Contract.preferred(2048, Meter(30)).floor == pytest.approx(2007.04 + 30)
    assert Contract.preferred(1024, Meter(30)) == Contract.guaranteed(1024)


words = st.text(alphabet="ab ", max_size=12)


@given(st.lists(words, min_size=1, max_size=8), st.lists(words.filter(normalize), min_size=1, max_size=4))
def test_leak_index_finds_exactly_the_passages_that_contain_an_answer(texts, answers):
    answers = [normalize(answer) for answer in answers]
    expected = {place for place, text in enumerate(texts) if any(answer in normalize(text) for answer in answers)}
    assert LeakIndex(texts).containing(answers) == expected
