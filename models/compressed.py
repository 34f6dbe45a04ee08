"""A compressed context, and the KV cache of questions about it.

A compressed context is immutable; each question appends to its own tail (`fork`), so contexts are shared without copies
and a rollback drops the tail.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lceval.kernels.paged import KV, PagedKV
from lceval.models.bounded import BoundedKV, BoundedLayer
from lceval.models.geometry import Geometry, LayerKind
from lceval.models.prefill_stats import QueryAwareStats
from lceval.models.question import BatchProgress, NoKV, QuestionLayer, Rows, SteppingLayer, TailLayer
from lceval.models.reconstruction import ReconstructionStats
from lceval.models.states import NoKVLayer, State, StatefulCache, continuing
from lceval.models.window_layers import WindowKV, WindowLayer

ContextLayer = KV | BoundedKV | WindowKV | NoKV


@dataclass(frozen=True)
class CompressedContext:
    """A compressed context, shared by every question about it.

    Attributes:
        layers: one per layer of the model; a WindowKV for sliding-window layers, a BoundedKV under `when=always`, a
            NoKV for layers without keys and values.
        tokens: length of the context before eviction; the position of the next token.
        dtype: dtype of the model's keys and values.
        full_bytes: KV bytes of all `tokens` tokens in all layers without compression.
        peak_bytes: peak KV bytes during compression.
        compress_s: seconds of scoring, gathering, quantizing and indexing.
        states: after the context, by layer; empty of a model without states.
        is_latent: whether the slots are latents.
    """

    layers: tuple[ContextLayer, ...]
    tokens: int
    dtype: torch.dtype
    full_bytes: int
    peak_bytes: int
    compress_s: float
    states: tuple[State, ...] = ()
    is_latent: bool = False

    @classmethod
    def empty(cls, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> CompressedContext:
        """A context of no tokens: a prompt of one token is a question only."""
        no_window = torch.empty(1, 0, 0, 0, dtype=dtype, device=device)

        def layer(kind: LayerKind) -> ContextLayer:
            if kind.window is not None:
                return WindowKV(no_window, no_window, kind.window, kind.chunked)
            return PagedKV.empty(no_window) if kind.attends else NoKV()

        layers = tuple(layer(kind) for kind in geometry.layers)
        states = tuple(State((None,) * kind.states, (None,) * kind.states) for kind in geometry.layers)
        return cls(layers, 0, dtype, 0, 0, 0.0, states if geometry.has_states else (), geometry.latent)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states, part of `kept_bytes` and of `full_bytes`: nothing compresses them."""
        return sum(state.nbytes for state in self.states)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the occupied slots in all layers, and of states, counted from the tensors."""
        return self.state_bytes + sum(layer.kept_bytes for layer in self.layers)

    @property
    def kept_share(self) -> float:
        """`kept_bytes` as a share of `full_bytes`; 1.0 of a context of no tokens."""
        return self.kept_bytes / self.full_bytes if self.full_bytes else 1.0

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors in all layers, including page slack and tables."""
        return self.state_bytes + sum(layer.allocated_bytes for layer in self.layers)

    @property
    def read_bytes(self) -> int:
        """Bytes of keys and values, and of states, that one decoding step reads from the context."""
        return self.state_bytes + sum(layer.read_bytes for layer in self.layers)

    @property
    def full_attention_layers(self) -> list[KV | BoundedKV]:
        """The layers whose keys and values are compressed."""
        return [layer for layer in self.layers if not isinstance(layer, WindowKV | NoKV)]

    def kept_tokens(self) -> list[dict[str, float]]:
        """Minimum, mean and maximum kept tokens of a KV head, per full-attention layer."""
        counts = [layer.counts for layer in self.full_attention_layers if layer.counts]
        return [{"min": min(c), "mean": sum(c) / len(c), "max": max(c)} for c in counts]

    def kept_share_of(self, tokens: Tensor) -> float:
        """The kept share of `tokens` (bool [S], any device, not all False), over full-attention layers and KV heads."""
        heads = [
            layer.kept_positions(0, head) for layer in self.full_attention_layers for head in range(len(layer.counts))
        ]
        copies = {device: tokens.to(device) for device in {positions.device for positions in heads}}
        kept = [copies[positions.device][positions].sum() for positions in heads]
        # One wait for the device, not one for each head.
        total = int(torch.stack([n.to(kept[0].device) for n in kept]).sum())
        return total / (len(heads) * int(tokens.sum()))

    def fork(self, capacity: int, *, kernels: bool = False) -> QuestionCache:
        """A cache that continues from this context, with an initial capacity of `capacity` more tokens.

        Args:
            kernels: decode with the Triton kernels instead of PyTorch.
        """
        return QuestionCache([self], Rows((0,), (self.tokens,)), capacity, kernels)


