"""Sliding-window layers of a question's cache, and what they keep of a context: its last tokens, uncompressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.kernels import step
from lceval.kernels.dense import attention_logits
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.softmax import Softmax
from lceval.models.layers import first_visible
from lceval.models.question import SteppingLayer


@dataclass(frozen=True)
class WindowKV:
    """The context of a sliding-window layer: its last tokens [1, Hkv, n, D], n < window. chunked: as in `LayerKind`."""

    k: Tensor
    v: Tensor
    window: int
    chunked: bool = False

    @cached_property
    def paged(self) -> PagedKV:
        """A copy in pages, as `kernels.step` reads it."""
        tokens = self.k.shape[2]
        if not tokens:
            return PagedKV.empty(self.k)
        k, v = (F.pad(x, (0, 0, 0, -tokens % PAGE)).contiguous() for x in (self.k, self.v))
        return PagedKV.full(k, v, tokens)

    @property
    def counts(self) -> tuple[int, ...]:
        return (self.k.shape[2],) * self.k.shape[1]

    @property
    def kept_bytes(self) -> int:
        """Bytes of keys and values; all slots are occupied and read."""
        return self.k.nbytes + self.v.nbytes

    read_bytes = kept_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors, with those of `paged` where it is used."""
        return self.kept_bytes + (self.paged.allocated_bytes if "paged" in self.__dict__ else 0)


class WindowLayer(SteppingLayer):
    """A tail in a sliding-window layer: a query attends to the last `window` tokens of context and tail."""

    is_sliding = True

    def _sources(self) -> tuple[Sequence[PagedKV], Sequence[int]]:
        # Rows of one context see different slots of it, if their questions have different lengths.
        return [self.contexts[owner].paged for owner in self.rows.owners], range(len(self.rows.owners))

    def _window(self, device: torch.device) -> step.Window:
        context, slots = self.contexts[0], [self.contexts[owner].k.shape[2] for owner in self.rows.owners]
        return step.Window(
            context.window, context.chunked, self.rows.starts_on(device), self.rows.origins_on(slots, device)
        )

    def attend(self, q: Tensor, softmax: Softmax) -> Tensor:
        if (stepped := self._step(q, softmax)) is not None:
            return stepped
        k, v = self.tail
        queries = torch.arange(self.length - q.shape[2], self.length, device=q.device)[:, None]
        o = q.new_empty(*q.shape[:3], self.values.shape[3])
        for row, owner in enumerate(self.rows.owners):
            context, pad = self.contexts[owner], self.rows.pads[row] if self.rows.pads else 0
            n = context.k.shape[2]
            # Columns are relative to the question's first token; those of the context are negative, padding is masked.
            own = torch.arange(self.length, device=q.device)
            columns = torch.cat([torch.arange(pad - n, pad, device=q.device), own])
            start = self.rows.tokens[row] - pad
            visible = (columns <= queries) & (columns >= first_visible(queries, context, start))
            visible[:, n:] &= (own >= pad) | (own == queries)
            pairs = ((context.k, k), (context.v, v))
            keys, values = (torch.cat([old[0], new[row]], 1) if n else new[row] for old, new in pairs)
            o[row] = attend_visible(q[row], keys, values, visible, softmax)
        return o


def attend_visible(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax: Softmax) -> Tensor:
    """Attention of q [H, T, D] over the visible [T, S] of k, v [Hkv, S, D]; returns [H, T, D]."""
    if not softmax.is_special:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=softmax.scaling, enable_gqa=True)
    products = attention_logits(q.reshape(k.shape[0], -1, q.shape[2]), k, 1.0)
    products = products.view(k.shape[0], -1, *visible.shape).masked_fill_(~visible, -torch.inf)
    return torch.matmul(softmax.weights(products).to(v.dtype), v[:, None]).view(*q.shape[:2], -1)
