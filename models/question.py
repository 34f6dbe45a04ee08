"""The layers of a question's cache: a shared compressed context, then the question's own dense tail."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from lceval.kernels import dense, dispatch, paged, step
from lceval.kernels.paged import KV, PAGE, PagedKV
from lceval.kernels.queue import WorkQueue, Workspace
from lceval.kernels.softmax import Softmax
from lceval.models.layers import AttendingLayer, attend_dense
from lceval.models.prefill_stats import QueryAwareStats
from lceval.models.reconstruction import ReconstructionStats


@dataclass(frozen=True)
class Rows:
    """The rows of a batch: their contexts, lengths and padding.

    Attributes:
        owners: index of each row's context; rows of one context are adjacent.
        tokens: context length of each row before eviction.
        pads: padding columns before each row's question; None without padding.
    """

    owners: tuple[int, ...]
    tokens: tuple[int, ...]
    pads: tuple[int, ...] | None = None
    _on_device: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def pads_on(self, device: torch.device) -> Tensor | None:
        """`pads` [B] int64 on a device; None without padding."""
        return None if self.pads is None else self.padding_on(device)

    def padding_on(self, device: torch.device) -> Tensor:
        """`pads` [B] int64 on a device; zeros without padding."""
        return self._copied("pads", self.pads or (0,) * len(self.tokens), device)

    def starts_on(self, device: torch.device) -> Tensor:
        """[B] int64 on a device, the position of the tail's first column in each row, negative in padding."""
        pads = self.pads or (0,) * len(self.tokens)
        return self._copied("starts", [n - p for n, p in zip(self.tokens, pads, strict=True)], device)

    def origins_on(self, slots: Sequence[int], device: torch.device) -> Tensor:
        """[B] int64 on a device, the position of the first of each row's last `slots` context tokens."""
        values = [tokens - n for tokens, n in zip(self.tokens, slots, strict=True)]
        return self._copied(f"origins of {values}", values, device)

    def _copied(self, name: str, values: Sequence[int], device: torch.device) -> Tensor:
        # All layers and steps of a batch share one copy: a copy makes the host wait for the device.
        if (name, device) not in self._on_device:
            self._on_device[name, device] = torch.tensor(values, device=device)
        return self._on_device[name, device]

    def select(self, rows: Sequence[int]) -> Rows:
        """These rows, in this order; a row may be repeated."""
        pick = [tuple(x[r] for r in rows) for x in (self.owners, self.tokens, self.pads or (0,) * len(self.owners))]
        return Rows(pick[0], pick[1], pick[2] if self.pads else None)

    def groups(self) -> list[tuple[int, slice]]:
        """Each context with the slice of its rows."""
        slices, start = [], 0
        for owner, same in groupby(self.owners):
            end = start + len(list(same))
            slices.append((owner, slice(start, end)))
            start = end
        return slices


