"""The KV cache in its two states: a context being prefilled, and questions over a compressed context.

Eviction happens between the two, outside the model: the prefill keeps every token's keys and values and what the
policies asked to observe, so one uncompressed prefill can serve any number of recipes. A compressed context never
changes; each question appends to a tail of its own (`fork`), so sharing costs nothing and rolling back is forgetting
the tail.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lceval.kernels import compact
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.quant import QuantKV
from lceval.models.geometry import Geometry
from lceval.models.layers import PrefillLayer, SlidingPrefillLayer
from lceval.models.policies import Quantizer, StatsSpec, StepEvictor
from lceval.models.prefill_stats import PrefillStats, QueryAwareStats, ReconstructionStats
from lceval.models.question import BoundedKV, BoundedLayer, QuestionLayer, Rows, TailLayer, WindowKV, WindowLayer
from lceval.models.recipe import Recipe


class Prefill(Cache):  # type: ignore[misc]
    """The cache that a model fills while it reads a context of `tokens` tokens, in one piece or in chunks.

    Attributes:
        kernels: whether scores and compaction go through the Triton kernels.
        read_s: seconds that reading the context took, whoever asks; set by whoever runs the model, as `rereads`.
        rereads: the attention that repeating the context paid to it, per layer that sees all (`Needs.reread`); set
            by whoever runs the model.
    """

    def __init__(self, geometry: Geometry, tokens: int, stats_spec: StatsSpec, *, kernels: bool = False) -> None:
        super().__init__(
            layers=[
                PrefillLayer(tokens, PrefillStats(stats_spec, geometry.rotary, kernels=kernels))
                if window is None
                else SlidingPrefillLayer(tokens, PrefillStats(StatsSpec(), None), window)
                for window in geometry.windows
            ]
        )
        self.tokens = tokens
        self.stats_spec = stats_spec
        self.kernels = kernels
        self.prefill_s = 0.0
        self.reconstruction_attention: list[Tensor] | None = None

    @classmethod
    def for_model(cls, model: Any, tokens: int, stats_spec: StatsSpec) -> Prefill:
        """For a causal LM of transformers."""
        return cls(Geometry.of(model), tokens, stats_spec)

    @property
    def keys(self) -> list[Tensor | None]:
        """Per layer the keys [B, Hkv, S, D] of the whole context; None where the model slides."""
        return [None if layer.is_sliding else layer.keys[:, :, : layer.seen] for layer in self.layers]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that a cache without compression holds: sliding layers hold their window."""
        return sum(layer.kv_bytes for layer in self.layers)

    def compress(
        self, recipe: Recipe, *, consume: bool, question_cache: QuestionCache | None = None
    ) -> CompressedContext:
        """The context under a recipe.

        Args:
            consume: free each layer's dense keys and values as soon as it is compressed. The prefill can then serve
                no other recipe.
            question_cache: a question already prefilled over the whole context (`Engine.ask`): its tokens join the
                scores (query-aware).
        """
        start, full_bytes = time.perf_counter(), self.kv_bytes
        device, dtype = self.layers[0].keys.device, self.layers[0].keys.dtype
        held = peak = sum(layer.held_bytes for layer in self.layers)
        full_attention = [i for i, layer in enumerate(self.layers) if not layer.is_sliding]
        masks = dict(zip(full_attention, _counted(self._select(recipe, full_attention, question_cache)), strict=True))
        compressed: list[PagedKV | Any] = []
        for index, layer in enumerate(self.layers):
            if layer.is_sliding:
                k, v = layer.last
                compressed.append(WindowKV(k, v, layer.window))
                continue
            mask, counts = masks[index]
            kv: Any
            if self.kernels and isinstance(recipe.quantizer, Quantizer):
                # In one pass: the full-precision pages of what is kept never exist.
                kv, pages, copied = self._quantize(layer, mask, counts, recipe.quantizer), 0, 0
            else:
                kept = self._kept(layer, mask, counts)
                in_place = kept.k.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()
                copied = 0 if in_place else kept.allocated_bytes
                # Bytes that are counted with the pages already, be they the prefill's own or copies.
                pages = 0 if recipe.quantizer else kept.allocated_bytes
                kv = recipe.quantizer.quantize(kept) if recipe.quantizer else kept
            stored = self._stored(kv, recipe, full_attention.index(index), len(full_attention), layer)
            compressed.append(stored)
            peak = max(peak, held + copied + stored.allocated_bytes - pages)
            held += stored.allocated_bytes - (0 if copied else pages)
            if consume and (recipe.quantizer or copied):
                held -= layer.held_bytes
                layer.release()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return CompressedContext(tuple(compressed), self.tokens, dtype, full_bytes, peak, time.perf_counter() - start)

    def _select(
        self, recipe: Recipe, full_attention: list[int], question_cache: QuestionCache | None
    ) -> Sequence[Tensor | None]:
        """What stays of each layer that sees all, as a mask [B, Hkv, S]; None where everything does."""
        evictor = recipe.evictor
        if evictor is None or evictor.amount.tokens(self.tokens) >= self.tokens:
            return [None] * len(full_attention)
        scores = []
        for place, index in enumerate(full_attention):
            layer, stats = self.layers[index], self.layers[index].stats
            keys, values = layer.keys[:, :, : layer.seen], layer.values[:, :, : layer.seen]
            if question_cache is not None:
                tail, stats = question_cache.layers[index].tail, question_cache.layers[index].collector.stats
                keys, values = (torch.cat(x, 2) for x in zip((keys, values), tail, strict=True))
            reconstruction = None if self.reconstruction_attention is None else self.reconstruction_attention[place]
            view = stats.view(
                keys,
                values,
                layer.scaling,
                place,
                len(full_attention),
                kernels=self.kernels,
                reconstruction=reconstruction,
            )
            scores.append(evictor.scores(view)[..., : self.tokens])
        return evictor.select(scores)

    def _kept(self, layer: PrefillLayer, mask: Tensor | None, counts: Sequence[int]) -> PagedKV:
        if mask is None:
            return PagedKV.full(layer.keys, layer.values, layer.seen)
        k, v = layer.keys[:, :, : layer.seen], layer.values[:, :, : layer.seen]
        return compact.gather(k, v, mask, counts) if self.kernels else PagedKV.gather(k, v, mask)

    @staticmethod
    def _quantize(layer: PrefillLayer, mask: Tensor | None, counts: Sequence[int], store: Quantizer) -> QuantKV:
        k, v = layer.keys[:, :, : layer.seen], layer.values[:, :, : layer.seen]
        counts = counts or (layer.seen,) * (k.shape[0] * k.shape[1])
        return compact.quantize(k, v, mask, counts, store.k_bits, store.v_bits, store.residual)

    def _stored(self, kv: Any, recipe: Recipe, place: int, layers: int, layer: PrefillLayer) -> Any:
        evictor = recipe.evictor
        if isinstance(evictor, StepEvictor) and evictor.when == "always":
            sums = layer.stats.column_sums
            if sums is None:
                sums = torch.zeros(kv.lens.shape[0], kv.lens.shape[1], self.tokens, device=kv.k.device)
            kept = torch.stack([kv.kept_positions(0, head) for head in range(kv.lens.shape[1])])[None]
            budget = evictor.amount.tokens(self.tokens) if evictor.amount.is_share else int(evictor.amount.value)
            return BoundedKV(kv, evictor, sums.gather(2, kept), budget, place, layers, self.tokens)
        return kv if recipe.sparse_attention is None else recipe.sparse_attention.wrap(kv, place, self.tokens)


