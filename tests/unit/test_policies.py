"""Each policy against a slow reference implementation, and all of them against the common contract."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lceval.kernels.softmax import Softmax
from lceval.models.policies.adakv import AdaKV
from lceval.models.policies.base import Amount, Evictor, LayerView, StatsSpec, StepEvictor, StepView
from lceval.models.policies.expected_attention import ExpectedAttention
from lceval.models.policies.h2o import H2O
from lceval.models.policies.keydiff import KeyDiff
from lceval.models.policies.knorm import KNorm
from lceval.models.policies.kvzip import KVzip
from lceval.models.policies.lacache import LaCache
from lceval.models.policies.pyramidkv import PyramidKV
from lceval.models.policies.random_control import Random
from lceval.models.policies.snapkv import SnapKV
from lceval.models.policies.streaming import Streaming
from lceval.models.policies.tova import TOVA

LENGTHS = (1, 4, 5, 17, 63, 64, 65, 200)
HEADS, KV_HEADS, DIM, LAYERS = 6, 2, 8, 3
PER_HEAD = [SnapKV, Streaming, KNorm, KeyDiff, TOVA, H2O, PyramidKV, LaCache, ExpectedAttention, Random]


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[:, None] * 10.0 ** -torch.arange(DIM // 2)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def view(length: int, layer: int = 0, batch: int = 1) -> LayerView:
    """A layer with all prefill statistics, and the queries of all tokens."""
    generator = torch.Generator().manual_seed(1000 * length + layer)
    keys, values = (torch.randn(batch, KV_HEADS, length, DIM, generator=generator) for _ in range(2))
    queries, raw = (torch.randn(batch, HEADS, length, DIM, generator=generator) for _ in range(2))
    plain = LayerView(keys, values, queries, Softmax(DIM**-0.5), layer=layer, layers=LAYERS)
    raw = raw[:, :, 4:] if length > 4 else raw
    centred = raw - raw.mean(2, keepdim=True)
    return replace(
        plain,
        column_sums=plain.window_attention(length).sum(-2).mean(2),
        query_mean=raw.mean(2),
        query_cov=centred.transpose(2, 3) @ centred / raw.shape[2],
        rotary=rotary,
        reconstruction=torch.rand(batch, KV_HEADS, length, generator=generator),
    )


def keep(policy: Evictor, layer: LayerView) -> Tensor:
    return policy.select([policy.scores(layer)])[0]


def kept(policy: Evictor, layer: LayerView, head: int) -> list[int]:
    return keep(policy, layer)[0, head].nonzero().squeeze(-1).tolist()


def best(scores: list[float], count: int) -> list[int]:
    """The definition of `top` in one line: Python's sort is stable."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def attention_row(layer: LayerView, head: int, row: int) -> list[float]:
    """Attention of query `row` over the tokens up to it."""
    keys = layer.keys[0, head * KV_HEADS // HEADS]
    logits = [float(layer.queries[0, head, row] @ keys[i]) / math.sqrt(DIM) for i in range(row + 1)]
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("length", [1, 5, 16, 17, 64, 100])
def test_snapkv_keeps_the_pooled_top_of_the_window_attention_and_the_window(length: int, pooling: str) -> None:
    layer, budget, window = view(length), 24, 16
    w = min(window, length)
    old = length - w
    for kv_head in range(2):
        mean = [0.0] * length
        for head in range(3 * kv_head, 3 * kv_head + 3):
            for row in range(old, length):
                for i, a in enumerate(attention_row(layer, head, row)):
                    mean[i] += a / w / 3
        around = [[mean[j] for j in (i - 1, i, i + 1) if 0 <= j < old] for i in range(old)]
        pooled = [max(values) if pooling == "max" else sum(values) / 3 for values in around]
        expected = [*best(pooled, max(0, budget - w)), *range(old, length)]
        policy = SnapKV(amount=Amount(budget), window=window, pool=3, pooling=pooling)
        assert kept(policy, layer, kv_head) == expected


def test_snapkv_with_a_budget_below_its_window_keeps_the_most_recent() -> None:
    assert kept(SnapKV(amount=Amount(3), window=16), view(50), 0) == [47, 48, 49]


@pytest.mark.parametrize("length", [1, 4, 5, 64, 100])
def test_streaming_keeps_the_sinks_and_the_most_recent(length: int) -> None:
    expected = list(range(length)) if length <= 10 else [0, 1, 2, 3, *range(length - 6, length)]
    for head in range(2):
        assert kept(Streaming(amount=Amount(10)), view(length), head) == expected


@pytest.mark.parametrize("length", LENGTHS)
def test_knorm_keeps_the_shortest_keys(length: int) -> None:
    layer = view(length)
    for head in range(KV_HEADS):
        norms = [math.sqrt(sum(x * x for x in key)) for key in layer.keys[0, head].tolist()]
        assert kept(KNorm(amount=Amount(7)), layer, head) == best([-n for n in norms], 7)


def test_knorm_separates_16_bit_keys_whose_16_bit_norms_are_equal() -> None:
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.03125]], dtype=torch.bfloat16).flip(0)[None, None]
    scores = KNorm(amount=Amount(1)).scores(replace(view(2), keys=keys))
    assert torch.linalg.vector_norm(keys, dim=-1).unique().numel() == 1
    assert scores[0, 0, 1] > scores[0, 0, 0]