class TailLayer(AttendingLayer):
    """A dense buffer of the tokens after the context, one row per question.

    Attributes:
        length: columns so far.
        start: columns that have left the buffer (`when=decode`).
    """

    is_croppable = True

    def __init__(self, contexts: Sequence[Any], rows: Rows, capacity: int) -> None:
        super().__init__()
        self.contexts = tuple(contexts)
        self.rows = rows
        self.capacity = capacity
        self.length = 0
        self.start = 0

    def lazy_initialization(self, k: Tensor, v: Tensor) -> None:
        columns = max(self.capacity, k.shape[2])
        self.keys, self.values = paged.both(k, v, lambda x: x.new_empty(*x.shape[:2], columns, x.shape[3]))
        self.is_initialized = True

    def append(self, k: Tensor, v: Tensor) -> None:
        new = slice(self.length - self.start, self.length - self.start + k.shape[2])
        if new.stop > self.keys.shape[2]:
            self._replace(lambda old: _grown(old, 2 * new.stop))
        self.keys[:, :, new] = k
        self.values[:, :, new] = v
        self.length += k.shape[2]

    def _replace(self, new: Callable[[Tensor], Tensor]) -> None:
        """Replace the buffers by new ones."""
        self.keys, self.values = paged.both(self.keys, self.values, new)

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, L, D] of the tail's tokens."""
        columns = self.length - self.start
        return self.keys[:, :, :columns], self.values[:, :, :columns]

    def get_seq_length(self) -> int:
        """The length of the longest row before eviction, from which transformers derives positions."""
        return max(self.rows.tokens) + self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -`tokens_to_remove` tokens of the tail (a negative number, as in transformers)."""
        self.length += min(tokens_to_remove, 0)
        assert self.length >= self.start, "a rollback cannot drop tokens of the context"

    def select(self, rows: Sequence[int], selected: Rows) -> None:
        """Keep these rows of the tail, in this order; contexts stay shared. selected: `rows.select` of them."""
        self.rows = selected
        if self.is_initialized:
            self._replace(lambda old: torch.stack([old[row] for row in rows]))

    def fork(self) -> TailLayer:
        """A copy with its own tail."""
        other = copy.copy(self)
        if self.is_initialized:
            other._replace(torch.clone)
        return other

    @staticmethod
    def joined(layers: Sequence[TailLayer], rows: Rows, capacity: int) -> TailLayer:
        """One layer with the rows of several single-row layers: tails are right-aligned, contexts are kept."""
        # A question of one token has fed nothing yet.
        other = copy.copy(next((layer for layer in layers if layer.is_initialized), layers[0]))
        other.rows, other.capacity, other.length = rows, capacity, max(layer.length for layer in layers)
        other.contexts = tuple(context for layer in layers for context in layer.contexts)
        # No row attends to the padding, but it must be finite.
        other._replace(lambda old: old.new_zeros(len(layers), old.shape[1], capacity, old.shape[3]))
        for row, layer in enumerate(layers):
            if not layer.is_initialized:
                continue
            own = slice(other.length - layer.length, other.length)
            other.keys[row : row + 1, :, own], other.values[row : row + 1, :, own] = layer.tail
        return other

    @property
    def own_bytes(self) -> int:
        """Bytes of the question's own tokens."""
        return paged.bytes_of(self.keys, self.values) if self.is_initialized else 0


def _grown(x: Tensor, columns: int) -> Tensor:
    """x [B, Hkv, L, D] with room for `columns`."""
    return torch.cat([x, x.new_empty(*x.shape[:2], columns - x.shape[2], x.shape[3])], 2)


class BatchProgress:
    """How far a batch is, where `kernels.step` reads it, and the workspace of its launches; all layers share it.

    Attributes:
        length: columns of the tails before the current pass.
        workspace: the queues of the work, and partial results.
    """

    def __init__(self) -> None:
        self.length = 0
        self.workspace = Workspace()
        self._on_device: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """`length` as [1] int32 on a device, where it is kept up to date."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor([self.length], dtype=torch.int32, device=device)
        return self._on_device[device]

    def is_on(self, device: torch.device) -> bool:
        """Whether `length` is on a device."""
        return device in self._on_device

    def start(self, length: int) -> None:
        """A pass starts after `length` columns."""
        if length != self.length:
            self.length = length
            for on_device in self._on_device.values():
                on_device.fill_(length)

    def advance(self, tokens: int) -> None:
        """A pass over `tokens` tokens ends."""
        self.length += tokens
        for on_device in self._on_device.values():
            on_device.add_(tokens)


class SteppingLayer(TailLayer):
    """A tail of which a pass over one token can be a single launch (`kernels.step`).

    Attributes:
        progress: shared with the other layers of the batch; None outside a batch.
    """

    def __init__(self, contexts: Sequence[Any], rows: Rows, capacity: int, kernels: bool) -> None:
        super().__init__(contexts, rows, capacity)
        self.kernels = kernels
        self.progress: BatchProgress | None = None
        self._fed: tuple[Tensor, Tensor] | None = None
        self._queue: tuple[tuple[object, ...], int, WorkQueue, step.Window | None] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        self._fed = None
        plain = self.kernels and self.progress is not None and self._takes_steps
        if not (plain and k.shape[2] == 1 and step.fits(self._sources()[0], k, v)):
            super().append(k, v)
            return
        stop, columns = self.length + 1, self.keys.shape[2]
        if stop > columns or columns % PAGE:
            pages = -(-(columns if stop <= columns else 2 * stop) // PAGE)
            self._replace(lambda old: _grown(old, pages * PAGE))
        # The launch that attends writes them.
        self._fed, self.length = (k, v), stop

    @property
    def is_step(self) -> bool:
        """Whether the last pass was a single launch, and the next can be."""
        return self._fed is not None

    @property
    def _takes_steps(self) -> bool:
        """Whether nothing else than attention is asked of a pass."""
        return True

    def _sources(self) -> tuple[Sequence[Any], Sequence[int]]:
        """The contexts as the kernel reads them, and the index of each row's."""
        return self.contexts, self.rows.owners

    def _window(self, device: torch.device) -> step.Window | None:
        """What a query sees; None: everything."""
        return None

    def _step(self, q: Tensor, softmax: Softmax) -> Tensor | None:
        """Attention of the last pass by a single launch; None if it is not one."""
        if self._fed is None:
            return None
        k, v = self._fed
        if q.dtype != k.dtype:  # under autocast
            self.keys[:, :, self.length - 1 : self.length], self.values[:, :, self.length - 1 : self.length] = k, v
            return None
        assert self.progress is not None
        tail, heads, device = (self.keys, self.values), q.shape[1], q.device
        # Each is replaced where it changes.
        known = (self.contexts, self.rows, self.keys)
        if self._queue is None or self._queue[1] != heads or any(map(is_not, self._queue[0], known)):
            queue = self.progress.workspace.queue(*self._sources(), tail, heads)
            self._queue = known, heads, queue, self._window(device)
        _, _, queue, window = self._queue
        return step.attend(
            q, k, v, tail, self.progress.on(device), self.rows.padding_on(device), queue, softmax, window
        )


