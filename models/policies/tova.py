"""TOVA: what the last token attended to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lceval.models.policies.base import LayerView, StatsSpec, StepEvictor, StepView


@dataclass(frozen=True, kw_only=True)
class TOVA(StepEvictor):
    """Keep the tokens that the last query attended to most, averaged over all heads (Oren et al. 2024).

    All heads of a layer keep one set. The paper (arXiv 2401.06104) lets the last token go when it attends little to
    itself; here it stays. Several tokens read at once are judged by the last of them, where the paper goes one by one.
    """

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(queries=1)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32, the same for every head: attention of the last query, the last token above all."""
        return _one_set(layer.window_scores(1))

    def step_scores(self, view: StepView) -> Tensor:
        """[B, Hkv, N] float32: as `scores`; all heads hold the same slots, so they go on doing so."""
        return _one_set(view.attention[..., -1, :].mean(2))


def _one_set(attention: Tensor) -> Tensor:
    """attention: [B, Hkv, S] of one query; returns its mean over the heads [B, Hkv, S], the last token above all."""
    mean = attention.mean(1)
    # Attention is at most 1.
    mean = torch.cat([mean[:, :-1], mean.new_full((mean.shape[0], 1), 2.0)], -1)
    return mean[:, None].expand(-1, attention.shape[1], -1)
