"""DuoAttention: heads that retrieve keep everything, the others keep sinks and recent tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lceval.models.policies.base import Evictor, LayerView


@dataclass(frozen=True)
class HeadPattern:
    """How much each KV head retrieves.

    Attributes:
        scores: of every KV head, by full-attention layer; the highest are retrieval heads.
        sinks, recent: tokens that a streaming head keeps.
    """

    scores: tuple[tuple[float, ...], ...]
    sinks: int
    recent: int


@dataclass(frozen=True, kw_only=True)
class Duo(Evictor):
    """Keep every token in retrieval heads, and sinks and recent tokens in the other heads (DuoAttention, Xiao et al.
    2024, arXiv 2410.10819).

    The heads of the whole model share one budget. All heads keep the first `sinks` and the last `recent` tokens (by
    default those of the pattern); the heads with the highest scores keep every token, as many as the budget allows,
    and the next one a longer end. The model argument `heads` names a pattern of the authors, or a text on which the
    scores are computed.

    Differs from the paper: the amount is a share of the slots, not of the heads, and every head attends to the whole
    context during the prefill, while the paper's streaming heads attend to the tokens that they keep.
    """

    sinks: int | None = None
    recent: int | None = None
    # What `lcft` binds from its argument `heads`; not a key of recipes.
    pattern: HeadPattern | None = field(default=None, metadata={"key": False})

    def __post_init__(self) -> None:
        if (self.sinks or 0) < 0 or (self.recent or 0) < 0:
            raise ValueError("sinks and recent must be at least 0")

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32, the head's score for every token."""
        assert self.pattern is not None, "duo requires a pattern of heads"
        scores = torch.tensor(self.pattern.scores[layer.layer], device=layer.keys.device)
        return scores[None, :, None].expand(layer.keys.shape[:3])

    def select(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The masks [B, Hkv, S] of kept slots; of heads with equal scores the first retrieves."""
        assert self.pattern is not None, "duo requires a pattern of heads"
        tokens = scores[0].shape[-1]
        sinks = self.pattern.sinks if self.sinks is None else self.sinks
        recent = self.pattern.recent if self.recent is None else self.recent
        budget = self.budgeted.tokens(tokens)
        # A budget below sinks and recent tokens is the same for every head.
        least = min(tokens, sinks + recent, budget)
        masks = [torch.zeros(s.shape, dtype=torch.bool, device=s.device) for s in scores]
        heads = {(layer, head): x for layer, row in enumerate(self.pattern.scores) for head, x in enumerate(row)}
        spare = (budget - least) * len(heads)
        for layer, head in sorted(heads, key=lambda at: -heads[at]):
            kept = least + min(spare, tokens - least)
            spare -= kept - least
            first = min(sinks, kept)
            masks[layer][:, head, :first] = True
            masks[layer][:, head, tokens - (kept - first) :] = True
        return masks
