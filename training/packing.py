"""Shared-context packing: a context once, followed by all its questions and answers, which do not attend to each other.

    [ context | question 0, answer 0 | question 1, answer 1 | ... ]

The positions of every block continue from the end of the context, so each answer is predicted exactly as if its
question were the only one. The context is causal, and a block attends to `[context ; own block]`, where the context is
full or what an evictor keeps of it. Policies score without gradient; gradients flow through the kept slots. This
reproduces in one forward pass what `lcft` does at the end of prefill.

With `self_distillation` every question has a second block, which attends to the full context.

With `query_aware` a question attends to the full context and its queries are included in the eviction scores. Its last
token is then repeated, with attention to the kept slots as for the answer: `[ question | its last token, answer ]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.core.errors import UserError
from lceval.kernels.softmax import Softmax
from lceval.models.geometry import Geometry
from lceval.models.policies import Evictor
from lceval.models.prefill_stats import PrefillStats
from lceval.models.recipe import Recipe

IGNORED = -100
CONTEXT, QUESTION_SCORING, ANSWER, FULL_CACHE = range(4)
"""Kinds of tokens: context; question that attends to the full context and is scored by the evictor (query-aware);
question or answer that attends to the kept slots; question or answer that attends to the full context
(self-distillation)."""


@dataclass(frozen=True)
class QAPair:
    """Token ids of a question about a context and of its target answer."""

    question: tuple[int, ...]
    answer: tuple[int, ...]


def pack(
    context: Sequence[int], pairs: Sequence[QAPair], *, query_aware: bool = False, self_distillation: bool = False
) -> dict[str, list[int]]:
    """One sequence of L tokens.

    Returns:
        Lists of length L: input_ids, position_ids, labels (the token predicted at this position; IGNORED except for
        answers), block (-1 for the context, else the index of the question; self-distillation blocks continue the
        numbering) and kind. Self-distillation labels follow all others, in the same order.
    """
    start = len(context)
    ids, positions, labels = [*context], [*range(start)], [IGNORED] * start
    block, kind = [-1] * start, [CONTEXT] * start
    for number, pair in enumerate([*pairs, *pairs] if self_distillation else pairs):
        stop, answer_tokens = start + len(pair.question), len(pair.answer)
        scoring, answer_kind = (query_aware, ANSWER) if number < len(pairs) else (False, FULL_CACHE)
        repeated = 1 if scoring else 0
        # The last token of an answer is predicted, never an input.
        ids += [*pair.question, *pair.question[len(pair.question) - repeated :], *pair.answer[:-1]]
        positions += [*range(start, stop), *range(stop - repeated, stop + answer_tokens - 1)]
        labels += [*[IGNORED] * (len(pair.question) - 1 + repeated), *pair.answer]
        block += [number] * (len(ids) - len(block))
        kind += [QUESTION_SCORING if scoring else answer_kind] * len(pair.question)
        kind += [answer_kind] * (repeated + answer_tokens - 1)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "block": block, "kind": kind}


@dataclass
class Gate:
    """Log-gates of a context's slots in the pass that is running (`training.joint`).

    Attributes:
        threshold: the score at which a gate is one half.
        temperature: of the sigmoid.
        protected: [1, Hkv, S] bool, the slots whose gate is 1, in every layer.
        scores: per layer [1, Hkv, S] float32, with gradient; set while the pass runs.
    """

    threshold: float
    temperature: float
    protected: Tensor
    scores: dict[int, Tensor]

    def bias(self, layer: int) -> Tensor:
        """[1, Hkv, S] float32."""
        gates = F.logsigmoid((self.scores[layer] - self.threshold) / self.temperature)
        return gates.masked_fill(self.protected, 0.0)


class Packing:
    """Attention pattern of one packed sequence, passed to the model's forward as `packing=`.

    Args:
        block, kind: [1, L] from `pack`.
        geometry: geometry of the model.
        evictor: evictor of the context; None: full cache.

    Attributes:
        kept: per layer, masks [1, Hkv, S] of the kept slots: one for all blocks, or one per block (query-aware). Set
            by the forward pass, or before it, and reused when gradient checkpointing recomputes it.
        gate: what answers see the slots through, instead of masks; set before the forward pass (`training.joint`).

    Raises:
        UserError: the model or the evictor does not support training.
    """

    def __init__(self, block: Tensor, kind: Tensor, geometry: Geometry, evictor: Evictor | None = None) -> None:
        if not geometry.is_plain:
            raise UserError(
                "training on shared contexts requires plain full attention in every layer, which "
                f"{geometry.model_type} does not have"
            )
        self.context = int((kind == CONTEXT).sum())
        self._geometry = geometry
        self._evictor = check_trainable(evictor)
        if evictor is not None and evictor.keeps_all(self.context):
            self._evictor = None
        self.kept: dict[int, list[Tensor]] = {}
        self.gate: Gate | None = None
        block, kind = block[0, self.context :], kind[0, self.context :]
        index = torch.arange(len(block), device=block.device)
        own = (block[:, None] == block) & (index[:, None] >= index)
        scoring, answer = kind == QUESTION_SCORING, kind == ANSWER
        # The first copy of a question's last token is for the eviction scores only.
        last = scoring & (torch.cat([kind[1:], kind.new_full((1,), QUESTION_SCORING)]) == ANSWER)
        self._own = own & ~(answer[:, None] & last)
        scoring_rows = scoring.nonzero()[:, 0]
        self._scoring = scoring_rows if len(scoring_rows) else None
        if self._scoring is None:
            self._answers = [answer.nonzero()[:, 0]]
        else:
            blocks = range(int(block[scoring_rows].max()) + 1)
            self._answers = [(answer & (block == b)).nonzero()[:, 0] for b in blocks]
            self._questions = [(scoring & (block == b)).nonzero()[:, 0] for b in blocks]
        full_cache = (kind == FULL_CACHE).nonzero()[:, 0]
        self._full_cache = [full_cache] if len(full_cache) else []
        self._order = torch.cat(
            [*([scoring_rows] if len(scoring_rows) else []), *self._answers, *self._full_cache]
        ).argsort()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Attention of one layer. q: [1, H, L, D]; k, v: [1, Hkv, L, D]. Returns [1, H, L, D]."""
        s = self.context
        parts = []
        if s:
            parts.append(_sdpa(q[:, :, :s], k[:, :, :s], v[:, :, :s], None, scaling))
        rows = [self._rows(self._scoring, q, k, v, None, scaling)] if self._scoring is not None else []
        masks = self._masks(layer, q, k, v, scaling) if self.gate is None else [self.gate.bias(layer)]
        for number, answer in enumerate(self._answers):
            keep = masks[number] if masks else None
            rows.append(self._rows(answer, q, k, v, keep, scaling))
        rows += [self._rows(full_cache, q, k, v, None, scaling) for full_cache in self._full_cache]
        parts.append(torch.cat(rows, 2)[:, :, self._order] if len(rows) > 1 else rows[0])
        return torch.cat(parts, 2)

    def _rows(self, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scaling: float) -> Tensor:
        """Attention of block tokens to the kept context slots and to their own block.

        keep: a mask, or log-gates in float32.
        """
        s = self.context
        own = self._own[rows]
        if keep is None:
            visible = own.new_ones(len(rows), s)
        elif keep.is_floating_point():
            gates = keep.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None].expand(-1, -1, len(rows), -1)
            hidden = torch.zeros_like(own, dtype=keep.dtype).masked_fill_(~own, -torch.inf)
            mask = torch.cat([gates, hidden.expand(*gates.shape[:2], -1, -1)], 3).to(q.dtype)
            return _sdpa(q[:, :, s + rows], k, v, mask, scaling)
        elif self._evictor is not None and self._evictor.is_even():
            # All heads keep the same number of slots: gather them and attend to fewer keys.
            n = int(keep[0, 0].sum())
            at = keep.nonzero()[:, 2].view(1, k.shape[1], n, 1).expand(-1, -1, -1, k.shape[3])
            k, v = (torch.cat([x[:, :, :s].gather(2, at), x[:, :, s:]], 2) for x in (k, v))
            visible = own.new_ones(len(rows), n)
        else:
            heads = keep.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None].expand(-1, -1, len(rows), -1)
            mask = torch.cat([heads, own.expand(*heads.shape[:2], -1, -1)], 3)
            return _sdpa(q[:, :, s + rows], k, v, mask, scaling)
        return _sdpa(q[:, :, s + rows], k, v, torch.cat([visible, own], 1), scaling)

    @torch.no_grad()
    def _masks(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> list[Tensor]:
        """Masks [1, Hkv, S] of the kept slots of a layer: one for all blocks, or one per block; empty: full cache."""
        if self._evictor is None:
            return []
        if layer not in self.kept:
            s = self.context
            assert not self._evictor.stats_spec.scorers, "slots with learned scores are selected before the pass"
            stats = PrefillStats(self._evictor.stats_spec, self._geometry.rotary)
            stats.update(q[:, :, :s].float(), k[:, :, :s].float(), Softmax(scaling))
            if self._scoring is None:
                self.kept[layer] = [self._mask(layer, stats, k[:, :, :s], v[:, :, :s], scaling)]
            else:
                self.kept[layer] = []
                for question in self._questions:
                    keys, values = (torch.cat([x[:, :, :s], x[:, :, s + question]], 2) for x in (k, v))
                    with_question = stats.fork()
                    with_question.update(q[:, :, s + question].float(), keys.float(), Softmax(scaling))
                    self.kept[layer].append(self._mask(layer, with_question, keys, values, scaling))
        return self.kept[layer]

    def _mask(self, layer: int, stats: PrefillStats, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        assert self._evictor is not None
        layers, question = len(self._geometry.layers), k.shape[2] - self.context
        view = stats.view(k.float(), v.float(), Softmax(scaling), layer, layers, question=question)
        scores = self._evictor.scores(view)
        return self._evictor.keep(scores[..., : self.context], layer, layers)


def check_trainable(evictor: Evictor | None) -> Evictor | None:
    """The evictor itself.

    Raises:
        UserError: it selects slots across layers after prefill, evicts during decoding, or requires more than queries,
            keys and values of a layer.
    """
    if evictor is None:
        return None
    name = str(Recipe(evictor=evictor))
    spec = evictor.stats_spec
    if spec.output_norms or spec.question:
        raise UserError(f"{name} requires output norms or the question's queries, which are not supported in training")
    # Those with learned scores are selected by `training.joint`.
    if spec.reconstruction or (type(evictor).select is not Evictor.select and not spec.scorers):
        raise UserError(f"{name} selects slots across layers after prefill, which is not supported in training")
    if evictor.write_every:
        raise UserError(f"{name} evicts while an answer is written, which is not supported in training")
    if evictor.read_chunk:
        raise UserError(f"{name} evicts while a context is read, which is not supported in training: remove when=chunk")
    if getattr(evictor, "when", "prefill") == "always":
        raise UserError(f"{name} evicts during decoding, which is not supported in training: remove when=always")
    return evictor


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    kwargs: dict[str, Any] = {"scale": scaling, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **kwargs)