class QuestionLayer(SteppingLayer):
    """A tail after compressed contexts without a sliding window.

    Attributes:
        collector: statistics of the queries over an uncompressed context.
        receive: called with the queries [B, H, T, D] and the softmax of every pass.
    """

    def __init__(self, contexts: Sequence[KV], rows: Rows, capacity: int, kernels: bool) -> None:
        super().__init__(contexts, rows, capacity, kernels)
        self.collector: QueryAwareStats | ReconstructionStats | None = None
        self.receive: Callable[[Tensor, Softmax], None] | None = None

    @property
    def _takes_steps(self) -> bool:
        return self.collector is None and self.receive is None

    def observe(self, q: Tensor, softmax: Softmax) -> None:
        if self.receive is not None:
            self.receive(q, softmax)
        if self.collector is not None:
            self.collector.update(q, self.tail[0], softmax)

    def attend(self, q: Tensor, softmax: Softmax) -> Tensor:
        if self.collector is not None:
            return self._attend_uncompressed(q, softmax)
        if (o := self._step(q, softmax)) is not None:
            return o
        own = dense.attend_causal(q, *self.tail, softmax, self.rows.pads_on(q.device))
        if not any(self.rows.tokens):
            return softmax.with_sink(*own)
        parts = [self._attend_context(self.contexts[owner], q[rows], softmax) for owner, rows in self.rows.groups()]
        past = parts[0] if len(parts) == 1 else [torch.cat(x) for x in zip(*parts, strict=True)]
        return merged(past[0], past[1], *own, softmax)

    def _attend_uncompressed(self, q: Tensor, softmax: Softmax) -> Tensor:
        """Attention over an uncompressed context: one product is faster than two that are merged."""
        kv = self.contexts[0]
        assert isinstance(kv, PagedKV), "statistics of a question require an uncompressed context"
        past = (pool.view(1, kv.lens.shape[1], -1, pool.shape[-1])[:, :, : kv.counts[0]] for pool in (kv.k, kv.v))
        k, v = (torch.cat(x, 2) for x in zip(past, self.tail, strict=True))
        return attend_dense(q, k, v, softmax)

    def _attend_context(self, kv: KV, q: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
        if self.kernels:
            return dispatch.attend(q, kv, softmax.scaling, softmax.cap)
        return kv.attend(q, softmax.scaling, softmax.cap)


def merged(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, softmax: Softmax) -> Tensor:
    """`dense.merge` of all keys, and then of the sink."""
    o = dense.merge(o1, lse1, o2, lse2)
    return o if softmax.sink is None else softmax.with_sink(o, torch.logaddexp(lse1, lse2))


@dataclass(frozen=True)
class NoKV:
    """The context of a layer without keys and values."""

    counts: tuple[int, ...] = ()
    kept_bytes: int = 0
    allocated_bytes: int = 0
    read_bytes: int = 0
