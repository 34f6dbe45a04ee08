"""Expected attention: the attention of future queries to a token under a Gaussian model of queries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lceval.kernels.softmax import softmax_beside
from lceval.models.policies.base import SINKS, Evictor, LayerView, StatsSpec


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Evictor):
    """Keep the tokens with the highest expected attention from future queries (Devoto et al. 2025, arXiv 2510.00636).

    Queries before RoPE are modelled as N(mu, C). With R the mean RoPE rotation over the next `future` positions and c
    the scaling of the logits, the expected weight of a key is

        E[exp(c q.k)] = exp(c k.(R mu) + c^2/2 k.(R C R')k),

    normalised over the tokens, averaged over the query heads of a KV head and multiplied by ||v||. The first 4 tokens
    (sinks), which the model does not describe, are always kept.

    `eps` is added to the weight before the multiplication (kvpress's leaderboard: 0.01).

    Differs from the paper: as in kvpress, ||v|| replaces ||v W_O||, and `eps` is 0 by default.
    """

    future: int = 512
    eps: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eps < math.inf:
            raise ValueError("eps must be at least 0")
        if self.future < 1:
            raise ValueError("future must be at least 1")

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(query_moments=True)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: expected attention times the norm of the value; the first SINKS above all."""
        scores = torch.full(layer.keys.shape[:3], torch.inf, device=layer.keys.device)
        if scores.shape[-1] <= SINKS:
            return scores
        assert layer.query_mean is not None
        assert layer.query_cov is not None
        group = layer.query_mean.shape[1] // scores.shape[1]
        scaling, sink = layer.softmax.scaling, layer.softmax.sink
        rotation = self._rotation(layer)
        mean = layer.query_mean @ rotation.T
        cov = rotation @ layer.query_cov @ rotation.T
        # Head by head: the quadratic form of all heads at once would be as large as all queries of the context.
        for kv_head in range(scores.shape[1]):
            keys = layer.keys[:, kv_head, SINKS:].float()
            received = torch.zeros(keys.shape[:2], device=keys.device)
            for head in range(kv_head * group, (kv_head + 1) * group):
                linear = (keys @ mean[:, head, :, None]).squeeze(-1)
                quadratic = (keys @ cov[:, head] * keys).sum(-1)
                logits = scaling * linear + scaling**2 / 2 * quadratic
                received += logits.softmax(-1) if sink is None else softmax_beside(logits, sink[head])
            norms = torch.linalg.vector_norm(layer.values[:, kv_head, SINKS:], dim=-1, dtype=torch.float32)
            scores[:, kv_head, SINKS:] = (received / group + self.eps) * norms
        return scores

    def _rotation(self, layer: LayerView) -> Tensor:
        """[D, D] float32, the mean rotation of a query (a column) over the next `future` positions.

        RoPE rotates channels i and i + R/2 of the first R channels as a pair; the other channels are unchanged.
        """
        assert layer.rotary is not None
        length, dim = layer.keys.shape[2:]
        cos, sin = layer.rotary(torch.arange(length, length + self.future, device=layer.keys.device))
        cos, sin = cos.float().mean(0), sin.float().mean(0)
        low = torch.arange(cos.shape[0] // 2, device=cos.device)
        high = low + cos.shape[0] // 2
        rotation = torch.eye(dim, device=cos.device)
        rotation[: cos.shape[0], : cos.shape[0]] = torch.diag(cos)
        rotation[low, high] = -sin[low]
        rotation[high, low] = sin[high]
        return rotation
