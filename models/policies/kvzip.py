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
    compete for one budget. Every head keeps the first 4 tokens (sinks) and whatever the chat template puts before the
    user's message: system prompt and user header.

    `plus=true` is KVzip+ (arXiv 2601.07891): before the maximum is taken, the attention is divided by the norm of the
    query token's attention input and multiplied by the norm of W_O v of the slot.

    Differs from the paper: as in kvpress, the budget includes the tokens that are always kept, and the context is
    repeated in chunks of 2,048 tokens (the authors' code: 2,000).

    Cost: a second forward pass over the context during prefill.
    """

    has_scale: ClassVar[bool] = True

    plus: bool = False

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(reconstruction=True, reconstruction_plus=self.plus)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: maximum attention received during reconstruction; infinite for protected tokens."""
        received = layer.reconstruction_plus if self.plus else layer.reconstruction
        assert received is not None
        scores = received.clone()
        scores[..., : max(SINKS, layer.protected)] = torch.inf
        return scores

    def select(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The masks [B, Hkv, S] of kept slots; ties keep the earlier token, then the lower layer and head."""
        if isinstance(self.amount, Threshold):
            return super().select(scores)
        slots = (s.shape[1] * self.budget(layer, len(scores), s.shape[-1]) for layer, s in enumerate(scores))
        return top_pooled(scores, sum(slots))
