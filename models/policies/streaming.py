"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lceval.models.policies.base import LayerView, StepEvictor, StepView


@dataclass(frozen=True, kw_only=True)
class Streaming(StepEvictor):
    """Keep the first `sinks` tokens and the most recent ones (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453,
    section 3.2).

    Differs from the paper: kept tokens stay at their original positions; the paper renumbers them by cache slot.
    """

    evicts_while_reading: ClassVar[bool] = True
    evicts_while_writing: ClassVar[bool] = True

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError("sinks must be at least 0")

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: the position; the sinks score highest."""
        batch, heads, length, _ = layer.keys.shape
        recency = torch.arange(length, dtype=torch.float32, device=layer.keys.device)
        recency[: self.sinks] = torch.inf
        return recency.expand(batch, heads, length)

    def step_scores(self, view: StepView) -> Tensor:
        """[B, Hkv, N] float32: as `scores`."""
        return view.positions.float().masked_fill_(view.positions < self.sinks, torch.inf)
