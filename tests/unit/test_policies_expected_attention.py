"""Expected attention against rotations computed position by position, and against sampled queries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lceval.kernels.softmax import Softmax
from lceval.models.policies.base import SINKS, Amount, LayerView
from lceval.models.policies.expected_attention import ExpectedAttention

HEADS, KV_HEADS, DIM = 6, 2, 8


def view(length: int, rotated: int = DIM, spread: float = 1.0, batch: int = 2) -> LayerView:
    """A layer with the moments of its queries; the first `rotated` channels rotate."""
    generator = torch.Generator().manual_seed(length + rotated)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].double() * 5.0 ** -torch.arange(rotated // 2)
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    root = spread * normal(batch, HEADS, DIM, DIM) / math.sqrt(DIM)
    return LayerView(
        keys=normal(batch, KV_HEADS, length, DIM),
        values=normal(batch, KV_HEADS, length, DIM),
        queries=normal(batch, HEADS, 1, DIM),
        softmax=Softmax(DIM**-0.5),
        layer=0,
        layers=1,
        query_mean=normal(batch, HEADS, DIM),
        query_cov=root @ root.transpose(2, 3),
        rotary=rotary,
    )


def rotate(x: Tensor, position: int, rotated: int) -> Tensor:
    """RoPE of x [..., D] at one position, pair by pair."""
    out = x.clone()
    half = rotated // 2
    for i in range(half):
        angle = position * 5.0**-i
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * math.cos(angle) - b * math.sin(angle)
        out[..., i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("rotated", [DIM, 4])
@pytest.mark.parametrize(("length", "future"), [(5, 1), (17, 16), (65, 512), (200, 3)])
def test_scores_follow_the_formula_position_by_position(length: int, future: int, rotated: int) -> None:
    layer = view(length, rotated)
    assert layer.query_mean is not None
    assert layer.query_cov is not None
    scores = ExpectedAttention(amount=Amount(5), future=future).scores(layer)
    raised = ExpectedAttention(amount=Amount(5), future=future, eps=0.01).scores(layer)
    ahead = range(length, length + future)
    means = sum(rotate(layer.query_mean.double(), p, rotated) for p in ahead) / future
    # The mean rotation, column by column: the image of each basis vector.
    basis = torch.eye(DIM, dtype=torch.float64)
    rotation = (sum(rotate(basis, p, rotated) for p in ahead) / future).T
    for b in range(2):
        for kv_head in range(KV_HEADS):
            expected = torch.zeros(length - SINKS, dtype=torch.float64)
            for head in range(3 * kv_head, 3 * kv_head + 3):
                cov = rotation @ layer.query_cov[b, head].double() @ rotation.T
                keys = layer.keys[b, kv_head, SINKS:].double()
                scaling = layer.softmax.scaling
                logits = [float(means[b, head] @ k * scaling + k @ cov @ k * scaling**2 / 2) for k in keys]
                total = sum(math.exp(x) for x in logits)
                expected += torch.tensor([math.exp(x) / total / 3 for x in logits])
            norms = layer.values[b, kv_head, SINKS:].double().norm(dim=-1)
            # Float32 against float64: largest measured error 1.5e-6.
            torch.testing.assert_close(scores[b, kv_head, SINKS:].double(), expected * norms, rtol=1e-5, atol=0)
            torch.testing.assert_close(
                raised[b, kv_head, SINKS:].double(), (expected + 0.01) * norms, rtol=1e-5, atol=0
            )


def test_the_expected_weight_is_the_mean_over_sampled_queries() -> None:
    """One future position, where the model is exact: queries N(mu, C), rotated, and E[exp(c q.k)] estimated."""
    length, draws = 12, 200_000
    layer = view(length, spread=0.5, batch=1)
    assert layer.query_mean is not None
    assert layer.query_cov is not None
    scores = ExpectedAttention(amount=Amount(5), future=1).scores(layer)
    generator = torch.Generator().manual_seed(0)
    for kv_head in range(KV_HEADS):
        keys = layer.keys[0, kv_head, SINKS:].double()
        mean = torch.zeros(len(keys), dtype=torch.float64)
        error = torch.zeros_like(mean)
        for head in range(3 * kv_head, 3 * kv_head + 3):
            root = torch.linalg.cholesky(layer.query_cov[0, head].double())
            noise = torch.randn(draws, DIM, generator=generator, dtype=torch.float64)
            queries = rotate(layer.query_mean[0, head].double() + noise @ root.T, length, DIM)
            weights = (queries @ keys.T * layer.softmax.scaling).exp()
            mean += weights.mean(0) / weights.mean(0).sum() / 3
            error += weights.std(0) / weights.mean(0).sum() / 3 / math.sqrt(draws)
        got = scores[0, kv_head, SINKS:].double() / layer.values[0, kv_head, SINKS:].double().norm(dim=-1)
        assert ((got - mean).abs() < 5 * error).all()


@pytest.mark.parametrize("length", [1, SINKS, SINKS + 1])
def test_a_context_of_sinks_only_requires_no_statistics(length: int) -> None:
    layer = view(length)
    if length <= SINKS:
        layer = LayerView(layer.keys, layer.values, layer.queries, Softmax(1.0), 0, 1)
    scores = ExpectedAttention(amount=Amount(2)).scores(layer)
    assert scores.shape == (2, KV_HEADS, length)
    assert scores[..., :SINKS].eq(torch.inf).all()
    assert scores[..., SINKS:].isfinite().all()
    assert scores.dtype == torch.float32
