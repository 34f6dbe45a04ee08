"""Key norm: short keys tend to receive high attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lceval.models.policies.base import Evictor, LayerView


@dataclass(frozen=True, kw_only=True)
class KNorm(Evictor):
    """Keep the tokens with the smallest key norm (Devoto et al. 2024, arXiv 2406.11430).

    score_i = -||k_i||.

    Differs from the paper: every layer is compressed; the paper skips the first two.
    """

    has_scale: ClassVar[bool] = True
    evicts_while_reading: ClassVar[bool] = True
    evicts_while_writing: ClassVar[bool] = True

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: negative key norm, computed in float32 because most 16-bit norms would tie."""
        norms: Tensor = torch.linalg.vector_norm(layer.keys, dim=-1, dtype=torch.float32)
        return -norms
