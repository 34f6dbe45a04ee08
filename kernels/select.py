"""Sparse attention: an index selects slots for a query, and attention is exact over the selected slots.

For every query token and KV head, an index much smaller than the keys estimates the attention logits
l_g = scaling * q_g k^T of the G query heads that share the KV head. The slots are ranked by mean_g softmax(l_g),
the best `budget` are selected, and

    o_g = softmax(scaling * q_g K_sel^T) V_sel        lse_g = log sum exp(scaling * q_g K_sel^T)

over the selected slots only. No memory is freed: the context stays stored, and fewer bytes are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lceval.kernels.dense import attention_logits
from lceval.kernels.paged import KV, Around

# Query tokens are processed in blocks of at most this many scores; computing them can need several times that memory.
MAX_SCORES = 1 << 22
# Heads of equal length are scored together up to this many elements of their keys.
MAX_KEYS = 1 << 24


class Index(Protocol):
    """A summary of one layer's keys that scores slots without reading the keys, for the heads above the budget.

    Attributes:
        unit: consecutive slots that are scored and selected together. The last unit of a head may be shorter.
    """

    @property
    def unit(self) -> int: ...

    @property
    def stored_bytes(self) -> int:
        """Bytes of the index."""

    @property
    def read_bytes(self) -> int:
        """Bytes of the index that one decoding step reads."""

    def scores(self, first: int, n: int, q: Tensor, scaling: float) -> Tensor:
        """Scores of each unit for each query token; ties select the earlier unit.

        Args:
            first: first of R consecutive heads of B * Hkv with n slots each.
            q: [R, Q, G, D], the G query heads of Q query tokens over each of the R heads.

        Returns:
            [R, Q, ceil(n / unit)] float32.
        """


def mean_softmax(logits: Tensor) -> Tensor:
    """Scores of a KV head's units from its query heads' logits [..., G, U]: mean_g softmax(l_g), [..., U]."""
    return logits.softmax(-1).mean(-2)


def top(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of the last dimension as a mask; ties keep the earlier. scores: [..., U]."""
    if count == 0 or count >= scores.shape[-1]:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    # By threshold, not by sorting: a stable sort of 6000 scores takes ten times as long.
    threshold = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, ties = scores > threshold, scores == threshold
    room = count - above.sum(-1, keepdim=True)
    return above.logical_or_(ties & (ties.cumsum(-1) <= room))


def indexed_keys(kv: KV, budget: int) -> Iterator[Tensor]:
    """Keys [n, D] of every head in turn, to build an index from; [0, D] for heads within the budget."""
    for row, n in enumerate(kv.counts):
        k = kv.head(row)[0]
        yield k if n > budget else k[:0]


def selective(kv: KV, budget: int, build: Callable[[Iterator[Tensor]], Index]) -> KV:
    """`kv` with sparse attention, or `kv` itself if no head has more than `budget` slots.

    Args:
        budget: slots to select per KV head and query token, at least 1.
        build: builds the index from `indexed_keys`.
    """
    if max(kv.counts, default=0) <= budget:
        return kv
    return Selective(kv, build(indexed_keys(kv, budget)), budget)


