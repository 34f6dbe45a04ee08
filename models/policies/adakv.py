"""AdaKV: the heads of a layer share one budget and keep different numbers of slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lceval.kernels.select import top
from lceval.models.policies.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class AdaKV(Wrapper):
    """Allocate a layer's budget across its heads by the highest scores (Feng et al. 2024, arXiv 2407.11550,
    algorithm 1).

    The scores of the inner evictor (key `of`) for all KV heads of a layer are pooled, and the Hkv * budget highest are
    kept. Each head first keeps its own `floor` * budget highest (at least one). The inner evictor sets the layer's
    budget; keys of the inner evictor are keys of adakv too.

    Differs from the paper: the floor is that of kvpress; the paper interpolates a head's share with an equal share.
    """

    evicts_while_writing: ClassVar[bool] = True

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError("floor must be a share of the budget, between 0.0 and 1.0")

    def keep(self, scores: Tensor, layer: int, layers: int) -> Tensor:
        """The mask [B, Hkv, S] of kept slots of one layer; ties keep the earlier token, then the lower head."""
        heads, budget = scores.shape[1], self.budget(layer, layers, scores.shape[-1])
        guaranteed = int(self.floor * budget)
        if self.floor > 0 and budget > 0:
            guaranteed = max(1, guaranteed)
        floor = top(scores, guaranteed)
        rest = scores.masked_fill(floor, -torch.inf).transpose(1, 2)
        pooled = top(rest.flatten(1), heads * (budget - guaranteed)).view(rest.shape).transpose(1, 2)
        return floor | pooled
