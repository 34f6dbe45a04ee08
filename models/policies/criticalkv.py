"""CriticalKV: scores weighted by what a value adds to the hidden state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lceval.kernels.select import top
from lceval.models.policies.base import LayerView, StatsSpec
from lceval.models.policies.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class CriticalKV(Wrapper):
    """Keep half of the budget by the scores of another evictor, the rest by score times output norm (Feng et al. 2025,
    arXiv 2502.03805, algorithm 1).

    A share `first` of each head's budget is kept by the scores s of the inner evictor (key `of`). The rest is kept by
    (s_i + `offset`) ||W_O v_i||_1, with the norm averaged over the query heads of a KV head. Keys of the inner evictor
    are keys of criticalkv too.

    Differs from the paper: as in kvpress, the query heads of a KV head select together.

    Cost: one product of the values with the output projection for every query head.
    """

    first: float = 0.5
    offset: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first <= 1:
            raise ValueError("first must be a share of the budget, between 0.0 and 1.0")
        if self.offset < 0:
            raise ValueError("offset must be at least 0")

    @property
    def stats_spec(self) -> StatsSpec:
        return replace(self.inner.stats_spec, output_norms=True)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32 of the context's tokens: the weighted scores; those of the first stage score highest."""
        assert layer.output_norms is not None
        scores = self.inner.scores(layer)[..., : layer.tokens]
        budget = self.budget(layer.layer, layer.layers, layer.tokens)
        stage = top(scores, max(1, int(self.first * budget)) if self.first else 0)
        # Scores of protected tokens are infinite, and norms can be 0.
        stage |= scores.isinf()
        return ((scores + self.offset) * layer.output_norms).masked_fill(stage, torch.inf)
