"""FINCH: the attention of the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lceval.models.policies.base import Evictor, LayerView, StatsSpec


@dataclass(frozen=True, kw_only=True)
class Finch(Evictor):
    """Keep the tokens with the highest attention from the question (Corallo and Papotti 2024, TACL 12, section 3).

    The attention of each question token is multiplied by the number of tokens before it, which makes tokens with
    more of them comparable (`normalize`), and averaged over the question and the query heads of a KV head. Requires
    query_aware=true; the paper's budget includes the question (budget=total).

    Differs from the paper: the context is compressed once, after its prefill, while the paper compresses it chunk by
    chunk; kept tokens stay at their original positions.
    """

    normalize: bool = True

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(question=True)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32 of the context's tokens."""
        assert layer.question_queries is not None, "finch requires a question"
        received = layer.attention_of(layer.question_queries)[..., : layer.tokens]
        if self.normalize:
            before = torch.arange(layer.tokens, layer.keys.shape[2], device=received.device)
            received = received * before[:, None]
        return received.mean((2, 3))
