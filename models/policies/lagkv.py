"""LagKV: tokens that stand out from the tokens after them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lceval.models.policies.base import SINKS, Evictor, LayerView


@dataclass(frozen=True, kw_only=True)
class LagKV(Evictor):
    """Keep the tokens whose keys and values vary most on the scale of the next tokens (Liang et al. 2025,
    arXiv 2504.04704, eq. 1-7).

    After the first `sinks` tokens the context is divided into partitions of `lag` tokens. The keys of a partition are
    scaled, channel by channel, by minimum and maximum of the next partition. The score of a token is the standard
    deviation of its scaled key over the channels, as a softmax over the partition; likewise of its value; mean of both.
    A token competes by its rank within its partition, or by the score itself (`cross=true`). The sinks, the last
    complete partition and what follows it are always kept. A context without two complete partitions keeps its sinks
    and its most recent tokens.

    Differs from the paper: as in kvpress, the budget is of the whole context, and the tokens that are always kept are
    part of it.
    """

    sinks: int = SINKS
    lag: int = 128
    cross: bool = False

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError("sinks must be at least 0")
        if self.lag < 2:
            raise ValueError("lag must be at least 2")

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32 in [0, 1], the protected tokens above: sinks first, then the most recent."""
        batch, heads, length, _ = layer.keys.shape
        recency = torch.arange(length, dtype=torch.float32, device=layer.keys.device) + 2
        recency[: self.sinks] = torch.inf
        scores = recency.repeat(batch, heads, 1)
        partitions = max(0, length - self.sinks) // self.lag
        if partitions > 1:
            scored = slice(self.sinks, self.sinks + (partitions - 1) * self.lag)
            both = slice(self.sinks, self.sinks + partitions * self.lag)
            spread = (self._spread(layer.keys[:, :, both].float()) + self._spread(layer.values[:, :, both].float())) / 2
            if not self.cross:
                spread = spread.argsort(-1).argsort(-1).float() / self.lag
            scores[..., scored] = spread.flatten(2)
        return scores

    def _spread(self, states: Tensor) -> Tensor:
        """states: [B, Hkv, P * lag, D] of P partitions. Returns [B, Hkv, P - 1, lag]."""
        batch, heads, _, dim = states.shape
        partitions = states.reshape(batch, heads, -1, self.lag, dim)
        low, high = partitions[:, :, 1:].aminmax(dim=3, keepdim=True)
        spread: Tensor = ((partitions[:, :, :-1] - low) / (high - low)).std(-1)
        return spread.softmax(-1)
