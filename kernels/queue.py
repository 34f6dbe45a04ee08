"""The work of one decoding step of a batch as a queue of equal items: spans of pages of contexts and of tails.

A program takes one item, whatever head, row or context it belongs to, so that heads that keep different counts, and
contexts of different lengths, are spread evenly over a GPU. The queue depends on what a batch keeps, not on what it
writes: one queue serves every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lceval.kernels import paged
from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.launch import BLOCK_G, MAX_SPLITS, multiprocessors
from lceval.kernels.paged import PAGE, PagedKV

# Programs that are in flight on a multiprocessor at a time, and the pages below which a program is not worth its start.
PROGRAMS, SHORTEST = 4, 2
# Tokens of a tail in one item. Items past the end of what was written end at once.
TAIL_SPAN = 8 * PAGE
# Columns of `WorkQueue.items`, `WorkQueue.tiles` and `WorkQueue.sources`.
ITEM, TILE, SOURCE = 9, 4, 5

Stored = PagedKV | Fp8KV


@dataclass(frozen=True)
class WorkQueue:
    """The items of one layer. A tile are up to `BLOCK_G` queries over one KV head: of rows that share a context.

    Attributes:
        items: [N, ITEM] int32: source, first row, rows, KV head, first query head of the group, place of the head's
            first page in its source's table, first slot, last slot (exclusive), tile.
        tiles: [N', TILE] int32: first and last item (exclusive) of the context, first item of the tails, items in all.
        spans: items of one row's tail.
        sources: [1 + contexts, SOURCE] int64, addresses of keys, values, page table, key scales and value scales; the
            first are the tails'.
        part_o: [>= N, BLOCK_G, E] float32, and part_lse: [>= N, BLOCK_G] float32: what the programs write.
        arrived: [>= N'] int32, zeros between two steps.
        alive: the tensors behind the addresses.
    """

    items: Tensor
    tiles: Tensor
    spans: int
    sources: Tensor
    part_o: Tensor
    part_lse: Tensor
    arrived: Tensor
    alive: tuple[Tensor, ...]


class Workspace:
    """What the queues of a batch's layers share: items of layers that keep the same counts, and the partial results."""

    def __init__(self) -> None:
        self._items: dict[object, tuple[Tensor, Tensor, int]] = {}
        self._parts: tuple[Tensor, Tensor, Tensor] | None = None

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
        stored = [kv.kv if isinstance(kv, Fp8KV) else kv for kv in contexts]
        layout = tuple((kv.counts, kv.table.shape[-1]) for kv in stored)
        key = layout, tuple(owners), heads, kv_heads, pages, keys.device
        if key not in self._items:
            target = PROGRAMS * multiprocessors(keys)
            both = items_of(layout, owners, heads // kv_heads, kv_heads, pages, target)
            items, tiles = (torch.tensor(x, dtype=torch.int32, device=keys.device) for x in both)
            self._items[key] = items, tiles, -(-pages * PAGE // TAIL_SPAN)
        items, tiles, spans = self._items[key]
        table = torch.arange(len(owners) * kv_heads * pages, dtype=torch.int32, device=keys.device)
        alive = [keys, values, table]
        addresses = [[keys.data_ptr(), values.data_ptr(), table.data_ptr(), 0, 0]]
        for kv, pool in zip(contexts, stored, strict=True):
            assert pool.k.is_contiguous()
            assert paged.is_view(pool.k, pool.v) or pool.v.is_contiguous()
            tensors = [pool.k, pool.v, pool.table]
            if isinstance(kv, Fp8KV):
                tensors += [kv.k_scale, kv.v_scale]
            alive += tensors
            addresses.append([*(x.data_ptr() for x in tensors), 0, 0][:SOURCE])
        sources = torch.tensor(addresses, dtype=torch.int64, device=keys.device)
        return WorkQueue(items, tiles, spans, sources, *self._partial(items, tiles, values), tuple(alive))

    def _partial(self, items: Tensor, tiles: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._parts is None or len(self._parts[0]) < len(items) or len(self._parts[2]) < len(tiles):
            self._parts = (
                torch.empty(len(items), BLOCK_G, values.shape[3], device=values.device),
                torch.empty(len(items), BLOCK_G, device=values.device),
                torch.zeros(len(tiles), dtype=torch.int32, device=values.device),
            )
        return self._parts


def items_of(
    layout: Sequence[tuple[tuple[int, ...], int]],
    owners: Sequence[int],
    group: int,
    kv_heads: int,
    pages: int,
    target: int,
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """`WorkQueue.items` and `WorkQueue.tiles`.

    Args:
        layout: of each context the kept slots of its KV heads, and the width of its page table.
        group: query heads of a KV head.
        pages: pages of a row's tail.
        target: how many items are sought.
    """
    tiles = list(_tiles(owners, group, kv_heads))
    counts = [layout[owner][0][head] if layout[owner][0] else 0 for owner, _, _, head, _ in tiles]
    used = [-(-count // PAGE) for count in counts]
    span = max(SHORTEST, -(-sum(used) // max(1, target)), -(-max(used, default=0) // MAX_SPLITS)) * PAGE
    items: list[tuple[int, ...]] = []
    of_context = []
    for number, ((owner, row, rows, head, first), count) in enumerate(zip(tiles, counts, strict=True)):
        begin = len(items)
        for slot in range(0, count, span):
            place, stop = head * layout[owner][1], min(slot + span, count)
            items.append((1 + owner, row, rows, head, first, place, slot, stop, number))
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
