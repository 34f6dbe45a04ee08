"""AdaKV: heads of a layer compete for one budget, so they keep different counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lceval.kernels.select import top
from lceval.models.policies.base import Evictor, LayerView, StatsSpec, StepEvictor


@dataclass(frozen=True, kw_only=True)
class AdaKV(Evictor):
    """Spend a layer's budget on the best scores of all its heads together (Feng et al. 2024, arXiv 2407.11550).

    Algorithm 1: pool the scores that `inner` gives to all KV heads of a layer and keep the Hkv * budget highest. Each
    head first gets its own `floor` * budget best (at least one), as in kvpress; the paper instead mixes what a head
    won with an equal share. `inner` sets the layer's budget.
    """

    inner: Evictor
    floor: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError("floor is a share of the budget, between 0.0 and 1.0")
        if self.inner.amount != self.amount:
            raise ValueError("adakv and the evictor inside it have one amount")
        if not self.inner.is_even():
            raise ValueError("adakv needs an evictor that gives every head the same budget, so not adakv or kvzip")
        if isinstance(self.inner, StepEvictor) and self.inner.when != "prefill":
            raise ValueError("adakv acts at the end of prefill alone, so when=always has no meaning inside it")

    @property
    def stats_spec(self) -> StatsSpec:
        return self.inner.stats_spec

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: those of `inner`, which must be comparable between heads."""
        return self.inner.scores(layer)

    def budget(self, layer: int, layers: int, tokens: int) -> int:
        """Slots per KV head that a layer keeps on average."""
        return self.inner.budget(layer, layers, tokens)

    def keep(self, scores: Tensor, layer: int, layers: int) -> Tensor:
        """The mask [B, Hkv, S] of what stays of one layer; ties keep the earlier token, then the lower head."""
        heads, budget = scores.shape[1], self.budget(layer, layers, scores.shape[-1])
        own = int(self.floor * budget)
        if self.floor > 0 and budget > 0:
            own = max(1, own)
        safe = top(scores, own)
        rest = scores.masked_fill(safe, -torch.inf).transpose(1, 2)
        won = top(rest.flatten(1), heads * (budget - own)).view(rest.shape).transpose(1, 2)
        return safe | won
