"""SnapKV: the attention of the last tokens of the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.models.policies.base import Evictor, LayerView, StatsSpec


@dataclass(frozen=True, kw_only=True)
class SnapKV(Evictor):
    """Keep the window and the tokens with the highest attention from its queries (Li et al. 2024, arXiv 2404.14469,
    eq. 4).

    The window is the last `window` tokens. Their attention is averaged over the window and the query heads of a KV
    head, and smoothed along the tokens by a pool of width `pool` (`pooling`: average or max). The window counts towards
    the budget; a budget below the window keeps only the most recent tokens.

    Differs from the paper: the defaults are those of kvpress, while the paper's LongBench runs use window=32, pool=7,
    pooling=max; the query heads of a KV head select together, by the pool of their mean, while the paper pools and
    selects for each query head, and stores its KV head as many times.
    """

    evicts_while_reading: ClassVar[bool] = True
    evicts_while_writing: ClassVar[bool] = True

    window: int = 64
    pool: int = 5
    pooling: str = "average"

    def __post_init__(self) -> None:
        if self.pooling not in ("average", "max"):
            raise ValueError("pooling must be average or max")
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise ValueError("window must be at least 1, pool an odd number")

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(queries=self.window)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: pooled attention; the window scores highest, its latest token first."""
        received = layer.window_scores(self.window)
        w = min(self.window, layer.queries.shape[2])
        old = received[..., : received.shape[-1] - w]
        if old.shape[-1]:
            pool = F.avg_pool1d if self.pooling == "average" else F.max_pool1d
            old = pool(old, self.pool, stride=1, padding=self.pool // 2)
        # Mean attention is at most 1, so scores from 2 on rank above it.
        window = torch.arange(2, w + 2, dtype=torch.float32, device=old.device)
        return torch.cat([old, window.expand(*old.shape[:2], w)], -1)
