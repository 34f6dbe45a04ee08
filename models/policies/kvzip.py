"""KVzip: the attention that tokens receive while the model reconstructs the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lceval.models.policies.base import SINKS, Evictor, LayerView, StatsSpec, Threshold
from lceval.models.policies.pooled import top_pooled


@dataclass(frozen=True, kw_only=True)
class KVzip(Evictor):
    """Keep the slots with the highest attention while the model reconstructs the context (Kim et al. 2025,
    arXiv 2505.23416).

    A slot's score is the maximum attention from any query of the reconstruction, and the slots of all layers and heads
    compete for one budget. The first 4 tokens (sinks) are kept in every head, since they receive attention whatever is
    repeated.

    Differs from the paper: the request to repeat the context is worded differently.

    Cost: a second forward pass over the context during prefill.
    """

    has_scale: ClassVar[bool] = True

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(reconstruction=True)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: maximum attention received during reconstruction."""
        assert layer.reconstruction is not None
        return layer.reconstruction

    def select(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The masks [B, Hkv, S] of kept slots; ties keep the earlier token, then the lower layer and head."""
        protected = [s.clone() for s in scores]
        for s in protected:
            s[..., :SINKS] = torch.inf
        if isinstance(self.amount, Threshold):
            return super().select(protected)
        slots = (s.shape[1] * self.budget(layer, len(scores), s.shape[-1]) for layer, s in enumerate(scores))
        return top_pooled(protected, sum(slots))
