"""KeyDiff: keys that differ from the others receive more attention from later queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.kernels.select import top
from lceval.models.policies.base import Evictor, LayerView, Threshold


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Evictor):
    """Keep the tokens whose keys are least similar to the mean key direction (Park et al. 2025, arXiv 2504.15364).

    score_i = -cos(k_i, mean_j k_j / ||k_j||). With `block` the context is taken block by block: the first tokens that
    the budget holds, then `block` more at a time, and of all of these the budget is kept again by their own mean.

    Differs from the paper: by default the mean is over the whole context; with `block` the selection is the paper's,
    but at the end of the prefill, so that every token has attended to all tokens before it.
    """

    has_scale: ClassVar[bool] = True
    evicts_while_reading: ClassVar[bool] = True
    evicts_while_writing: ClassVar[bool] = True

    block: int = 0

    def __post_init__(self) -> None:
        if self.block < 0:
            raise ValueError("block must be at least 0")
        if self.block and isinstance(self.amount, Threshold):
            raise ValueError("a block is reduced to a budget, which a threshold does not have: leave block out")
        if self.block and (self.read_chunk or self.write_every):
            raise ValueError("when=chunk and when=decode select chunk by chunk, as the paper does: leave block out")

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: negative cosine similarity to the mean of the normalised keys; -inf where a block
        evicted the token."""
        directions = F.normalize(layer.keys.float(), dim=-1)
        if not self.block:
            return _distances(directions)
        tokens = layer.tokens
        budget = self.budget(layer.layer, layer.layers, tokens)
        kept = torch.arange(budget, device=directions.device).expand(*directions.shape[:2], -1)
        distances = _distances(directions[:, :, :budget])
        for start in range(budget, tokens, self.block):
            new = torch.arange(start, min(start + self.block, tokens), device=kept.device)
            seen = torch.cat([kept, new.expand(*kept.shape[:2], -1)], 2)
            distances = _distances(directions.gather(2, seen[..., None].expand(-1, -1, -1, directions.shape[3])))
            # Positions ascend, so ties keep the earlier token.
            best = top(distances, budget)
            kept, distances = (x[best].view(*kept.shape[:2], budget) for x in (seen, distances))
        return torch.full(layer.keys.shape[:3], -torch.inf, device=kept.device).scatter_(2, kept, distances)


def _distances(directions: Tensor) -> Tensor:
    """Negative cosine similarity of directions [B, Hkv, S, D] to their mean: [B, Hkv, S]."""
    return -F.cosine_similarity(directions, directions.mean(2, keepdim=True), dim=-1)
