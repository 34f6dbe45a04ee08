"""H2O: heavy hitters, the tokens with the highest attention summed over all queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lceval.models.policies.base import LayerView, StatsSpec, StepEvictor, StepView


@dataclass(frozen=True, kw_only=True)
class H2O(StepEvictor):
    """Keep the most recent tokens and those with the largest attention sums (Zhang et al. 2023, arXiv 2306.14048,
    algorithm 1).

    A share `recent` of the budget, rounded down, is reserved for the most recent tokens; the rest goes to the largest
    sum_q A[q, i] over all queries, averaged over the query heads of a KV head. Sums are not normalised by the number
    of queries that can attend to a token, so early tokens are favoured, as in the paper.

    Differs from the paper: during prefill the sums are of the full causal attention; the paper sums the attention over
    the slots left at each step, as `when=always` does after the prefill.

    Cost: the prefill computes the attention of all queries a second time.
    """

    recent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent <= 1:
            raise ValueError("recent must be a share of the budget, between 0.0 and 1.0")

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(column_sums=True)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: attention sums; the recent tokens score highest, the latest first."""
        assert layer.column_sums is not None
        length = layer.keys.shape[2]
        return self._protect_recent(layer.column_sums, length, self.budgeted.tokens(length))

    def step_scores(self, view: StepView) -> Tensor:
        """[B, Hkv, N] float32: as `scores`."""
        return self._protect_recent(view.column_sums, view.seen, view.budget)

    def _protect_recent(self, sums: Tensor, seen: int, budget: int) -> Tensor:
        slots = sums.shape[-1]
        recent = min(slots, int(self.recent * budget))
        # Each of `seen` queries adds at most 1 to a sum.
        first = seen + 1
        window = torch.arange(first, first + recent, dtype=sums.dtype, device=sums.device)
        return torch.cat([sums[..., : slots - recent], window.expand(*sums.shape[:-1], recent)], -1)