@dataclass(frozen=True)
class Selective(Around):
    """One layer of a context with sparse attention: a query token attends to `budget` slots per KV head.

    Heads with at most `budget` slots are dense. The budget is rounded down to whole units of the index but is at least
    one unit.

    Attributes:
        kv: the slots in any layout.
        index: scores the slots.
        budget: slots to select, at least 1 and below the count of some head.
    """

    index: Index
    budget: int

    @property
    def kept_bytes(self) -> int:
        """Bytes of the occupied slots and of the index."""
        return self.kv.kept_bytes + self.index.stored_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors, including the index."""
        return self.kv.allocated_bytes + self.index.stored_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes that one decoding step reads: of the index and of the selected slots."""
        selected = sum(n if n <= self.budget else min(n, self.units * self.index.unit) for n in self.counts)
        return self.index.read_bytes + self.kv.read_bytes * selected // sum(self.counts)

    @property
    def units(self) -> int:
        """Units of the index to select from each head above the budget."""
        return max(1, self.budget // self.index.unit)

    def attend(self, q: Tensor, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
        """As `KV.attend`, each query token over its selected slots; lse covers the selected slots only."""
        batch, heads, tokens, dim = q.shape
        sequences, kv_heads = self.lens.shape
        group, shared = heads // kv_heads, batch // sequences
        # Query tokens per KV head with their G query heads: [B * Hkv, Q, G, D].
        rows = q.view(sequences, shared, kv_heads, group, tokens, dim).permute(0, 2, 1, 4, 3, 5)
        rows = rows.reshape(sequences * kv_heads, shared * tokens, group, dim)
        o = rows.new_empty(*rows.shape[:3], self.value_dim)
        lse = torch.empty(rows.shape[:3], dtype=torch.float32, device=q.device)
        for span in self._batches(rows):
            n = self.counts[span.start]
            if n <= self.budget:
                self._read_all(span.start, rows[span], scaling, cap, o[span], lse[span])
            elif self._gather_is_cheaper(rows.shape[1], n):
                self._gather(span.start, rows[span], scaling, cap, o[span], lse[span])
            else:
                self._mask(span.start, rows[span], scaling, cap, o[span], lse[span])
        shape = (sequences, kv_heads, shared, tokens, group)
        return (
            o.view(*shape, -1).permute(0, 2, 1, 4, 3, 5).reshape(batch, heads, tokens, -1),
            lse.view(shape).permute(0, 2, 1, 4, 3).reshape(batch, heads, tokens),
        )

    def _gather_is_cheaper(self, queries: int, n: int) -> bool:
        """Whether gathering each query token's slots moves at most as many bytes as reading the whole head once."""
        return queries == 1 or queries * self.units * self.index.unit <= n

    def _batches(self, rows: Tensor) -> list[slice]:
        """Runs of consecutive heads to process together: of one length, gathered, and small."""
        counts, step = self.counts, 1
        if len(set(counts)) == 1 and self._gather_is_cheaper(rows.shape[1], counts[0]):
            step = max(1, MAX_KEYS // (counts[0] * rows.shape[-1]))
        return [slice(i, min(i + step, len(counts))) for i in range(0, len(counts), step)]

    def _blocks(self, q: Tensor, n: int) -> list[slice]:
        step = max(1, MAX_SCORES // (q.shape[0] * q.shape[2] * n))
        return [slice(i, i + step) for i in range(0, q.shape[1], step)]

    def select(self, first: int, q: Tensor, scaling: float) -> Tensor:
        """[R, Q, U] bool, the units that queries [R, Q, G, D] select of R heads above the budget, from `first` on."""
        return top(self.index.scores(first, self.counts[first], q, scaling), self.units)

    def _read_all(self, row: int, q: Tensor, scaling: float, cap: float | None, o: Tensor, lse: Tensor) -> None:
        n = self.counts[row]
        if n == 0:
            o.zero_()
            lse.fill_(-torch.inf)
            return
        k, v = self.kv.head(row)
        for block in self._blocks(q, n):
            o[:, block], lse[:, block] = _attend(q[:, block], k, v, scaling, cap, None)

    def _mask(self, row: int, q: Tensor, scaling: float, cap: float | None, o: Tensor, lse: Tensor) -> None:
        """Many query tokens: the whole head is read once, and each query token masks the slots it did not select."""
        n = self.counts[row]
        k, v = self.kv.head(row)
        for block in self._blocks(q, n):
            units = self.select(row, q[:, block], scaling)
            visible = units if self.index.unit == 1 else units.repeat_interleave(self.index.unit, -1)[..., :n]
            o[:, block], lse[:, block] = _attend(q[:, block], k, v, scaling, cap, visible)

    def _gather(self, first: int, q: Tensor, scaling: float, cap: float | None, o: Tensor, lse: Tensor) -> None:
        """Few query tokens: only the selected slots are read."""
        heads = q.shape[0]
        n, unit = self.counts[first], self.index.unit
        for block in self._blocks(q, n):
            mask = self.select(first, q[:, block], scaling)
            queries, width = mask.shape[1:]
            # The size is known: counting the mask would wait for the device.
            slots = torch.nonzero_static(mask.view(-1), size=heads * queries * self.units)
            slots = slots.view(heads, queries, self.units, 1) % width
            if unit > 1:
                slots = slots * unit + torch.arange(unit, device=q.device)
            slots = slots.view(heads, queries, -1)
            visible = None
            if n % unit:
                visible, slots = slots < n, slots.clamp(max=n - 1)
            taken = [self.kv.take(first + i, slots[i].view(-1)) for i in range(heads)]
            k, v = (torch.stack(x).view(heads, queries, -1, x[0].shape[-1]) for x in zip(*taken, strict=True))
            o[:, block], lse[:, block] = _attend(q[:, block], k, v, scaling, cap, visible)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, cap: float | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [R, Q, G, D] over k, v [R, Q, m, D], or [m, D] for all; visible [R, Q, m]. Returns o and lse [R, Q, G]."""
    grouped = q.flatten(0, 1) if k.dim() == 4 else q.reshape(1, -1, q.shape[-1])
    scores = attention_logits(grouped, k.view(-1, *k.shape[-2:]), scaling, cap).view(*q.shape[:3], -1)
    if visible is not None:
        scores.masked_fill_(~visible[:, :, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.matmul(scores.sub_(lse[..., None]).exp_().to(v.dtype), v), lse
