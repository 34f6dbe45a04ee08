"""The compressed cache's memory layout, and attention over it in PyTorch.

Every (sequence, KV head) owns whole pages of 64 slots, so evicted slots free memory even if heads keep different
counts. This file is the CPU path and the reference for tests of the Triton kernels.

    k, v       [P, PAGE, D]    one page pool per layer
    table      [B, Hkv, M]     page ids of each head, in order; entries past its last page are 0 and never read
    lens       [B, Hkv]        kept slots of each head; 0 is legal
    positions  [P, PAGE]       original position of each slot; absent if nothing was evicted
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lceval.kernels.dense import attend_rows, folded, unfolded

PAGE = 64


def is_view(k: Tensor, v: Tensor) -> bool:
    """Whether values are the first channels of wider keys, as those of latent attention."""
    return v.data_ptr() == k.data_ptr() and v.shape[-1] < k.shape[-1] and k.numel() > 0


def both(k: Tensor, v: Tensor, new: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """`new` of keys and of values; of values that are a view of the keys, the same view of the new keys."""
    keys = new(k)
    return keys, keys[..., : v.shape[-1]] if is_view(k, v) else new(v)


def bytes_of(k: Tensor, v: Tensor) -> int:
    """Bytes of keys and values."""
    return k.nbytes if is_view(k, v) else k.nbytes + v.nbytes


class KV(Protocol):
    """One layer of a compressed context in any layout. Immutable: any number of questions share it.

    Attributes:
        lens: [B, Hkv] int32, kept slots.
        counts: `lens` on the host, row by row, so that loops over heads do not wait for the device.
    """

    @property
    def lens(self) -> Tensor: ...

    @property
    def value_dim(self) -> int:
        """Width of a value; a key may have another."""

    @property
    def counts(self) -> tuple[int, ...]: ...

    @property
    def kept_bytes(self) -> int:
        """Bytes of the occupied slots, including positions, scales, residual and index."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors, including page slack and tables."""

    @property
    def read_bytes(self) -> int:
        """Bytes that one decoding step reads."""

    def kept_positions(self, b: int, h: int) -> Tensor:
        """[n] int64, the original positions of one head's slots, ascending."""

    def head(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, D] of head `row` of B * Hkv, in slot order, in full precision."""

    def take(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [m, D] of slots [m] int64 of head `row`, in full precision; the rest is not dequantized."""

    def attend(self, q: Tensor, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of every query over all slots of its KV head, without a causal mask: all slots precede the queries.

        q: [B', H, T, D], B' = B or, where B = 1, any number of rows that share the one sequence. scaling, cap: as in
        `Softmax`.
        Returns o [B', H, T, D] in q's dtype and lse [B', H, T] float32 (natural log; zeros and -inf over an empty
        head).
        """


@dataclass(frozen=True)
class PagedKV:
    """One layer of a compressed context in full precision. Immutable: any number of questions share it.

    Attributes:
        k, v: [P, PAGE, D], keys after RoPE, and values.
        table: [B, Hkv, M] int32, page ids.
        lens: [B, Hkv] int32, kept slots.
        positions: [P, PAGE] int32, original position of each slot; None if every token was kept.
        counts: `lens` on the host, row by row, so that loops over heads do not wait for the device.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    lens: Tensor
    positions: Tensor | None
    counts: tuple[int, ...]

    @classmethod
    def empty(cls, like: Tensor) -> PagedKV:
        """No slots, in the dtype and on the device of a tensor."""
        pool = like.new_empty(0, PAGE, 0)
        table, lens = (torch.empty(shape, dtype=torch.int32, device=like.device) for shape in ((1, 0, 0), (1, 0)))
        return cls(pool, pool, table, lens, None, ())

    @classmethod
    def full(cls, k: Tensor, v: Tensor, tokens: int) -> PagedKV:
        """All tokens of a dense buffer, without a copy.

        k, v: [B, Hkv, S', D] contiguous, S' the next multiple of PAGE at or above `tokens`; D may differ.
        """
        batch, heads, padded, dim = k.shape
        pages = padded // PAGE
        table = torch.arange(batch * heads * pages, dtype=torch.int32, device=k.device)
        return cls(
            k=k.view(-1, PAGE, dim),
            v=v.view(-1, PAGE, v.shape[3]),
            table=table.view(batch, heads, pages),
            lens=torch.full((batch, heads), tokens, dtype=torch.int32, device=k.device),
            positions=None,
            counts=(tokens,) * (batch * heads),
        )

    @classmethod
    def gather(cls, k: Tensor, v: Tensor, keep: Tensor) -> PagedKV:
        """The kept slots of a dense cache, copied in their original order.

        k, v: [B, Hkv, S, D]; keep: [B, Hkv, S] bool.
        """
        heads, counts = keep.shape[1], keep.sum(-1).flatten().tolist()
        places = (divmod(row, heads) for row in range(len(counts)))
        indices = ((b, h, keep[b, h].nonzero().squeeze(-1)) for b, h in places)
        return cls.of_heads(
            ((k[b, h, index], v[b, h, index], index) for b, h, index in indices), counts, heads, like=(k, v)
        )

    @classmethod
    def of_heads(
        cls,
        slots: Iterable[tuple[Tensor, Tensor, Tensor]],
        counts: Sequence[int],
        heads: int,
        *,
        like: tuple[Tensor, Tensor],
    ) -> PagedKV:
        """Copies of the slots of each head of each sequence.

        Args:
            slots: keys and values [n, D] and original positions [n], ascending, of one head after the other.
            counts: n of each.
            heads: KV heads of a sequence.
            like: tensors [..., D] of the widths, dtype and device of keys and values; of values that are a view of the
                keys (`is_view`), those of the result are one too.
        """
        rows, device = len(counts), like[0].device
        used = [-(-n // PAGE) for n in counts]
        pool_k, pool_v = both(*like, lambda x: x.new_zeros(sum(used), PAGE, x.shape[-1]))
        positions = torch.zeros(sum(used), PAGE, dtype=torch.int32, device=device)
        table = torch.zeros(rows, max(used, default=0), dtype=torch.int32, device=device)
        first = 0
        for row, ((k, v, index), n, pages) in enumerate(zip(slots, counts, used, strict=True)):
            head_pages = slice(first, first + pages)
            pool_k[head_pages].flatten(0, 1)[:n] = k
            pool_v[head_pages].flatten(0, 1)[:n] = v
            positions[head_pages].view(-1)[:n] = index.int()
            table[row, :pages] = torch.arange(first, first + pages, dtype=torch.int32, device=device)
            first += pages
        return cls(
            k=pool_k,
            v=pool_v,
            table=table.view(rows // heads, heads, table.shape[1]),
            lens=torch.tensor(counts, dtype=torch.int32, device=device).view(rows // heads, heads),
            positions=positions,
            counts=tuple(counts),
        )

    @property
    def kept_bytes(self) -> int:
        """Bytes of the occupied slots: keys, values and positions."""
        slot = self._slot_bytes
        if self.positions is not None:
            slot += self.positions.element_size()
        return sum(self.counts) * slot

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors: whole pages, page table and lengths."""
        others = sum(t.nbytes for t in (self.table, self.lens, self.positions) if t is not None)
        return bytes_of(self.k, self.v) + others

    @property
    def read_bytes(self) -> int:
        """Bytes of keys and values that one decoding step reads."""
        return sum(self.counts) * self._slot_bytes

    @property
    def _slot_bytes(self) -> int:
        """Bytes of a key and its value."""
        channels = self.k.shape[-1] + (0 if is_view(self.k, self.v) else self.v.shape[-1])
        return channels * self.k.element_size()

    def kept_positions(self, b: int, h: int) -> Tensor:
        """[n] int64, the original positions of one head's slots, ascending."""
        n = self.counts[b * self.lens.shape[1] + h]
        if self.positions is None:
            return torch.arange(n, device=self.k.device)
        return self.positions[self.table[b, h].long()].flatten()[:n].long()

    def head(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, D] of head `row` of B * Hkv, as views, since a head's pages are contiguous."""
        before = sum(-(-n // PAGE) for n in self.counts[:row])
        n = self.counts[row]
        span = slice(before, before + -(-n // PAGE))
        return self.k[span].flatten(0, 1)[:n], self.v[span].flatten(0, 1)[:n]

    @property
    def value_dim(self) -> int:
        """As `KV.value_dim`."""
        return self.v.shape[-1]

    def take(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [m, D] of slots [m] of head `row`."""
        k, v = self.head(row)
        return k.index_select(0, slots), v.index_select(0, slots)

    def attend(self, q: Tensor, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
        """As `KV.attend`."""
        return attend(q, self, scaling, cap)


@dataclass(frozen=True)
class Around:
    """A layer of a context around another, which it reads in its own way; by default everything is that of `kv`.

    Attributes:
        kv: the layer inside.
    """

    kv: KV

    @property
    def lens(self) -> Tensor:
        """As `KV.lens`."""
        return self.kv.lens

    @property
    def counts(self) -> tuple[int, ...]:
        """As `KV.counts`."""
        return self.kv.counts

    @property
    def value_dim(self) -> int:
        """As `KV.value_dim`."""
        return self.kv.value_dim

    @property
    def kept_bytes(self) -> int:
        """As `KV.kept_bytes`."""
        return self.kv.kept_bytes

    @property
    def allocated_bytes(self) -> int:
        """As `KV.allocated_bytes`."""
        return self.kv.allocated_bytes

    @property
    def read_bytes(self) -> int:
        """As `KV.read_bytes`."""
        return self.kv.read_bytes

    def kept_positions(self, b: int, h: int) -> Tensor:
        """As `KV.kept_positions`."""
        return self.kv.kept_positions(b, h)

    def head(self, row: int) -> tuple[Tensor, Tensor]:
        """As `KV.head`."""
        return self.kv.head(row)

    def take(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """As `KV.take`."""
        return self.kv.take(row, slots)


def attend(q: Tensor, kv: KV, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of every query over all kept slots of its KV head, without a causal mask.

    q: [B, H, T, D]. `kv` has B sequences, or one that all B share.
    Returns o [B, H, T, D] in q's dtype and lse [B, H, T] float32 (natural log; zeros and -inf over an empty head).
    """
    sequences, kv_heads = kv.lens.shape
    rows = folded(q, sequences, kv_heads)
    if isinstance(kv, PagedKV) and len(set(kv.counts)) == 1:
        n = kv.counts[0]
        k, v = (pool.view(len(kv.counts), -1, pool.shape[-1])[:, :n] for pool in (kv.k, kv.v))
        o, lse = attend_rows(rows, k, v, scaling, cap)
    else:
        heads = (kv.head(row) for row in range(len(kv.counts)))
        parts = [attend_rows(rows[i : i + 1], k[None], v[None], scaling, cap) for i, (k, v) in enumerate(heads)]
        o, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return unfolded(o, q.shape, kv_heads), unfolded(lse[..., None], q.shape, kv_heads)[..., 0]
