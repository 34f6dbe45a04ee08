"""The KV cache of a context during its prefill, and its compression.

Eviction happens after the prefill, outside the model: the prefill keeps the keys and values of every token and the
statistics that policies require, so one uncompressed prefill serves any number of recipes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from lceval.kernels import paged
from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.paged import KV, PagedKV
from lceval.kernels.quant import QuantKV
from lceval.kernels.rotated import Rotated
from lceval.models.bounded import BoundedKV
from lceval.models.compressed import CompressedContext, ContextLayer, QuestionCache
from lceval.models.geometry import Geometry, LayerKind
from lceval.models.layers import PrefillLayer, SlidingPrefillLayer
from lceval.models.policies import Quantizer, StatsSpec, StepEvictor
from lceval.models.prefill_stats import SCORING, PrefillStats
from lceval.models.question import NoKV
from lceval.models.recipe import Recipe
from lceval.models.states import NoKVLayer, StatefulCache, StateLayer
from lceval.models.window_layers import WindowKV


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

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers, those of sliding-window layers too."""
        layers = [layer for layer in self.layers if layer.attends]
        return sum(paged.bytes_of(layer.keys[:, :, :1], layer.values[:, :, :1]) for layer in layers)

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
