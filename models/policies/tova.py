"""TOVA: the attention of the last token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lceval.models.policies.base import LayerView, StatsSpec, StepEvictor, StepView


@dataclass(frozen=True, kw_only=True)
class TOVA(StepEvictor):
    """Keep the tokens with the highest attention from the last query, averaged over heads (Oren et al. 2024,
    arXiv 2401.06104).

    All heads of a layer keep the same tokens.

    Differs from the paper: the last token is always kept; the paper evicts it if it attends little to itself. Several
    tokens in one forward pass are scored by the last of them; the paper processes them one by one.
    """

    evicts_while_reading: ClassVar[bool] = True
    evicts_while_writing: ClassVar[bool] = True

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(queries=1)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32, equal for all heads: attention of the last query; the last token scores highest."""
        return _shared_scores(layer.window_scores(1))

    def step_scores(self, view: StepView) -> Tensor:
        """[B, Hkv, N] float32: as `scores`; equal for all heads, so they keep the same slots."""
        return _shared_scores(view.attention[..., -1, :].mean(2))


def _shared_scores(attention: Tensor) -> Tensor:
    """attention: [B, Hkv, S] of one query. Returns the mean over heads [B, Hkv, S]; the last token scores highest."""
    mean = attention.mean(1)
    # Attention is at most 1.
    mean = torch.cat([mean[:, :-1], mean.new_full((mean.shape[0], 1), 2.0)], -1)
    return mean[:, None].expand(-1, attention.shape[1], -1)
