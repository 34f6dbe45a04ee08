"""Shared-context packing: a context once, then all its questions and answers, each blind to the others.

    [ context | question 0, answer 0 | question 1, answer 1 | ... ]

The positions of every block go on from the context's end, so each answer is predicted exactly as if its question were
the only one. In attention the context's rows are causal, and a block's rows see `[what they may of the context ; their
own block]`. What they may see is everything, or what an evictor leaves of it: policies score without gradient, and
gradients flow through the slots that are kept (compression-aware fine-tuning). It is what `lcft` does at the end of a
prefill, in one pass.

Under `twin` every question has a second block, which sees all of the context: both predictions of an answer come from
one pass.

Under `aware` a question sees the whole context and takes part in the scores, and its last token is read a second time,
over what was kept, as the answer is: `[ question | last token of it, answer ]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.errors import UserError
from lceval.models.geometry import Geometry
from lceval.models.policies import Evictor
from lceval.models.prefill_stats import PrefillStats
from lceval.models.recipe import Recipe

IGNORED = -100
CONTEXT, ASKS, REPLIES, WHOLE = range(4)
"""Kinds of rows: of the context, of a question that sees all of it, of what sees its compressed form, of a twin."""


@dataclass(frozen=True)
class QAPair:
    """A question about a context, and what is to be learned as its answer: tokens."""

    question: tuple[int, ...]
    answer: tuple[int, ...]


def pack(
    context: Sequence[int], pairs: Sequence[QAPair], *, query_aware: bool = False, self_distillation: bool = False
) -> dict[str, list[int]]:
    """One sequence of L tokens.

    Returns:
        Rows of length L: input_ids, position_ids, labels (what the row predicts; IGNORED but for answers), block (-1
        for the context, else the question's number; twins are numbered on) and kind. Labels of twins come after all
        others, in the same order.
    """
    start = len(context)
    ids, positions, labels = [*context], [*range(start)], [IGNORED] * start
    block, kind = [-1] * start, [CONTEXT] * start
    for number, pair in enumerate([*pairs, *pairs] if self_distillation else pairs):
        n, answered = start + len(pair.question), len(pair.answer)
        asks, reads = (query_aware, REPLIES) if number < len(pairs) else (False, WHOLE)
        again = 1 if asks else 0
        # The last token of an answer is predicted, never read.
        ids += [*pair.question, *pair.question[len(pair.question) - again :], *pair.answer[:-1]]
        positions += [*range(start, n), *range(n - again, n + answered - 1)]
        labels += [*[IGNORED] * (len(pair.question) - 1 + again), *pair.answer]
        block += [number] * (len(ids) - len(block))
        kind += [ASKS if asks else reads] * len(pair.question) + [reads] * (again + answered - 1)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "block": block, "kind": kind}


class Packing:
    """Who sees whom in one packed sequence; given to the model's forward pass as `packing=`.

    Args:
        block, kind: [1, L] as `pack` made them.
        geometry: of the model.
        evictor: what compresses the context; None keeps all of it.

    Attributes:
        kept: per layer what the blocks see of the context: one mask [1, Hkv, S] for all, or one a block; filled by the
            forward pass, and used again where gradient checkpointing repeats it.

    Raises:
        UserError: a model or an evictor that cannot be trained so.
    """

    def __init__(self, block: Tensor, kind: Tensor, geometry: Geometry, evictor: Evictor | None = None) -> None:
        if any(geometry.windows):
            raise UserError("a model with sliding-window layers cannot be trained on shared contexts")
        self.context = int((kind == CONTEXT).sum())
        self._geometry = geometry
        self._evictor = check_trainable(evictor)
        if evictor is not None and evictor.amount.tokens(self.context) >= self.context:
            self._evictor = None
        self.kept: dict[int, list[Tensor]] = {}
        block, kind = block[0, self.context :], kind[0, self.context :]
        place = torch.arange(len(block), device=block.device)
        own = (block[:, None] == block) & (place[:, None] >= place)
        # The first reading of a question's last token takes part in the scores alone.
        last = (kind == ASKS) & (torch.cat([kind[1:], kind.new_full((1,), ASKS)]) == REPLIES)
        self._own = own & ~((kind == REPLIES)[:, None] & last)
        asks = (kind == ASKS).nonzero()[:, 0]
        self._asks = asks if len(asks) else None
        replies = kind == REPLIES
        if self._asks is None:
            self._replies = [replies.nonzero()[:, 0]]
        else:
            self._replies = [(replies & (block == b)).nonzero()[:, 0] for b in range(int(block[asks].max()) + 1)]
            self._questions = [((kind == ASKS) & (block == b)).nonzero()[:, 0] for b in range(len(self._replies))]
        whole = (kind == WHOLE).nonzero()[:, 0]
        self._whole = [whole] if len(whole) else []
        self._order = torch.cat([*([asks] if len(asks) else []), *self._replies, *self._whole]).argsort()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Attention of one layer. q: [1, H, L, D]; k, v: [1, Hkv, L, D]. Returns [1, H, L, D]."""
        s = self.context
        parts = []
        if s:
            parts.append(_sdpa(q[:, :, :s], k[:, :, :s], v[:, :, :s], None, scaling))
        rows = [self._rows(self._asks, q, k, v, None, scaling)] if self._asks is not None else []
        masks = self._masks(layer, q, k, v, scaling)
        for place, replies in enumerate(self._replies):
            keep = masks[place] if masks else None
            rows.append(self._rows(replies, q, k, v, keep, scaling))
        rows += [self._rows(whole, q, k, v, None, scaling) for whole in self._whole]
        parts.append(torch.cat(rows, 2)[:, :, self._order] if len(rows) > 1 else rows[0])
        return torch.cat(parts, 2)

    def _rows(self, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scaling: float) -> Tensor:
        """Rows of blocks over the context, as far as it is kept, and over their own block."""
        s = self.context
        own = self._own[rows]
        if keep is None:
            seen = own.new_ones(len(rows), s)
        elif self._evictor is not None and self._evictor.is_even():
            # Gathered: as many slots in every head, and fewer keys to read.
            n = int(keep[0, 0].sum())
            at = keep.nonzero()[:, 2].view(1, k.shape[1], n, 1).expand(-1, -1, -1, k.shape[3])
            k, v = (torch.cat([x[:, :, :s].gather(2, at), x[:, :, s:]], 2) for x in (k, v))
            seen = own.new_ones(len(rows), n)
        else:
            heads = keep.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None].expand(-1, -1, len(rows), -1)
            mask = torch.cat([heads, own.expand(*heads.shape[:2], -1, -1)], 3)
            return _sdpa(q[:, :, s + rows], k, v, mask, scaling)
        return _sdpa(q[:, :, s + rows], k, v, torch.cat([seen, own], 1), scaling)

    @torch.no_grad()
    def _masks(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> list[Tensor]:
        """What stays of the context in a layer: a mask [1, Hkv, S] for all blocks, or one a block; none: everything."""
        if self._evictor is None:
            return []
        if layer not in self.kept:
            s = self.context
            stats = PrefillStats(self._evictor.stats_spec, self._geometry.rotary)
            stats.update(q[:, :, :s].float(), k[:, :, :s].float(), scaling)
            if self._asks is None:
                self.kept[layer] = [self._mask(layer, stats, k[:, :, :s], v[:, :, :s], scaling)]
            else:
                self.kept[layer] = []
                for question in self._questions:
                    keys, values = (torch.cat([x[:, :, :s], x[:, :, s + question]], 2) for x in (k, v))
                    asked = stats.fork()
                    asked.update(q[:, :, s + question].float(), keys.float(), scaling)
                    self.kept[layer].append(self._mask(layer, asked, keys, values, scaling))
        return self.kept[layer]

    def _mask(self, layer: int, stats: PrefillStats, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        assert self._evictor is not None
        layers = len(self._geometry.windows)
        scores = self._evictor.scores(stats.view(k.float(), v.float(), scaling, layer, layers))
        return self._evictor.keep(scores[..., : self.context], layer, layers)


def check_trainable(evictor: Evictor | None) -> Evictor | None:
    """The evictor itself.

    Raises:
        UserError: it decides only after the whole model has read the context, or goes on evicting while it answers.
    """
    if evictor is None:
        return None
    name = str(Recipe(evictor=evictor))
    if evictor.stats_spec.reconstruction or type(evictor).select is not Evictor.select:
        raise UserError(f"{name} chooses across layers, after the model has read the context: not in training")
    if getattr(evictor, "when", "prefill") == "always":
        raise UserError(f"{name} goes on evicting while it answers: leave when=always out in training")
    return evictor


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    kwargs: dict[str, Any] = {"scale": scaling, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **kwargs)
