"""Methods with uneven budgets: across layers (pyramidkv), heads (adakv), and both (kvzip)."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lceval.kernels.softmax import Softmax
from lceval.models.policies.adakv import AdaKV
from lceval.models.policies.base import SINKS, Amount, LayerView
from lceval.models.policies.h2o import H2O
from lceval.models.policies.knorm import KNorm
from lceval.models.policies.kvzip import KVzip
from lceval.models.policies.pyramidkv import PyramidKV
from lceval.models.policies.snapkv import SnapKV

# Shares that doubles represent exactly, so that rounding is unambiguous.
amounts = st.one_of(st.integers(1, 1024).map(lambda n: Amount(n / 1024)), st.integers(1, 3000).map(Amount))


@settings(deadline=None)
@given(amounts, st.integers(1, 4000), st.integers(1, 40), st.integers(1, 128), st.sampled_from([1, 2, 20, 30]))
def test_pyramidkv_layer_budgets_equal_those_of_kvpress(
    amount: Amount, tokens: int, layers: int, window: int, beta: int
) -> None:
    policy = PyramidKV(amount=amount, window=window, beta=beta)
    keep = (
        Fraction(amount.value) if isinstance(amount.value, float) else min(Fraction(1), Fraction(amount.value, tokens))
    )
    capacity = window + tokens * keep
    low = (capacity - window) / beta
    high = (capacity - window) * 2 - low
    if high >= tokens - window:
        high = Fraction(tokens - window)
        low = (capacity - window) * 2 - high
    for layer in range(layers):
        if tokens >= high >= low >= window:
            expected = high - layer * (high - low) / (layers - 1) if layers > 1 else high
        else:
            expected = Fraction(max(1, round(tokens * keep)))
        got = policy.budget(layer, layers, tokens)
        # A value midway between two integers may be rounded to either.
        assert abs(got - expected) <= Fraction(1, 2) + Fraction(1, 10**9)
        assert 1 <= got <= tokens


def test_pyramidkvs_paper_form_is_that_of_the_authors_code_at_small_budgets() -> None:
    policy = PyramidKV(amount=Amount(64), window=8, form="paper")
    budgets = [policy.budget(layer, 32, 8000) for layer in range(32)]
    # 56 tokens outside the window: 110 in the first layer, 3 fewer in each, the window of 8 on top.
    assert budgets == [118 - 3 * layer for layer in range(32)]
    assert budgets[-1] == 25
    # The first layer has at most all tokens; the last gets what it leaves.
    assert [policy.budget(layer, 2, 116) for layer in range(2)] == [116, 12]
    # Below twice the budget outside the window, and for a budget within the window, all layers get the mean.
    assert {policy.budget(layer, 32, 111) for layer in range(32)} == {64}
    within = PyramidKV(amount=Amount(8), window=8, form="paper")
    assert {within.budget(layer, 32, 8000) for layer in range(32)} == {8}


@given(st.integers(0, 10**5), st.integers(1, 99))
def test_round_down_is_kvpress_truncation_of_its_compression_ratio(tokens: int, percent: int) -> None:
    ratio = 1 - percent / 100
    expected = int(tokens * (1 - ratio))
    assert Amount(percent / 100, down=True).tokens(tokens) == min(tokens, max(1, expected))


def test_pyramidkv_budgets_decrease_from_the_first_layer_to_the_last_around_the_mean() -> None:
    policy = PyramidKV(amount=Amount(0.25), window=32)
    budgets = [policy.budget(layer, 30, 8000) for layer in range(30)]
    assert budgets[0] == 3900
    assert budgets[-1] == 100
    assert budgets == sorted(budgets, reverse=True)
    assert abs(sum(budgets) - 30 * 2000) <= 15


@pytest.mark.parametrize("tokens", [64, 1000])
def test_pyramidkv_is_uniform_if_its_last_layer_would_get_less_than_the_window(tokens: int) -> None:
    policy = PyramidKV(amount=Amount(0.25), window=64)
    assert {policy.budget(layer, 30, tokens) for layer in range(30)} == {tokens // 4}


def random_scores(layers: int, heads: int, length: int, seed: int, levels: int | None = None) -> list[Tensor]:
    """Scores [2, heads, length] of each layer; with `levels`, so few distinct values that most tie."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, 2, heads, length)
    if levels:
        return list(torch.randint(levels, shape, generator=generator).float())
    return list(torch.rand(shape, generator=generator))


