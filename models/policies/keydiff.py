"""KeyDiff: keys that differ from the others receive more attention from later queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.models.policies.base import Evictor, LayerView


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Evictor):
    """Keep the tokens whose keys are least similar to the mean key direction (Park et al. 2025, arXiv 2504.15364).

    score_i = -cos(k_i, mean_j k_j / ||k_j||).

    Differs from the paper: the mean is over the whole context; the paper evicts block by block during prefill.
    """

    has_scale: ClassVar[bool] = True

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: negative cosine similarity to the mean of the normalised keys."""
        directions = F.normalize(layer.keys.float(), dim=-1)
        return -F.cosine_similarity(directions, directions.mean(2, keepdim=True), dim=-1)
