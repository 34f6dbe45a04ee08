"""H2O: heavy hitters, the tokens that all queries together attended to most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lceval.models.policies.base import LayerView, StatsSpec, StepEvictor, StepView


@dataclass(frozen=True, kw_only=True)
class H2O(StepEvictor):
    """Keep the most recent tokens and the tokens with the largest attention sums (Zhang et al. 2023, algorithm 1).

    A share `recent` of the budget, rounded down, is reserved for the most recent tokens; the rest goes to the largest
    sum_q A[q, i], taken over every query of the full causal attention and averaged over the query heads of a KV head.
    The paper sums the attention over what was left at each step; so does `when=always` once the context is read. Sums
    are not divided by how many queries could see a token, so early tokens are favoured, as in the paper.
    """

    recent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent <= 1:
            raise ValueError("recent is a share of the budget, between 0.0 and 1.0")

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(column_sums=True)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: attention sums, the recent tokens above all, their latest first."""
        assert layer.column_sums is not None
        length = layer.keys.shape[2]
        return self._guard(layer.column_sums, length, self.amount.tokens(length))

    def step_scores(self, view: StepView) -> Tensor:
        """[B, Hkv, N] float32: as `scores`."""
        return self._guard(view.column_sums, view.seen, view.budget)

    def _guard(self, sums: Tensor, seen: int, budget: int) -> Tensor:
        slots = sums.shape[-1]
        recent = min(slots, int(self.recent * budget))
        # Each of `seen` queries gave a token at most 1.
        first = seen + 1
        window = torch.arange(first, first + recent, dtype=sums.dtype, device=sums.device)
        return torch.cat([sums[..., : slots - recent], window.expand(*sums.shape[:-1], recent)], -1)
