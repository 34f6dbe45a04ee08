"""KVzip: what a model looks at when it repeats the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lceval.kernels.select import top
from lceval.models.policies.base import SINKS, Evictor, LayerView, StatsSpec


@dataclass(frozen=True, kw_only=True)
class KVzip(Evictor):
    """Keep what drew the most attention while the context was read again (Kim et al. 2025, arXiv 2505.23416).

    A slot's score is the highest attention that any query of the repetition paid to it, and the slots of all layers
    and heads compete for one budget. The first tokens stay in every head: as sinks they draw attention whatever
    is repeated.
    """

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(reconstruction=True)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: the attention received in the second pass."""
        assert layer.reconstruction is not None
        return layer.reconstruction

    def select(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Masks [B, Hkv, S] of what stays; ties keep the earlier token, then the lower layer, then the lower head."""
        heads = [s.shape[1] for s in scores]
        slots = sum(s.shape[1] * self.budget(layer, len(scores), s.shape[-1]) for layer, s in enumerate(scores))
        pooled = torch.cat(list(scores), 1)
        pooled[..., :SINKS] = torch.inf
        # [B, S, layers * Hkv], so that a tie goes to the earlier token.
        pooled = pooled.transpose(1, 2)
        keep = top(pooled.flatten(1), slots).view(pooled.shape).transpose(1, 2)
        # The kernels that gather slots read a head's mask as contiguous bytes.
        return list(torch.split(keep.contiguous(), heads, 1))