def _counted(masks: Sequence[Tensor | None]) -> list[tuple[Tensor | None, tuple[int, ...]]]:
    """Each layer's mask with how many tokens each of its heads keeps; a device is waited for once, not once a layer."""
    sums = [mask.sum(-1).flatten() for mask in masks if mask is not None]
    counts = iter(torch.stack(sums).tolist() if sums else ())
    return [(mask, () if mask is None else tuple(next(counts))) for mask in masks]


@dataclass(frozen=True)
class CompressedContext:
    """A compressed context, shared by every question about it.

    Attributes:
        layers: one KV a layer (`kernels.paged.KV`; a WindowKV where the model slides).
        tokens: how many tokens were read, kept or not: the position of the next one.
        dtype: of the model's keys and values.
        full_bytes: KV bytes of all `tokens` tokens in all layers, nothing dropped.
        peak_bytes: the most KV bytes held at once while compressing.
        compress_s: seconds that scoring, gathering, quantising and indexing took.
    """

    layers: tuple[Any, ...]
    tokens: int
    dtype: torch.dtype
    full_bytes: int
    peak_bytes: int
    compress_s: float

    @classmethod
    def empty(cls, layers: int, dtype: torch.dtype, device: torch.device) -> CompressedContext:
        """No context at all: a prompt of one token is all question."""
        none = torch.empty(0, PAGE, 0, dtype=dtype, device=device)
        table, lens = (torch.empty(shape, dtype=torch.int32, device=device) for shape in ((1, 0, 0), (1, 0)))
        return cls((PagedKV(none, none, table, lens, None, ()),) * layers, 0, dtype, 0, 0, 0.0)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the occupied slots in all layers, counted from the tensors."""
        return sum(layer.kept_bytes for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors in all layers: page slack and tables too."""
        return sum(layer.allocated_bytes for layer in self.layers)

    @property
    def read_bytes(self) -> int:
        """Bytes of keys and values that one decoding step reads from the context."""
        return sum(layer.read_bytes for layer in self.layers)

    @property
    def full_attention_layers(self) -> list[Any]:
        """The layers that see all tokens."""
        return [layer for layer in self.layers if not isinstance(layer, WindowKV)]

    def kept_tokens(self) -> list[dict[str, float]]:
        """Per layer that sees all, the fewest, mean and most tokens that a KV head kept."""
        counts = [layer.counts for layer in self.full_attention_layers if layer.counts]
        return [{"min": min(c), "mean": sum(c) / len(c), "max": max(c)} for c in counts]

    def kept_of(self, tokens: Tensor) -> float:
        """The share of `tokens` (bool [S], not all False) whose slots survived, over all layers and KV heads."""
        shares = [
            tokens[layer.kept_positions(0, head)].sum().item() / tokens.sum().item()
            for layer in self.full_attention_layers
            for head in range(len(layer.counts))
        ]
        return sum(shares) / len(shares)

    def fork(self, capacity: int, *, kernels: bool = False) -> QuestionCache:
        """A cache that continues from this context, with room for `capacity` more tokens (it grows if need be).

        Args:
            kernels: decode through the Triton kernels instead of PyTorch.
        """
        return QuestionCache([self], Rows((0,), (self.tokens,)), capacity, kernels)