class QuestionCache(StatefulCache):
    """A batch of rows that continue compressed contexts, one or more rows per context."""

    def __init__(self, contexts: Sequence[CompressedContext], rows: Rows, capacity: int, kernels: bool) -> None:
        layers: list[Any] = []
        for kvs in zip(*(context.layers for context in contexts), strict=True):
            if isinstance(kvs[0], NoKV):
                layers.append(NoKVLayer())
            elif isinstance(kvs[0], WindowKV):
                layers.append(WindowLayer(kvs, rows, capacity, kernels))
            elif isinstance(kvs[0], BoundedKV):
                layers.append(BoundedLayer(kvs, rows))
            else:
                layers.append(QuestionLayer(kvs, rows, capacity, kernels))
        states = continuing([contexts[owner].states for owner in rows.owners])
        super().__init__(layers, states, is_latent=contexts[0].is_latent)
        self.start_clock()
        self._share_progress()

    def _share_progress(self) -> None:
        self.progress = BatchProgress()
        for layer in self.layers:
            if isinstance(layer, SteppingLayer):
                layer.progress = self.progress

    def start_clock(self) -> None:
        """Set `first_step` to the start time of the second forward pass from now."""
        self._passes = 0
        self.first_step: float | None = None

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer_idx == self.first_index:
            self._passes += 1
            # The second call starts once the first token is decoded: it marks the start of decoding.
            if self._passes == 2:
                self.first_step = time.perf_counter()
            self.progress.start(self.first.length)
        return super().update(k, v, layer_idx, *args, **kwargs)

    def collect(self, collectors: Sequence[QueryAwareStats | ReconstructionStats | None]) -> None:
        """Collect statistics of later queries: one collector per layer, None for sliding-window layers."""
        for layer, collector in zip(self.layers, collectors, strict=True):
            if collector is not None:
                layer.collector = collector

    def rebase(self, context: CompressedContext) -> None:
        """Continue from another compression of the same context; the tail stays."""
        for layer, kv in zip(self.layers, context.layers, strict=True):
            layer.contexts = (kv,)
            layer.collector = None

    def next_positions(self, tokens: int, device: torch.device) -> Tensor:
        """[B, T] int64, positions of the next tokens of each row."""
        rows: Rows = self.first.rows
        self.progress.start(self.first.length)
        columns = torch.arange(tokens, device=device)
        # Where the length is on the device, a recorded pass reads it there.
        columns += self.progress.on(device) if self.progress.is_on(device) else self.first.length
        return (rows.starts_on(device)[:, None] + columns).clamp_(min=0)

    def steps_alike(self, steps: int) -> bool:
        """Whether each of the next `steps` steps is the same launches over the same tensors."""
        attending = [layer for layer in self.layers if layer.attends]
        return not self.state_layers and all(
            isinstance(layer, SteppingLayer) and layer.is_step and layer.length + steps <= layer.keys.shape[2]
            for layer in attending
        )

    def count_to(self, length: int) -> None:
        """Take note of passes that were replayed on the device: each tail has `length` columns."""
        self.progress.length = length
        for layer in self.layers:
            if layer.attends:
                layer.length = length

    def fork(self) -> QuestionCache:
        """An independent copy; contexts stay shared."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.layers = [layer.fork() for layer in self.layers]
        other.state_layers = continuing([self.states])
        other._share_progress()
        return other

    @classmethod
    def joined(cls, caches: Sequence[QuestionCache], capacity: int) -> QuestionCache:
        """One cache with the rows of several single-row caches, and a capacity of `capacity` more tokens."""
        lengths, tokens = [c.first.length for c in caches], [c.first.rows.tokens[0] for c in caches]
        pads = tuple(max(lengths) - length for length in lengths)
        rows = Rows(tuple(range(len(caches))), tuple(tokens), pads if any(pads) else None)
        other = object.__new__(cls)
        other.__dict__ |= caches[0].__dict__
        other.layers = [
            TailLayer.joined(layers, rows, max(lengths) + capacity) if layers[0].attends else layers[0]
            for layers in zip(*(c.layers for c in caches), strict=True)
        ]
        other.state_layers = continuing([cache.states for cache in caches])
        other._share_progress()
        return other

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; rows of one context must stay adjacent."""
        selected = self.first.rows.select(rows)
        for layer in self.layers:
            layer.select(rows, selected)
        for state in self.state_layers.values():
            state.select(rows)

    @property
    def own_bytes(self) -> int:
        """Bytes of the tails and states in all layers."""
        of_layers: int = sum(layer.own_bytes for layer in self.layers)
        return of_layers + sum(state.nbytes for state in self.state_layers.values())

    @property
    def peak_own_bytes(self) -> int:
        """Largest `own_bytes` so far."""
        return self.own_bytes

    def mark(self) -> None:
        """Let `rollback` return to this length: states cannot be rolled back, so they are copied."""
        self._marked = self.first.length, self.states

    def rollback(self, tokens: int) -> None:
        """Drop the last `tokens` tokens; of a model with states, those since `mark`."""
        self.crop(-tokens)
        if self.state_layers:
            length, states = self._marked
            assert length == self.first.length, "states return to where they were marked only"
            self.state_layers = continuing([states])
