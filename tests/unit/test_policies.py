"""Each policy against its definition, written out slowly."""

from __future__ import annotations

import math

import pytest
import torch

from lceval.models.policies import Amount, Evictor, LayerView, SnapKV, Streaming


def view(length: int, window: int = 16, heads: int = 6, kv_heads: int = 2) -> LayerView:
    generator = torch.Generator().manual_seed(length)
    keys, values = (torch.randn(1, kv_heads, length, 8, generator=generator) for _ in range(2))
    queries = torch.randn(1, heads, min(window, length), 8, generator=generator)
    return LayerView(keys, values, queries, 8**-0.5, layer=0, layers=1)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 64, 100])
def test_snapkv_keeps_the_pooled_top_of_the_window_attention_and_the_window(length: int) -> None:
    layer, budget, window = view(length), 24, 16
    keep = SnapKV(amount=Amount(budget), window=window, pool=3).keep(layer)
    w = min(window, length)
    for kv_head in range(2):
        mean = [0.0] * length
        for head in range(3 * kv_head, 3 * kv_head + 3):
            for row in range(w):
                seen = length - w + row + 1
                logits = [
                    float(layer.queries[0, head, row] @ layer.keys[0, kv_head, i]) / math.sqrt(8) for i in range(seen)
                ]
                total = sum(math.exp(x) for x in logits)
                for i, x in enumerate(logits):
                    mean[i] += math.exp(x) / total / w / 3
        old = length - w
        pooled = [sum(mean[j] for j in (i - 1, i, i + 1) if 0 <= j < old) / 3 for i in range(old)]
        best = sorted(range(old), key=lambda i: -pooled[i])[: max(0, budget - w)]
        expected = sorted([*best, *range(old, length)])
        assert keep[0, kv_head].nonzero().squeeze(-1).tolist() == expected


def test_snapkv_with_a_budget_below_its_window_keeps_the_most_recent() -> None:
    keep = SnapKV(amount=Amount(3), window=16).keep(view(50))
    assert keep[0, 0].nonzero().squeeze(-1).tolist() == [47, 48, 49]


@pytest.mark.parametrize("length", [1, 4, 5, 64, 100])
def test_streaming_keeps_the_sinks_and_the_most_recent(length: int) -> None:
    keep = Streaming(amount=Amount(10)).keep(view(length))
    expected = list(range(length)) if length <= 10 else [0, 1, 2, 3, *range(length - 6, length)]
    for head in range(2):
        assert keep[0, head].nonzero().squeeze(-1).tolist() == expected


@pytest.mark.parametrize("amount", [Amount(0.25), Amount(1.0), Amount(1), Amount(33)])
@pytest.mark.parametrize("cls", [SnapKV, Streaming])
def test_every_head_keeps_exactly_the_budget(cls: type[Evictor], amount: Amount) -> None:
    for length in (1, 17, 63, 64, 65, 200):
        keep = cls(amount=amount).keep(view(length, window=64))
        assert keep.sum(-1).eq(amount.tokens(length)).all()


def test_ties_keep_the_earlier_token() -> None:
    class Flat(Evictor):
        def scores(self, layer: LayerView) -> torch.Tensor:
            return torch.zeros(layer.keys.shape[:3])

    assert Flat(amount=Amount(5)).keep(view(300))[0, 0].nonzero().squeeze(-1).tolist() == [0, 1, 2, 3, 4]
