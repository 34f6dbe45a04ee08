"""ChunkKV: neighbouring tokens are kept or evicted together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lceval.models.policies.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class ChunkKV(Wrapper):
    """Keep the chunks of `length` tokens with the highest mean scores of another evictor (Liu et al. 2025,
    arXiv 2502.00299, algorithm 1).

    The scores of the inner evictor (key `of`) are added up over the KV heads of a layer, which keep the same tokens.
    The last chunk that fits only partly into the budget keeps its first tokens. Keys of the inner evictor are keys of
    chunkkv too.

    Differs from the paper: no layer reuses the selection of the one below; the budget is exact, while the paper keeps
    whole chunks only.
    """

    length: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise ValueError("length must be at least 1")

    def keep(self, scores: Tensor, layer: int, layers: int) -> Tensor:
        """The mask [B, Hkv, S] of kept slots of one layer; ties keep the earlier chunk."""
        batch, heads, tokens = scores.shape
        chunk = torch.arange(tokens, device=scores.device) // self.length
        sizes = torch.bincount(chunk) if tokens else chunk
        means = scores.new_zeros(batch, len(sizes)).index_add_(1, chunk, scores.sum(1)) / sizes
        order = means.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(len(sizes), device=order.device).expand_as(order)
        )
        by_chunk = rank[:, chunk].argsort(dim=-1, stable=True)[:, : self.budget(layer, layers, tokens)]
        mask = torch.zeros(batch, tokens, dtype=torch.bool, device=scores.device).scatter_(1, by_chunk, True)
        return mask[:, None].expand(-1, heads, -1).contiguous()
