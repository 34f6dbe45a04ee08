"""Eviction while a context is read (`when=chunk`): after every chunk the budget, or the threshold, holds.

Later chunks attend to what is left and to themselves, so memory peaks at what is kept plus one chunk. A chunk is a
question over the compressed context before it; then both are compressed together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lceval.models.compressed import CompressedContext, QuestionCache
from lceval.models.engine import Engine
from lceval.models.evictions import Evictions, LayerState
from lceval.models.policies import Amount, Evictor
from lceval.models.prefill import synchronize
from lceval.models.recipe import Recipe
from lceval.models.states import State
from lceval.models.window_layers import WindowKV


@torch.inference_mode()
def read(engine: Engine, ids: Sequence[int], recipe: Recipe) -> tuple[CompressedContext, float]:
    """Read a context of at least one token under a recipe with `when=chunk`.

    Returns:
        The compressed context, and the seconds of the forward passes; those of the evictions are its `compress_s`.
    """
    assert recipe.evictor is not None
    reader = Reader(engine, ids, recipe.evictor)
    for start in range(0, len(ids), recipe.evictor.read_chunk):
        reader.add(ids[start : start + recipe.evictor.read_chunk])
    return reader.finished(recipe), reader.prefill_s


class Reader:
    """A context of which some chunks were read.

    Attributes:
        slots: what is left of them.
        seen: tokens that were read.
        prefill_s: seconds of the forward passes.
    """

    def __init__(self, engine: Engine, ids: Sequence[int], evictor: Evictor) -> None:
        self.engine = engine
        self.tokens = len(ids)
        amount = evictor.amount
        # A share is of the whole context, whatever was read so far.
        fixed = evictor.with_amount(Amount(amount.tokens(len(ids)))) if isinstance(amount, Amount) else evictor
        self.slots = Evictions(engine, fixed, [], {}, engine.protected_tokens(ids))
        self.seen = 0
        self.prefill_s = 0.0
        self._evict_s = 0.0
        self._peak_bytes = 0
        self._slot_bytes = 0
        self._states: tuple[State, ...] = ()

    def add(self, ids: Sequence[int]) -> None:
        """Read a chunk, and evict."""
        start = time.perf_counter()
        cache = self._continued(ids) if self.seen else self._first(ids)
        self.seen += len(ids)
        synchronize(self.engine.layer_devices)
        read = time.perf_counter()
        self.prefill_s += read - start
        self._evict(cache)
        synchronize(self.engine.layer_devices)
        self._evict_s += time.perf_counter() - read

    def finished(self, recipe: Recipe) -> CompressedContext:
        """The whole context, quantized and indexed as the recipe says."""
        start, layers = time.perf_counter(), self.slots.layers
        windows = sum(layer.kept_bytes for layer in layers if isinstance(layer, WindowKV))
        for place, index in enumerate(self.slots.states):
            before, kv = layers[index], layers[index]
            if recipe.quantizer is not None:
                kv = recipe.quantizer.quantize(kv)
            if recipe.sparse_attention is not None:
                kv = recipe.sparse_attention.wrap(kv, place, self.tokens)
            layers[index] = kv
            workspace = 0 if recipe.quantizer is None else before.allocated_bytes
            self._peak_bytes = max(self._peak_bytes, self.slots.allocated_bytes + workspace)
        state_bytes = sum(state.nbytes for state in self._states)
        full_bytes, peak_bytes = self._slot_bytes * self.tokens + windows + state_bytes, self._peak_bytes + state_bytes
        seconds = self._evict_s + time.perf_counter() - start
        return self._context(layers, self.tokens, full_bytes, peak_bytes, seconds)

    def _context(
        self, layers: Sequence[Any], tokens: int, full_bytes: int = 0, peak_bytes: int = 0, seconds: float = 0.0
    ) -> CompressedContext:
        dtype, latent = self.engine.dtype, self.engine.geometry.latent
        return CompressedContext(
            tuple(layers), tokens, dtype, full_bytes, peak_bytes, seconds, self._states, is_latent=latent
        )

    def _first(self, ids: Sequence[int]) -> QuestionCache:
        """The first chunk, as an uncompressed context with an empty question."""
        prefill = self.engine.prefill(ids, self.slots.evictor.stats_spec)
        places = [index for index, layer in enumerate(prefill.layers) if layer.is_full]
        for index in places:
            stats = prefill.layers[index].stats
            self.slots.states[index] = LayerState(
                queries=stats.queries,
                softmax=prefill.layers[index].softmax,
                learned={name: list(scores[0]) for name, scores in stats.learned.items()},
            )
        self._slot_bytes = sum(prefill.layers[index].kv_bytes for index in places) // len(ids)
        context = prefill.compress(Recipe(), consume=True)
        self.slots.layers, self._states = list(context.layers), context.states
        return context.fork(0)

    def _continued(self, ids: Sequence[int]) -> QuestionCache:
        """A later chunk, as a question over the chunks before it."""
        context = self._context(self.slots.layers, self.seen)
        cache = context.fork(len(ids), kernels=self.engine.kernels)
        states, spec = self.slots.states, self.slots.evictor.stats_spec
        for index, state in states.items():
            cache.layers[index].receive = partial(state.add_queries, window=spec.queries)
        with self.engine.scored(spec, lambda index, scorer, scores: states[index].add_learned(scorer, scores[0])):
            self.engine.decode(cache, [ids])
        self._states = cache.states
        return cache

    def _evict(self, cache: QuestionCache) -> None:
        """Compress the slots and the cache's tail together, layer by layer."""
        layers: list[Any] = cache.layers
        for layer in layers:
            # Each layer's old slots are freed once it has new ones.
            layer.contexts = ()
        before = self.slots.allocated_bytes + cache.own_bytes

        def release(index: int) -> None:
            if layers[index].is_initialized:
                layers[index].keys = layers[index].values = layers[index].keys.new_empty(0)

        self.slots.evict([layer.tail if layer.length else None for layer in layers], self.seen, release)
        self._peak_bytes = max(self._peak_bytes, before + self.slots.workspace)