class QuestionCache(Cache):  # type: ignore[misc]
    """Rows of tokens after compressed contexts: one or more rows over each."""

    def __init__(self, contexts: Sequence[CompressedContext], rows: Rows, capacity: int, kernels: bool) -> None:
        layers: list[Any] = []
        for kvs in zip(*(context.layers for context in contexts), strict=True):
            if isinstance(kvs[0], WindowKV):
                layers.append(WindowLayer(kvs, rows, capacity))
            elif isinstance(kvs[0], BoundedKV):
                layers.append(BoundedLayer(kvs, rows))
            else:
                layers.append(QuestionLayer(kvs, rows, capacity, kernels))
        super().__init__(layers=layers)
        self.start_clock()

    def start_clock(self) -> None:
        """Let `first_step` be the moment at which the second forward pass from now begins."""
        self._passes = 0
        self.first_step: float | None = None

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer_idx == 0:
            self._passes += 1
            # The first token is out when the model is called again: that call marks the start of decoding.
            if self._passes == 2:
                self.first_step = time.perf_counter()
        return super().update(k, v, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def collect(self, collectors: Sequence[QueryAwareStats | ReconstructionStats | None]) -> None:
        """Collect statistics of the queries to come: one collector a layer, None for sliding layers."""
        for layer, collector in zip(self.layers, collectors, strict=True):
            if collector is not None:
                layer.collector = collector

    def over(self, context: CompressedContext) -> None:
        """Continue over another compression of the same context; what was read stays in the tail."""
        for layer, kv in zip(self.layers, context.layers, strict=True):
            layer.contexts = (kv,)
            layer.collector = None

    def next_positions(self, tokens: int) -> Tensor:
        """[B, T] int64, the positions of each row's next tokens."""
        rows, length = self.layers[0].rows, self.layers[0].length
        first = torch.tensor([n - p for n, p in zip(rows.tokens, rows.pads or (0,) * len(rows.tokens), strict=True)])
        return (first[:, None] + torch.arange(length, length + tokens)).clamp_(min=0)

    def fork(self) -> QuestionCache:
        """A copy that goes on by itself."""
        other = object.__new__(QuestionCache)
        other.__dict__ |= self.__dict__
        other.layers = [layer.fork() for layer in self.layers]
        return other

    @classmethod
    def joined(cls, caches: Sequence[QuestionCache], capacity: int) -> QuestionCache:
        """One cache of the rows of several, which hold one row each, with room for `capacity` more tokens."""
        lengths, tokens = [c.layers[0].length for c in caches], [c.layers[0].rows.tokens[0] for c in caches]
        pads = tuple(max(lengths) - length for length in lengths)
        rows = Rows(tuple(range(len(caches))), tuple(tokens), pads if any(pads) else None)
        other = object.__new__(cls)
        other.__dict__ |= caches[0].__dict__
        other.layers = [
            TailLayer.joined(layers, rows, max(lengths) + capacity)
            for layers in zip(*(c.layers for c in caches), strict=True)
        ]
        return other

    def select(self, rows: Sequence[int]) -> None:
        """Keep those rows, in that order; rows of one context must stay side by side."""
        for layer in self.layers:
            layer.select(rows)

    @property
    def own_bytes(self) -> int:
        """Bytes that belong to the questions alone, in all layers."""
        return sum(layer.own_bytes for layer in self.layers)

    def rollback(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""
        self.crop(-tokens)
