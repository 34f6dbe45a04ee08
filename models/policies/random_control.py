"""The random baseline: tokens drawn uniformly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lceval.models.policies.base import Evictor, LayerView


@dataclass(frozen=True, kw_only=True)
class Random(Evictor):
    """Keep the first `sinks` tokens, the last `recent`, and tokens drawn uniformly and independently by each head.

    By default no token is protected. With the tokens that other methods protect (`sinks=4:recent=64`) it is the
    stronger baseline: a better method must select well between both ends. The draw depends only on `seed`, layer and
    shape, on any device.
    """

    evicts_while_writing: ClassVar[bool] = True

    seed: int = 0
    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        # PyTorch's CPU generator uses 32 bits of its seed; 16 of them go to the layer.
        if not 0 <= self.seed < 1 << 16:
            raise ValueError("seed must be between 0 and 65535")
        if self.sinks < 0 or self.recent < 0:
            raise ValueError("sinks and recent must be at least 0")

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32, uniform in [0, 1); sinks score highest, then the recent tokens."""
        generator = torch.Generator().manual_seed((self.seed << 16) + layer.layer)
        scores = torch.rand(layer.keys.shape[:3], generator=generator)
        scores[..., max(0, scores.shape[-1] - self.recent) :] += 1
        scores[..., : self.sinks] = torch.inf
        return scores.to(layer.keys.device)
