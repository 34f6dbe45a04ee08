"""The KV cache in its two states: a context during prefill, and questions over a compressed context.

Eviction happens between the two, outside the model: the prefill keeps the keys and values of every token and the
statistics that policies require, so one uncompressed prefill serves any number of recipes. A compressed context is
immutable; each question appends to its own tail (`fork`), so contexts are shared without copies and a rollback drops
the tail.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.paged import KV, PAGE, PagedKV
from lceval.kernels.quant import QuantKV
from lceval.kernels.rotated import Rotated
from lceval.models.bounded import BoundedKV, BoundedLayer
from lceval.models.geometry import Geometry, LayerKind
from lceval.models.layers import PrefillLayer, SlidingPrefillLayer
from lceval.models.policies import Quantizer, StatsSpec, StepEvictor
from lceval.models.prefill_stats import SCORING, PrefillStats, QueryAwareStats
from lceval.models.question import NoKV, QuestionLayer, Rows, Steps, TailLayer, WindowKV, WindowLayer
from lceval.models.recipe import Recipe
from lceval.models.reconstruction import ReconstructionStats
from lceval.models.states import NoKVLayer, State, StatefulCache, StateLayer, continuing


class Prefill(StatefulCache):
    """The cache of a context of `tokens` tokens during its prefill, in one pass or in chunks.

    Attributes:
        kernels: whether scores and compaction use the Triton kernels.
        prefill_s: seconds of the prefill; set by the engine.
        protected: number of first tokens before the user's message (chat template, system prompt); set by the engine.
        reconstruction_attention: per full-attention layer the attention [B, Hkv, S] that the context received during
            reconstruction (`StatsSpec.reconstruction`); set by the engine, None without.
        reconstruction_plus: the same, normalized (`StatsSpec.reconstruction_plus`).
        output_norms: per full-attention layer (`StatsSpec.output_norms`); set by the engine, None without.
    """

    def __init__(self, geometry: Geometry, tokens: int, stats_spec: StatsSpec, *, kernels: bool = False) -> None:
        def layer(kind: LayerKind) -> Any:
            if not kind.attends:
                return NoKVLayer()
            if kind.window is not None:
                return SlidingPrefillLayer(tokens, PrefillStats(StatsSpec(), None), kind.window, kind.chunked)
            return PrefillLayer(tokens, PrefillStats(stats_spec, geometry.rotary, kernels=kernels))

        super().__init__(
            [layer(kind) for kind in geometry.layers],
            {index: StateLayer(kind.states) for index, kind in enumerate(geometry.layers) if kind.states},
            is_latent=geometry.latent,
        )
        self.tokens = tokens
        self.stats_spec = stats_spec
        self.kernels = kernels
        self.prefill_s = 0.0
        self.protected = 0
        self.reconstruction_attention: list[Tensor] | None = None
        self.reconstruction_plus: list[Tensor] | None = None
        self.output_norms: list[Tensor] | None = None

    @property
    def keys(self) -> list[Tensor | None]:
        """Per layer the keys [B, Hkv, S, D] of the whole context; None for others than full-attention layers."""
        return [layer.keys[:, :, : layer.seen] if layer.is_full else None for layer in self.layers]

    @property
    def devices(self) -> set[torch.device]:
        """The devices of the layers; several under `parallelize=True`."""
        return {layer.keys.device for layer in self.layers if layer.attends}

    @property
    def kv_bytes(self) -> int:
        """KV bytes of the uncompressed context, for sliding-window layers of their window, and bytes of states."""
        of_layers: int = sum(layer.kv_bytes for layer in self.layers)
        return of_layers + sum(layer.nbytes for layer in self.state_layers.values())

    @torch.inference_mode()
    def compress(
        self, recipe: Recipe, *, consume: bool, question_cache: QuestionCache | None = None
    ) -> CompressedContext:
        """The context compressed by a recipe.

        Args:
            consume: free each layer's dense keys and values once it is compressed. The prefill then serves no other
                recipe.
            question_cache: a question prefilled over the whole context (`Engine.prefill_question`), whose tokens join
                the scores (query-aware).
        """
        assert not recipe.reads_in_chunks, "eviction while reading has no whole prefill"
        start, full_bytes = time.perf_counter(), self.kv_bytes
        devices, dtype, states = self.devices, self.first.keys.dtype, self.states
        current = peak = sum(state.nbytes for state in states) + sum(layer.buffer_bytes for layer in self.layers)
        full_attention = [i for i, layer in enumerate(self.layers) if layer.is_full]
        masks = dict(
            zip(full_attention, _with_counts(self._select(recipe, full_attention, question_cache)), strict=True)
        )
        compressed: list[ContextLayer] = []
        for index, layer in enumerate(self.layers):
            if not layer.attends:
                compressed.append(NoKV())
                continue
            if layer.is_sliding:
                k, v = layer.last
                compressed.append(WindowKV(k, v, layer.window, layer.chunked))
                continue
            mask, counts = masks[index]
            kv: PagedKV | QuantKV | Rotated | Fp8KV
            if isinstance(recipe.quantizer, Quantizer) and self.kernels and layer.compacts:
                # One pass: the kept slots are never materialized as full-precision pages.
                kv, pages, copied = self._quantize(layer, mask, counts, recipe.quantizer), 0, 0
            else:
                kept = layer.kept(mask, counts, kernels=self.kernels)
                in_place = kept.k.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()
                copied = 0 if in_place else kept.allocated_bytes
                # Bytes already counted with the pages, whether they are the prefill's buffers or copies.
                pages = 0 if recipe.quantizer else kept.allocated_bytes
                kv = recipe.quantizer.quantize(kept) if recipe.quantizer else kept
            layer_kv = self._with_sparse_attention(kv, recipe, full_attention.index(index), len(full_attention), layer)
            compressed.append(layer_kv)
            peak = max(peak, current + copied + layer_kv.allocated_bytes - pages)
            current += layer_kv.allocated_bytes - (0 if copied else pages)
            if consume and (recipe.quantizer or copied):
                current -= layer.buffer_bytes
                layer.release()
        synchronize(devices)
        seconds = time.perf_counter() - start
        return CompressedContext(
            tuple(compressed), self.tokens, dtype, full_bytes, peak, seconds, states, self.is_latent
        )

    def _select(
        self, recipe: Recipe, full_attention: list[int], question_cache: QuestionCache | None
    ) -> Sequence[Tensor | None]:
        """The kept slots of each full-attention layer as a mask [B, Hkv, S]; None where nothing is evicted."""
        evictor = recipe.evictor
        if evictor is None or evictor.write_every or evictor.keeps_all(self.tokens):
            return [None] * len(full_attention)
        scores = []
        for place, index in enumerate(full_attention):
            layer, stats = self.layers[index], self.layers[index].stats
            keys, values = layer.keys[:, :, : layer.seen], layer.values[:, :, : layer.seen]
            if question_cache is not None:
                tail, stats = question_cache.layers[index].tail, question_cache.layers[index].collector.stats
                keys, values = (torch.cat(x, 2) for x in zip((keys, values), tail, strict=True))
            attention, plus, norms = (
                None if of_layers is None else of_layers[place]
                for of_layers in (self.reconstruction_attention, self.reconstruction_plus, self.output_norms)
            )
            view = stats.view(
                keys,
                values,
                layer.softmax,
                place,
                len(full_attention),
                kernels=self.kernels,
                reconstruction=attention,
                reconstruction_plus=plus,
                output_norms=norms,
                question=keys.shape[2] - self.tokens,
                protected=self.protected,
            )
            with record_function(SCORING):
                scores.append(evictor.scores(view)[..., : self.tokens])
        return evictor.select(scores)

    @staticmethod
    def _quantize(
        layer: PrefillLayer, mask: Tensor | None, counts: Sequence[int], quantizer: Quantizer
    ) -> QuantKV | Rotated:
        k, v = layer.keys[:, :, : layer.seen], layer.values[:, :, : layer.seen]
        return quantizer.gathered(k, v, mask, counts or (layer.seen,) * (k.shape[0] * k.shape[1]))

    def _with_sparse_attention(
        self, kv: PagedKV | QuantKV | Rotated | Fp8KV, recipe: Recipe, place: int, layers: int, layer: PrefillLayer
    ) -> KV | BoundedKV:
        """The layer under `when=always` or sparse attention, or `kv` itself."""
        evictor = recipe.evictor
        if recipe.evicts_always:
            assert isinstance(evictor, StepEvictor)
            assert isinstance(kv, PagedKV), "a recipe that evicts while decoding stores full precision"
            sums = layer.stats.column_sums
            if sums is None:
                sums = torch.zeros(kv.lens.shape[0], kv.lens.shape[1], self.tokens, device=kv.k.device)
            kept = torch.stack([kv.kept_positions(0, head) for head in range(kv.lens.shape[1])])[None]
            amount = evictor.budgeted
            budget = amount.tokens(self.tokens) if amount.is_share else int(amount.value)
            return BoundedKV(kv, evictor, sums.gather(2, kept), budget, place, layers, self.tokens)
        return kv if recipe.sparse_attention is None else recipe.sparse_attention.wrap(kv, place, self.tokens)


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait for all work on those of the devices that are CUDA devices."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _with_counts(masks: Sequence[Tensor | None]) -> list[tuple[Tensor | None, tuple[int, ...]]]:
    """Each layer's mask with the kept tokens of each head; one device synchronization for all layers."""
    sums = [mask.sum(-1).flatten() for mask in masks if mask is not None]
    counts = iter(torch.stack([x.to(sums[0].device) for x in sums]).tolist() if sums else ())
    return [(mask, () if mask is None else tuple(next(counts))) for mask in masks]


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
        none, no_window = (torch.empty(shape, dtype=dtype, device=device) for shape in ((0, PAGE, 0), (1, 0, 0, 0)))
        table, lens = (torch.empty(shape, dtype=torch.int32, device=device) for shape in ((1, 0, 0), (1, 0)))

        def layer(kind: LayerKind) -> ContextLayer:
            if kind.window is not None:
                return WindowKV(no_window, no_window, kind.window, kind.chunked)
            return PagedKV(none, none, table, lens, None, ()) if kind.attends else NoKV()

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
                layers.append(WindowLayer(kvs, rows, capacity))
            elif isinstance(kvs[0], BoundedKV):
                layers.append(BoundedLayer(kvs, rows))
            else:
                layers.append(QuestionLayer(kvs, rows, capacity, kernels))
        states = continuing([contexts[owner].states for owner in rows.owners])
        super().__init__(layers, states, is_latent=contexts[0].is_latent)
        self.start_clock()
        self._share_steps()

    def _share_steps(self) -> None:
        self.steps = Steps()
        for layer in self.layers:
            if isinstance(layer, QuestionLayer):
                layer.steps = self.steps

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
            self.steps.start(self.first.length)
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
        length = self.first.length
        return (rows.starts_on(device)[:, None] + torch.arange(length, length + tokens, device=device)).clamp_(min=0)

    def fork(self) -> QuestionCache:
        """An independent copy; contexts stay shared."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.layers = [layer.fork() for layer in self.layers]
        other.state_layers = continuing([self.states])
        other._share_steps()
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
        other._share_steps()
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
