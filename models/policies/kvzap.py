"""KVzap: a learned map from a layer's hidden states to the importance of its slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lceval.models.policies.base import SINKS, Evictor, LayerView, StatsSpec, Threshold
from lceval.models.policies.pooled import top_pooled

SCOPES = ("model", "layer", "head")
# Protected recent tokens under a threshold, as in the published runs.
RECENT = 128


@dataclass(frozen=True, kw_only=True)
class KVzap(Evictor):
    """Keep the slots with the highest learned scores (Jégou and Jeblick 2026, arXiv 2601.07891).

    A scorer maps the attention input of each layer to the log of the score that KVzip gives the slot of each KV head,
    token by token while the context is read. It is set by the model argument `scorer`, and trained by
    `lceval train scorer`. `scope` says which slots compete for one budget: those of the whole model, of a layer, or of
    a head. With `threshold` every slot that scores at least as high is kept, and the share follows the text. What
    the chat template puts before the user's message and the first 4 tokens are always kept, and the last `recent` (by
    default 128 with a threshold, none with an amount).

    Differs from the paper: evicted slots are freed, not masked; the paper protects no first tokens, and evicts
    while decoding too.

    Cost: one small matrix product per layer and token.
    """

    scope: str = "model"
    recent: int | None = None
    # The digest of the scorer that `lcft` binds; not a key of recipes.
    scorer: str = field(default="", metadata={"key": False})
    has_scale: ClassVar[bool] = True
    evicts_while_reading: ClassVar[bool] = True
    evicts_while_writing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}")
        if self.scope != "model" and isinstance(self.amount, Threshold):
            raise ValueError("scope says what shares a budget, which a threshold does not have: leave scope out")
        if self.write_every and not self.keeps_prompt:
            raise ValueError("kvzap scores only what is written, under when=decode: use prompt=keep")
        if self.recent is not None and self.recent < 0:
            raise ValueError("recent must be at least 0")

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(scorers=frozenset({self.scorer}))

    def bound(self, scorer: str) -> KVzap:
        """The same policy with the scorer of that digest."""
        return replace(self, scorer=scorer)

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: the scorer's scores; protected tokens score highest."""
        return self.with_protected(layer.learned[self.scorer], layer.protected)

    def with_protected(self, scores: Tensor, prefix: int) -> Tensor:
        """A copy of scores [B, Hkv, S] in which protected tokens score highest.

        Args:
            prefix: tokens that the chat template puts before the user's message.
        """
        scores = scores.clone()
        default = RECENT if isinstance(self.amount, Threshold) else 0
        recent = default if self.recent is None else self.recent
        scores[..., max(0, scores.shape[-1] - recent) :] = torch.finfo(scores.dtype).max
        scores[..., : max(SINKS, prefix)] = torch.inf
        return scores

    def select(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The masks [B, Hkv, S] of kept slots; ties keep the earlier token, then the lower layer and head."""
        if isinstance(self.amount, Threshold) or self.scope == "head":
            return super().select(scores)
        slots = [s.shape[1] * self.budget(layer, len(scores), s.shape[-1]) for layer, s in enumerate(scores)]
        if self.scope == "model":
            return top_pooled(scores, sum(slots))
        return [top_pooled([s], n)[0] for s, n in zip(scores, slots, strict=True)]
