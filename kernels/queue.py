"""The work of one decoding step of a batch as a queue of equal items: spans of pages of contexts and of tails.

A program takes one item, whatever head, row or context it belongs to, so that heads that keep different counts, and
contexts of different lengths, are spread evenly over a GPU. The queue depends on what a batch keeps, not on what it
writes: one queue serves every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.launch import BLOCK_G, MAX_SPLITS, multiprocessors
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.quant import QuantKV

# Programs that are in flight on a multiprocessor at a time, and the pages below which a program is not worth its start.
PROGRAMS, SHORTEST = 4, 2
# Tokens of a tail in one item. Items past the end of what was written end at once.
TAIL_SPAN = 8 * PAGE
# Columns of `WorkQueue.items`, `WorkQueue.tiles` and `WorkQueue.sources`.
ITEM, TILE, SOURCE = 9, 4, 7

Stored = PagedKV | Fp8KV | QuantKV


class Codes(NamedTuple):
    """How contexts are stored: whether in 8-bit floats, and the bits of the codes of keys and values, 0 without codes.

    A quantized context has two sources, an odd one with its newest slots, and an even one with its codes.
    """

    fp8: bool = False
    k_bits: int = 0
    v_bits: int = 0

    @classmethod
    def of(cls, kv: Stored) -> Codes:
        """Those of a context."""
        return cls(isinstance(kv, Fp8KV), *((kv.k.bits, kv.v.bits) if isinstance(kv, QuantKV) else ()))


@dataclass(frozen=True)
class WorkQueue:
    """The items of one layer. A tile are up to `BLOCK_G` queries over one KV head: of rows that share a context.

    Attributes:
        items: [N, ITEM] int32: source, first row, rows, KV head, first query head of the group, place of the head's
            first page in its source's table, first slot, last slot (exclusive), tile.
        tiles: [N', TILE] int32: first and last item (exclusive) of the context, first item of the tails, items in all.
        spans: items of one row's tail.
        sources: [N'', SOURCE] int64, addresses of keys, values, page table, key scales, value scales, key zeros and
            value zeros (0 where there are none); the first are the tails'.
        part_o: [>= N, BLOCK_G, E] float32, and part_lse: [>= N, BLOCK_G] float32: what the programs write.
        arrived: [>= N'] int32, zeros between two steps.
        codes: of all contexts.
        alive: the tensors behind the addresses.
    """

    items: Tensor
    tiles: Tensor
    spans: int
    sources: Tensor
    part_o: Tensor
    part_lse: Tensor
    arrived: Tensor
    codes: Codes
    alive: tuple[Tensor, ...]


class Workspace:
    """What the queues of a batch's layers share: items of layers that keep the same counts, and the partial results."""

    def __init__(self) -> None:
        self._items: dict[object, tuple[Tensor, Tensor, int]] = {}
        self._results: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}

    def queue(
        self, contexts: Sequence[Stored], owners: Sequence[int], tail: tuple[Tensor, Tensor], heads: int
    ) -> WorkQueue:
        """The queue of a layer.

        Args:
            contexts: of one sequence each, in `owners`' numbering.
            owners: index of each row's context; rows of one context are adjacent.
            tail: keys and values [B, Hkv, L, D] contiguous, L a multiple of PAGE; values can be a view of keys.
            heads: query heads.
        """
        keys, values = tail
        kv_heads, pages = keys.shape[1], keys.shape[2] // PAGE
        layout = tuple(tuple((counts, table.shape[-1]) for counts, table, _ in _parts(kv)) for kv in contexts)
        key = layout, tuple(owners), heads, kv_heads, pages, keys.device
        if key not in self._items:
            target = PROGRAMS * multiprocessors(keys)
            both = items_of(layout, owners, heads // kv_heads, kv_heads, pages, target)
            items, tiles = (torch.tensor(x, dtype=torch.int32, device=keys.device) for x in both)
            self._items[key] = items, tiles, -(-pages * PAGE // TAIL_SPAN)
        items, tiles, spans = self._items[key]
        table = torch.arange(len(owners) * kv_heads * pages, dtype=torch.int32, device=keys.device)
        sources: list[list[Tensor | None]] = [[keys, values, table]]
        sources += [[k, v, table, *scales] for kv in contexts for _, table, (k, v, *scales) in _parts(kv)]
        alive = tuple(x for source in sources for x in source if x is not None)
        # Values that are a view of the keys have their rows.
        assert all(x.is_contiguous() or x.data_ptr() == y.data_ptr() for y, x in pairwise(alive))
        addresses = [[0 if x is None else x.data_ptr() for x in source] for source in sources]
        addresses = [[*source, *[0] * (SOURCE - len(source))] for source in addresses]
        on_device = torch.tensor(addresses, dtype=torch.int64, device=keys.device)
        results = self._room(items, tiles, values.shape[3])
        return WorkQueue(items, tiles, spans, on_device, *results, Codes.of(contexts[0]), alive)

    def _room(self, items: Tensor, tiles: Tensor, value_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tensors for partial results, shared by the layers of a device: they run one after another."""
        device = items.device
        known = self._results.get((device, value_dim))
        if known is None or len(known[0]) < len(items) or len(known[2]) < len(tiles):
            self._results[device, value_dim] = known = (
                torch.empty(len(items), BLOCK_G, value_dim, device=device),
                torch.empty(len(items), BLOCK_G, device=device),
                torch.zeros(len(tiles), dtype=torch.int32, device=device),
            )
        return known


Part = tuple[tuple[int, ...], Tensor, list[Tensor | None]]


def _parts(kv: Stored) -> list[Part]:
    """The counts, the page table, and the keys, values, scales and zeros of each source of a context."""
    if isinstance(kv, Fp8KV):
        return [(kv.counts, kv.kv.table, [kv.kv.k, kv.kv.v, kv.k_scale, kv.v_scale])]
    if isinstance(kv, PagedKV):
        return [(kv.counts, kv.table, [kv.k, kv.v])]
    codes = [kv.k.words, kv.v.words, kv.k.scale, kv.v.scale, kv.k.zero, kv.v.zero]
    newest = kv.residual
    slots = tuple(pages * PAGE for pages in kv.pages)
    return [(newest.counts, newest.table, [newest.k, newest.v]), (slots, kv.table, codes)]


def items_of(
    layout: Sequence[Sequence[tuple[tuple[int, ...], int]]],
    owners: Sequence[int],
    group: int,
    kv_heads: int,
    pages: int,
    target: int,
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """`WorkQueue.items` and `WorkQueue.tiles`.

    Args:
        layout: of each source of each context the slots of its KV heads, and the width of its page table. All
            contexts have as many sources.
        group: query heads of a KV head.
        pages: pages of a row's tail.
        target: how many items are sought.
    """
    tiles = list(_tiles(owners, group, kv_heads))
    counts = [[of[head] if of else 0 for of, _ in layout[owner]] for owner, _, _, head, _ in tiles]
    used = [sum(-(-count // PAGE) for count in of) for of in counts]
    span = max(SHORTEST, -(-sum(used) // max(1, target)), -(-max(used, default=0) // MAX_SPLITS)) * PAGE
    items: list[tuple[int, ...]] = []
    of_context = []
    for number, ((owner, row, rows, head, first), parts) in enumerate(zip(tiles, counts, strict=True)):
        begin = len(items)
        for part, count in enumerate(parts):
            source, place = 1 + owner * len(parts) + part, head * layout[owner][part][1]
            items += [
                (source, row, rows, head, first, place, slot, min(slot + span, count), number)
                for slot in range(0, count, span)
            ]
        of_context.append((begin, len(items)))
    described: list[tuple[int, ...]] = []
    for number, ((_, row, rows, head, first), bounds) in enumerate(zip(tiles, of_context, strict=True)):
        begin = len(items)
        for own in range(row, row + rows):
            place = (own * kv_heads + head) * pages
            for slot in range(0, pages * PAGE, TAIL_SPAN):
                stop = min(slot + TAIL_SPAN, pages * PAGE)
                items.append((0, own, 1, head, first, place, slot, stop, number))
        described.append((*bounds, begin, bounds[1] - bounds[0] + len(items) - begin))
    return items, described


def _tiles(owners: Sequence[int], group: int, kv_heads: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The context, first row, rows, KV head and first query head in its group, of every tile."""
    most, row = max(1, BLOCK_G // group), 0
    for owner, same in groupby(owners):
        end = row + len(list(same))
        for start in range(row, end, most):
            for head in range(kv_heads):
                for first in range(0, group, BLOCK_G):
                    yield owner, start, min(most, end - start), head, first
        row = end
