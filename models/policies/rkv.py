"""R-KV: important tokens that do not repeat one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.models.policies.base import Evictor, LayerView, StatsSpec

# Rows of the similarity matrix that are computed at a time.
ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class RKV(Evictor):
    """Keep the tokens that receive attention and whose keys are unlike the others' (R-KV, Cai et al. 2025,
    arXiv 2505.24133, section 3).

    score = `mix` * importance - (1 - `mix`) * redundancy. The importance is the attention of the last `window` tokens
    to the tokens before them (largest logit of the query heads of a KV head, mean over the window, max pool of width
    `pool`). The redundancy is a softmax of the mean cosine similarity of a key to all others, in which the latest of
    the keys that are more similar than `similar` to another does not count. The window is kept, and counts towards the
    budget. Meant for when=decode.

    Differs from the paper: the defaults are those of the authors' code.

    Cost: the similarities of all pairs of kept keys at each eviction.
    """

    evicts_while_reading: ClassVar[bool] = True
    evicts_while_writing: ClassVar[bool] = True

    window: int = 8
    pool: int = 7
    mix: float = 0.07
    similar: float = 0.5

    def __post_init__(self) -> None:
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise ValueError("window must be at least 1, pool an odd number")
        if not 0 <= self.mix <= 1:
            raise ValueError("mix must be between 0.0 and 1.0")

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(queries=self.window)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32; the window scores highest, its latest token first."""
        w = min(self.window, layer.queries.shape[2], layer.keys.shape[2])
        keys = layer.keys.float()
        batch, kv_heads, length, dim = keys.shape
        old = length - w
        scores = torch.arange(length, dtype=torch.float32, device=keys.device).add_(2).repeat(batch, kv_heads, 1)
        if old:
            q = layer.queries[:, :, layer.queries.shape[2] - w :].float().reshape(batch, kv_heads, -1, w, dim)
            logits = torch.matmul(q, keys[:, :, None, :old].transpose(3, 4)).amax(2) * layer.softmax.scaling
            importance = F.max_pool1d(logits.softmax(-1).mean(2), self.pool, stride=1, padding=self.pool // 2)
            scores[..., :old] = self.mix * importance - (1 - self.mix) * self._redundancy(keys)[..., :old]
        return scores

    def _redundancy(self, keys: Tensor) -> Tensor:
        """keys: [B, Hkv, S, D]. Returns [B, Hkv, S], which sums to 1."""
        length = keys.shape[2]
        unit, total = F.normalize(keys, dim=-1), torch.zeros_like(keys[..., 0])
        at = torch.arange(length, device=keys.device)
        for start in range(0, length, ROWS):
            rows = torch.arange(start, min(start + ROWS, length), device=keys.device)
            similarity = torch.matmul(unit[:, :, start : start + ROWS], unit.transpose(2, 3))
            similarity[:, :, rows - start, rows] = 0
            # The first key where no other is similar, as in the authors' code.
            latest = torch.where(similarity > self.similar, at, 0).amax(-1, keepdim=True)
            total += similarity.scatter_(-1, latest, 0).sum(2)
        return (total / length).softmax(-1)