shapes = {
    "heads": st.integers(1, 4),
    "length": st.integers(1, 40),
    "seed": st.integers(0, 10**6),
    "levels": st.sampled_from([None, 1, 3]),
}


@settings(deadline=None)
@given(**shapes, amount=amounts, floor=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_adakv_keeps_each_heads_floor_and_then_the_best_of_the_layer(
    heads: int, length: int, seed: int, levels: int | None, amount: Amount, floor: float
) -> None:
    policy = AdaKV(amount=amount, inner=KNorm(amount=amount), floor=floor)
    scores = random_scores(2, heads, length, seed, levels)
    budget = amount.tokens(length)
    own = max(1, int(floor * budget)) if floor else 0
    for layer, masks in zip(scores, policy.select(scores), strict=True):
        for sequence, mask in zip(layer.tolist(), masks, strict=True):
            kept = {(t, h) for h in range(heads) for t in sorted(range(length), key=lambda t: -sequence[h][t])[:own]}
            rest = sorted(
                {(t, h) for t in range(length) for h in range(heads)} - kept, key=lambda x: (-sequence[x[1]][x[0]], x)
            )
            kept |= set(rest[: heads * budget - len(kept)])
            assert {(t, h) for h, t in mask.nonzero().tolist()} == kept


def test_adakv_gives_a_head_with_better_scores_more_slots() -> None:
    scores = torch.rand(1, 2, 100, generator=torch.Generator().manual_seed(0))
    scores[:, 1] += 10
    (mask,) = AdaKV(amount=Amount(20), inner=KNorm(amount=Amount(20))).select([scores])
    assert mask.sum(-1).tolist() == [[4, 36]]


def test_adakv_uses_the_layer_budgets_of_its_inner_evictor() -> None:
    amount = Amount(0.25)
    inner = PyramidKV(amount=amount, window=8)
    masks = AdaKV(amount=amount, inner=inner).select(random_scores(5, 3, 800, seed=0))
    sizes = [mask.sum((1, 2)).unique().tolist() for mask in masks]
    assert sizes == [[3 * inner.budget(layer, 5, 800)] for layer in range(5)]
    assert sizes[0] > sizes[4]


def test_adakv_refuses_what_it_cannot_pool() -> None:
    amount = Amount(0.25)
    snapkv = SnapKV(amount=amount)
    with pytest.raises(ValueError, match="equal budgets per head"):
        AdaKV(amount=amount, inner=KVzip(amount=amount))
    with pytest.raises(ValueError, match="equal budgets per head"):
        AdaKV(amount=amount, inner=AdaKV(amount=amount, inner=snapkv))
    with pytest.raises(ValueError, match="when=always"):
        AdaKV(amount=amount, inner=H2O(amount=amount, when="always"))
    with pytest.raises(ValueError, match="the same amount"):
        AdaKV(amount=Amount(0.5), inner=snapkv)
    with pytest.raises(ValueError, match="floor must be a share"):
        AdaKV(amount=amount, inner=snapkv, floor=1.5)


@settings(deadline=None)
@given(**shapes, amount=amounts, layers=st.integers(1, 4), protected=st.integers(0, 12), plus=st.booleans())
def test_kvzip_keeps_the_best_slots_of_all_layers_and_heads_after_the_protected_tokens(
    heads: int,
    length: int,
    seed: int,
    levels: int | None,
    amount: Amount,
    layers: int,
    protected: int,
    plus: bool,
) -> None:
    scores, policy = random_scores(layers, heads, length, seed, levels), KVzip(amount=amount, plus=plus)
    first = max(SINKS, protected)
    views = [
        LayerView(
            *3 * (torch.zeros(2, heads, length, 1),),
            softmax=Softmax(1.0),
            layer=layer,
            layers=layers,
            reconstruction=-s if plus else s,
            reconstruction_plus=s if plus else None,
            protected=protected,
        )
        for layer, s in enumerate(scores)
    ]
    before = [s.clone() for s in scores]
    masks = policy.select([policy.scores(view) for view in views])
    assert all(map(torch.equal, scores, before))
    total = layers * heads * amount.tokens(length)
    for b in range(2):
        slots = [(t, layer, h) for t in range(length) for layer in range(layers) for h in range(heads)]
        order = sorted(slots, key=lambda x: (x[0] >= first, -float(scores[x[1]][b, x[2], x[0]]) * (x[0] >= first), x))
        kept = {(t, layer, h) for layer in range(layers) for h, t in masks[layer][b].nonzero().tolist()}
        assert kept == set(order[:total])