@pytest.mark.parametrize("length", LENGTHS)
def test_keydiff_keeps_the_keys_least_like_the_mean_direction(length: int) -> None:
    layer = view(length)
    for head in range(KV_HEADS):
        keys = layer.keys[0, head].tolist()
        unit = [[x / math.hypot(*key) for x in key] for key in keys]
        mean = [sum(u[d] for u in unit) / length for d in range(DIM)]
        cosines = [sum(a * b for a, b in zip(u, mean, strict=True)) / math.hypot(*mean) for u in unit]
        assert kept(KeyDiff(amount=Amount(7)), layer, head) == best([-c for c in cosines], 7)


@pytest.mark.parametrize("length", LENGTHS)
def test_tova_keeps_one_set_by_the_last_query_and_the_last_token(length: int) -> None:
    layer = view(length)
    rows = [attention_row(layer, head, length - 1) for head in range(HEADS)]
    mean = [sum(row[i] for row in rows) / HEADS for i in range(length)]
    for head in range(KV_HEADS):
        assert kept(TOVA(amount=Amount(7)), layer, head) == [*best(mean[:-1], 6), length - 1]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("recent", [0.0, 0.5, 1.0])
def test_h2o_keeps_the_recent_tokens_and_the_largest_column_sums(length: int, recent: float) -> None:
    layer, budget = view(length), min(9, length)
    window = int(recent * budget)
    for kv_head in range(KV_HEADS):
        sums = [0.0] * length
        for head in range(3 * kv_head, 3 * kv_head + 3):
            for row in range(length):
                for i, a in enumerate(attention_row(layer, head, row)):
                    sums[i] += a / 3
        expected = [*best(sums[: length - window], budget - window), *range(length - window, length)]
        assert kept(H2O(amount=Amount(9), recent=recent), layer, kv_head) == expected


