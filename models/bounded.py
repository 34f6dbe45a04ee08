"""Eviction after every forward pass (`when=always`): one slot budget for context, question and answer together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.kernels.dense import attention_logits
from lceval.kernels.paged import Around, PagedKV
from lceval.kernels.select import top
from lceval.kernels.softmax import Softmax
from lceval.models.layers import AttendingLayer
from lceval.models.policies import StepEvictor, StepView
from lceval.models.question import Rows


@dataclass(frozen=True)
class BoundedKV(Around):
    """A context whose slots later tokens can evict (`when=always`): slots [1, Hkv, N, D] and their attention sums.

    Attributes:
        kv: slots kept at the end of prefill.
        column_sums: [1, Hkv, N] float32, attention that each slot received so far.
        budget: maximum slots per KV head.
        layer: index among the `layers` full-attention layers.
        tokens: length of the context before eviction.
    """

    kv: PagedKV
    evictor: StepEvictor
    column_sums: Tensor
    budget: int
    layer: int
    layers: int
    tokens: int

    @property
    def kept_bytes(self) -> int:
        """Bytes of the slots and their attention sums."""
        return self.kv.kept_bytes + self.column_sums.numel() * self.column_sums.element_size()

    @property
    def allocated_bytes(self) -> int:
        """As `KV.allocated_bytes`."""
        return self.kv.allocated_bytes + self.column_sums.numel() * self.column_sums.element_size()

    def slots(self) -> Slots:
        """A mutable copy of the slots for one row."""
        heads = self.kv.lens.shape[1]
        k, v = (torch.stack(x)[None] for x in zip(*(self.kv.head(h) for h in range(heads)), strict=True))
        positions = torch.stack([self.kv.kept_positions(0, h) for h in range(heads)])[None]
        return Slots(k, v, positions, self.column_sums, self.tokens, {})


@dataclass
class Slots:
    """One row's slots under `when=always`: k, v [1, Hkv, N, D]; positions and column sums [1, Hkv, N]."""

    k: Tensor
    v: Tensor
    positions: Tensor
    column_sums: Tensor
    seen: int
    memory: dict[str, Any]

    def step(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, rule: BoundedKV) -> Tensor:
        """Append T tokens, attend, and evict down to the budget. q: [1, H, T, D]; k, v: [1, Hkv, T, D]."""
        _, heads, tokens, dim = q.shape
        kv_heads = k.shape[1]
        new = torch.arange(self.seen, self.seen + tokens, device=k.device).expand(1, kv_heads, -1)
        self.seen += tokens
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.positions = torch.cat([self.positions, new], 2)
        slots = self.k.shape[2]
        products = attention_logits(q.view(kv_heads, -1, dim), self.k[0], 1.0)
        products = products.view(1, kv_heads, heads // kv_heads, tokens, slots)
        future = torch.ones(tokens, slots, dtype=torch.bool, device=q.device).triu_(slots - tokens + 1)
        weights = softmax.weights(products.masked_fill_(future, -torch.inf))
        self.column_sums = F.pad(self.column_sums, (0, tokens)) + weights.sum(3).mean(2)
        o = torch.matmul(weights.to(v.dtype).view(1, kv_heads, -1, slots), self.v).view(*q.shape[:3], -1)
        if slots > rule.budget:
            view = StepView(
                self.positions,
                weights,
                self.column_sums,
                self.seen,
                rule.layer,
                rule.layers,
                rule.budget,
                self.memory,
            )
            # Every head evicts the same number of slots, so the rest is dense again.
            keep = top(rule.evictor.step_scores(view), rule.budget)
            # The size is known: counting the mask would wait for the device.
            index = torch.nonzero_static(keep, size=kv_heads * rule.budget)[:, 2].view(1, kv_heads, rule.budget)
            self.positions, self.column_sums = (x.gather(2, index) for x in (self.positions, self.column_sums))
            self.k, self.v = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (self.k, self.v))
        return o


class BoundedLayer(AttendingLayer):
    """Rows with a fixed slot budget for context, question and answer together (`when=always`)."""

    def __init__(self, contexts: Sequence[BoundedKV], rows: Rows) -> None:
        super().__init__()
        self.contexts = tuple(contexts)
        self.rows = rows
        self.length = 0
        self.slots = [contexts[owner].slots() for owner in rows.owners]

    def lazy_initialization(self, k: Tensor, v: Tensor) -> None:
        self.is_initialized = True

    def append(self, k: Tensor, v: Tensor) -> None:
        self.keys, self.values = k, v

    def attend(self, q: Tensor, softmax: Softmax) -> Tensor:
        o, start = q.new_zeros(*q.shape[:3], self.values.shape[3]), self.length
        self.length += q.shape[2]
        for row, (owner, slots) in enumerate(zip(self.rows.owners, self.slots, strict=True)):
            # Padding occupies no slot.
            new = slice(max(0, (self.rows.pads[row] if self.rows.pads else 0) - start), None)
            one = slice(row, row + 1)
            q_new, k_new, v_new = (x[one, :, new] for x in (q, self.keys, self.values))
            if q_new.shape[2]:
                o[one, :, new] = slots.step(q_new.contiguous(), k_new, v_new, softmax, self.contexts[owner])
        return o

    def get_seq_length(self) -> int:
        return max(self.rows.tokens) + self.length

    def select(self, rows: Sequence[int], selected: Rows) -> None:
        """Keep these rows, in this order. selected: `rows.select` of them."""
        self.rows = selected
        self.slots = [replace(self.slots[r], memory=copy.deepcopy(self.slots[r].memory)) for r in rows]

    def fork(self) -> BoundedLayer:
        """A copy with its own slots: a step replaces tensors and never writes into them."""
        other = copy.copy(self)
        other.select(range(len(self.slots)), self.rows)
        return other

    @property
    def own_bytes(self) -> int:
        """Bytes of the question's own tokens."""
        return sum(s.k.nbytes + s.v.nbytes for s in self.slots)
