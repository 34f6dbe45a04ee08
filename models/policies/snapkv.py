"""SnapKV: what the last tokens of the context attended to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.models.policies.base import Evictor, LayerView, StatsSpec


@dataclass(frozen=True, kw_only=True)
class SnapKV(Evictor):
    """Keep the tokens that the last `window` queries attended to most, and the window (Li et al. 2024, eq. 4).

    Attention is averaged over the window, smoothed along the tokens by an average pool of width `pool`, and averaged
    over the query heads of a KV head. The window counts towards the budget; a budget smaller than the window keeps
    the most recent tokens alone.
    """

    window: int = 64
    pool: int = 5

    def __post_init__(self) -> None:
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise ValueError("window is at least 1, pool an odd number")

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(queries=self.window)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: pooled attention; the window above all, its latest token first."""
        received = layer.window_scores(self.window)
        w = min(self.window, layer.queries.shape[2])
        old = received[..., : received.shape[-1] - w]
        if old.shape[-1]:
            # Of the mean over the query heads: the same as the mean of what is pooled for each.
            old = F.avg_pool1d(old, self.pool, stride=1, padding=self.pool // 2)
        # Attention is at most 1, so 2 and more is above all of it.
        window = torch.arange(2, w + 2, dtype=torch.float32, device=old.device)
        return torch.cat([old, window.expand(*old.shape[:2], w)], -1)