def step(slots: int, fresh: int) -> StepView:
    generator = torch.Generator().manual_seed(slots)
    positions = torch.arange(slots).mul(2).expand(1, KV_HEADS, slots)
    attention = torch.rand(1, KV_HEADS, HEADS // KV_HEADS, fresh, slots, generator=generator)
    sums = 10 * torch.rand(1, KV_HEADS, slots, generator=generator)
    return StepView(positions, attention, sums, seen=2 * slots, layer=0, layers=LAYERS, budget=slots - fresh)


@pytest.mark.parametrize("fresh", [1, 3])
def test_tova_drops_what_the_newest_token_attends_to_least(fresh: int) -> None:
    now = step(12, fresh)
    scores = TOVA(amount=Amount(9), when="always").step_scores(now)
    mean = now.attention[0, :, :, -1].mean((0, 1))[:-1].tolist()
    for head in range(KV_HEADS):
        assert best(scores[0, head].tolist(), now.budget) == [*best(mean, now.budget - 1), 11]


@pytest.mark.parametrize("fresh", [1, 3])
def test_h2o_drops_the_smallest_sum_outside_the_recent_window(fresh: int) -> None:
    now = step(12, fresh)
    scores = H2O(amount=Amount(9), when="always").step_scores(now)
    recent = now.budget // 2
    for head in range(KV_HEADS):
        heavy = best(now.column_sums[0, head, : 12 - recent].tolist(), now.budget - recent)
        assert best(scores[0, head].tolist(), now.budget) == [*heavy, *range(12 - recent, 12)]


def test_random_draws_differ_between_seeds_layers_and_heads() -> None:
    draw = Random(amount=Amount(50)).scores(view(100))
    assert torch.equal(draw, Random(amount=Amount(3)).scores(view(100)))
    assert not torch.equal(draw[:, 0], draw[:, 1])
    assert not torch.equal(draw, Random(amount=Amount(50)).scores(view(100, layer=1)))
    assert not torch.equal(draw, Random(amount=Amount(50), seed=1).scores(view(100)))
    # A seed must not repeat the draw of another seed's later layer.
    assert not torch.equal(
        Random(amount=Amount(50), seed=1).scores(view(100)), Random(amount=Amount(50)).scores(view(100, layer=1))
    )


def test_random_protects_sinks_and_recent_tokens_if_configured() -> None:
    mask = keep(Random(amount=Amount(12), sinks=2, recent=5), view(100))
    assert mask[..., :2].all()
    assert mask[..., -5:].all()
    assert mask.sum(-1).eq(12).all()
    # A budget below sinks + recent: sinks first.
    tight = keep(Random(amount=Amount(4), sinks=2, recent=5), view(100))
    assert tight[..., :2].all()
    assert tight[..., -5:].sum(-1).eq(2).all()


def test_random_protects_no_token_by_default() -> None:
    counts = sum(keep(Random(amount=Amount(0.25), seed=seed), view(20))[0, 0].int() for seed in range(400))
    # 400 draws of probability 1/4: mean 100, standard deviation 8.7; five of them over 20 tokens.
    assert all(56 <= n <= 144 for n in counts.tolist())


@pytest.mark.parametrize("amount", [Amount(0.25), Amount(1.0), Amount(0.01), Amount(1), Amount(33), Amount(100)])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_policy_keeps_exactly_its_budget(amount: Amount, length: int) -> None:
    layers = [view(length, layer, batch=2) for layer in range(LAYERS)]
    policies = [cls(amount=amount) for cls in PER_HEAD]
    for policy in policies:
        budgets = [policy.budget(layer, LAYERS, length) for layer in range(LAYERS)]
        assert all(1 <= b <= length for b in budgets)
        masks = policy.select([policy.scores(layer) for layer in layers])
        for mask, budget in zip(masks, budgets, strict=True):
            assert mask.shape == (2, KV_HEADS, length)
            assert mask.sum(-1).eq(budget).all(), policy
        pooled = AdaKV(amount=amount, inner=policy)
        for mask, budget in zip(pooled.select([pooled.scores(x) for x in layers]), budgets, strict=True):
            assert mask.sum((1, 2)).eq(KV_HEADS * budget).all(), pooled
            assert mask.sum(-1).ge(max(1, budget // 5)).all(), pooled
    zipped = KVzip(amount=amount)
    total = torch.stack(zipped.select([zipped.scores(x) for x in layers])).sum((0, 2, 3))
    assert total.eq(LAYERS * KV_HEADS * amount.tokens(length)).all()


@settings(deadline=None)
@given(st.sampled_from(PER_HEAD[:-1]), st.integers(1, 90), st.integers(1, 40))
def test_the_order_of_the_heads_does_not_matter(cls: type[Evictor], length: int, budget: int) -> None:
    layer, policy = view(length), cls(amount=Amount(budget))

    def swap(x: Tensor | None) -> Tensor:
        assert x is not None
        return x.unflatten(1, (KV_HEADS, -1)).flip(1).flatten(1, 2)

    names = ("keys", "values", "queries", "column_sums", "query_mean", "query_cov", "reconstruction")
    swapped = replace(layer, **{name: swap(getattr(layer, name)) for name in names})
    assert torch.equal(keep(policy, swapped), keep(policy, layer).flip(1))


# The others divide their budget differently for every amount: rungs, recent tokens and layers' shares.
@settings(deadline=None)
@given(
    st.sampled_from([*(c for c in PER_HEAD if c not in (H2O, LaCache, PyramidKV)), KVzip]),
    st.booleans(),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 90),
)
def test_a_larger_budget_keeps_everything_that_a_smaller_one_keeps(
    cls: type[Evictor], pooled: bool, length: int, a: int, b: int
) -> None:
    def masks(tokens: int) -> Tensor:
        policy = cls(amount=Amount(tokens))
        if pooled and cls is not KVzip:
            policy = AdaKV(amount=Amount(tokens), inner=policy)
        return torch.stack(policy.select([policy.scores(view(length, layer)) for layer in range(2)]))

    small, large = masks(min(a, b)), masks(max(a, b))
    assert (small & ~large).sum() == 0


def test_ties_keep_the_earlier_token() -> None:
    class Flat(Evictor):
        def scores(self, layer: LayerView) -> Tensor:
            return torch.zeros(layer.keys.shape[:3])

    assert kept(Flat(amount=Amount(5)), view(300), 0) == [0, 1, 2, 3, 4]
    assert kept(AdaKV(amount=Amount(5), inner=Flat(amount=Amount(5))), view(300), 1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cls", [*PER_HEAD, KVzip])
def test_a_policy_is_a_value(cls: type[Evictor]) -> None:
    assert cls(amount=Amount(5)) == cls(amount=Amount(5))
    assert len({cls(amount=Amount(5)), cls(amount=Amount(5)), cls(amount=Amount(6))}) == 2


def test_the_prefill_statistics_that_each_policy_requires() -> None:
    def required(cls: type[Evictor]) -> set[str]:
        stats_spec = vars(cls(amount=Amount(5)).stats_spec)
        return {name for name, value in stats_spec.items() if value}

    assert required(SnapKV) == required(PyramidKV) == required(TOVA) == {"queries"}
    assert required(H2O) == {"column_sums"}
    assert required(ExpectedAttention) == {"query_moments"}
    assert required(KVzip) == {"reconstruction"}
    assert KVzip(amount=Amount(5), plus=True).stats_spec == StatsSpec(reconstruction=True, reconstruction_plus=True)
    for cls in (Streaming, KNorm, KeyDiff, LaCache, Random):
        assert not required(cls)
    assert TOVA(amount=Amount(5)).stats_spec.queries == 1
    assert AdaKV(amount=Amount(5), inner=SnapKV(amount=Amount(5), window=9)).stats_spec.queries == 9


@pytest.mark.parametrize(
    ("cls", "wrong", "message"),
    [
        (SnapKV, {"pool": 4}, "odd number"),
        (PyramidKV, {"pool": 4}, "odd number"),
        (SnapKV, {"pooling": "min"}, "pooling must be average or max"),
        (PyramidKV, {"beta": 0}, "beta must be at least 1"),
        (PyramidKV, {"form": "other"}, "form must be kvpress or paper"),
        (ExpectedAttention, {"eps": -0.1}, "eps must be at least 0"),
        (Streaming, {"sinks": -1}, "sinks must be at least 0"),
        (H2O, {"recent": 1.5}, "recent must be a share"),
        (Random, {"seed": 65536}, "between 0 and 65535"),
        (ExpectedAttention, {"future": 0}, "future must be at least 1"),
        (LaCache, {"sinks": -1}, "sinks must be at least 0"),
        (LaCache, {"span": 3}, "less than span"),
        *((cls, {"when": "never"}, "prefill or always") for cls in (Streaming, TOVA, H2O, LaCache)),
    ],
)
def test_a_wrong_parameter_is_refused(
    cls: type[Evictor] | type[StepEvictor], wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(amount=Amount(5), **wrong)
