"""Eviction while a context is read (`when=chunk`): after every chunk the budget, or the threshold, holds.

Later chunks attend to what is left and to themselves, so memory peaks at what is kept plus one chunk. A chunk is a
question over the compressed context before it; then both are compressed together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.profiler import record_function

from lceval.kernels.paged import PagedKV
from lceval.models.cache import CompressedContext, QuestionCache, synchronize
from lceval.models.engine import Engine
from lceval.models.policies import Amount, Evictor, LayerView, StepEvictor, StepView
from lceval.models.prefill_stats import SCORING
from lceval.models.question import WindowKV
from lceval.models.recipe import Recipe


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


@dataclass
class LayerState:
    """What eviction needs of a full-attention layer, beside its slots.

    Attributes:
        queries: [1, H, W, D], the last queries, as many as the evictor requires.
        scaling: factor of the attention logits.
        learned: by scorer and KV head, the scores [n] of the slots.
        memory: state of a StepEvictor.
    """

    queries: Tensor
    scaling: float
    learned: dict[str, list[Tensor]]
    memory: dict[str, Any]


# One KV head's slots: keys and values [n, D], positions [n].
Slots = tuple[Tensor, Tensor, Tensor]


class Reader:
    """A context of which some chunks were read.

    Attributes:
        layers: the slots that are left, as in `CompressedContext.layers`.
        seen: tokens that were read.
        prefill_s: seconds of the forward passes.
    """

    def __init__(self, engine: Engine, ids: Sequence[int], evictor: Evictor) -> None:
        self.engine = engine
        self.tokens = len(ids)
        amount = evictor.amount
        # A share is of the whole context, whatever was read so far.
        self.evictor = evictor.with_amount(Amount(amount.tokens(len(ids)))) if isinstance(amount, Amount) else evictor
        self.layers: list[Any] = []
        self.seen = 0
        self.prefill_s = 0.0
        self._evict_s = 0.0
        self._peak_bytes = 0
        self._slot_bytes = 0
        self._protected = engine.protected_tokens(ids)
        self._places = [index for index, window in enumerate(engine.geometry.windows) if window is None]
        self._states: dict[int, LayerState] = {}

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
        start = time.perf_counter()
        windows = sum(layer.kept_bytes for layer in self.layers if isinstance(layer, WindowKV))
        for place, index in enumerate(self._places):
            before, kv = self.layers[index], self.layers[index]
            if recipe.quantizer is not None:
                kv = recipe.quantizer.quantize(kv)
            if recipe.sparse_attention is not None:
                kv = recipe.sparse_attention.wrap(kv, place, self.tokens)
            self.layers[index] = kv
            workspace = 0 if recipe.quantizer is None else before.allocated_bytes
            self._peak_bytes = max(self._peak_bytes, self._allocated() + workspace)
        full_bytes = self._slot_bytes * self.tokens + windows
        seconds = self._evict_s + time.perf_counter() - start
        return CompressedContext(
            tuple(self.layers), self.tokens, self.engine.dtype, full_bytes, self._peak_bytes, seconds
        )

    def _first(self, ids: Sequence[int]) -> QuestionCache:
        """The first chunk, as an uncompressed context with an empty question."""
        prefill = self.engine.prefill(ids, self.evictor.stats_spec)
        for index in self._places:
            stats, keys = prefill.layers[index].stats, prefill.layers[index].keys
            self._states[index] = LayerState(
                queries=keys.new_zeros(1, 1, 0, keys.shape[3]) if stats.queries is None else stats.queries,
                scaling=prefill.layers[index].scaling,
                learned={name: list(scores[0]) for name, scores in stats.learned.items()},
                memory={},
            )
        self._slot_bytes = sum(prefill.layers[index].kv_bytes for index in self._places) // len(ids)
        context = prefill.compress(Recipe(), consume=True)
        self.layers = list(context.layers)
        return context.fork(0)

    def _continued(self, ids: Sequence[int]) -> QuestionCache:
        """A later chunk, as a question over the chunks before it."""
        context = CompressedContext(tuple(self.layers), self.seen, self.engine.dtype, 0, 0, 0.0)
        cache = context.fork(len(ids), kernels=self.engine.kernels)
        for index in self._places:
            cache.layers[index].receive = partial(self._add_queries, self._states[index])
        with self.engine.scored(self.evictor.stats_spec, self._add_learned):
            self.engine.decode(cache, [ids])
        return cache

    def _add_queries(self, state: LayerState, q: Tensor, scaling: float) -> None:
        if window := self.evictor.stats_spec.queries:
            # A clone: a view would keep the queries of the whole chunk alive.
            state.queries = torch.cat([state.queries, q[:, :, -window:]], 2)[:, :, -window:].clone()

    def _add_learned(self, index: int, scorer: str, scores: Tensor) -> None:
        learned = self._states[index].learned
        learned[scorer] = [torch.cat(x) for x in zip(learned[scorer], scores[0], strict=True)]

    def _evict(self, cache: QuestionCache) -> None:
        """Compress the slots and the cache's tail together, layer by layer."""
        tails: list[Any] = cache.layers
        for tail in tails:
            # Each layer's old slots are freed once it has new ones.
            tail.contexts = ()
        masks = self._masks(tails)
        for index, tail in enumerate(tails):
            if index in self._states:
                self.layers[index] = self._kept(index, tail, masks.get(index))
            elif tail.length:
                self.layers[index] = self._window(self.layers[index], *tail.tail)
            if tail.is_initialized:
                tail.keys = tail.values = tail.keys.new_empty(0)

    def _masks(self, tails: Sequence[Any]) -> dict[int, list[Tensor]]:
        """Per layer and KV head the slots [n] that are kept; empty where all are."""
        if self.evictor.keeps_all(self.seen):
            return {}
        scores = {}
        for place, index in enumerate(self._places):
            heads = self._slots(index, tails[index])
            workspace = sum(k.nbytes + v.nbytes for k, v, _ in heads)
            own = sum(tail.own_bytes for tail in tails)
            self._peak_bytes = max(self._peak_bytes, self._allocated() + own + workspace)
            with record_function(SCORING):
                scores[index] = self._scores(place, self._states[index], heads)
        # Heads with fewer slots are padded: -inf is kept by no budget and no threshold.
        width = max(len(s) for of_heads in scores.values() for s in of_heads)
        padded = [
            torch.stack([pad(s, (0, width - len(s)), value=-torch.inf) for s in of_heads])[None]
            for of_heads in scores.values()
        ]
        masks = self.evictor.select(padded)
        return {
            index: [mask[: len(s)] for mask, s in zip(of_layer[0], scores[index], strict=True)]
            for index, of_layer in zip(scores, masks, strict=True)
        }

    def _scores(self, place: int, state: LayerState, heads: Sequence[Slots]) -> list[Tensor]:
        """The scores [n] of each KV head's slots."""
        if len({len(positions) for _, _, positions in heads}) == 1:
            return list(self._scores_of(place, state, heads, slice(0, len(heads)))[0])
        # Heads that keep different numbers of slots are scored one by one.
        return [self._scores_of(place, state, [slots], slice(head, head + 1))[0, 0] for head, slots in enumerate(heads)]

    def _scores_of(self, place: int, state: LayerState, slots: Sequence[Slots], heads: slice) -> Tensor:
        """The scores [1, h, n] of h KV heads with n slots each."""
        keys, values, positions = (torch.stack(x)[None] for x in zip(*slots, strict=True))
        group = state.queries.shape[1] // len(self.layers[self._places[place]].counts)
        view = LayerView(
            keys=keys,
            values=values,
            queries=state.queries[:, heads.start * group : heads.stop * group],
            scaling=state.scaling,
            layer=place,
            layers=len(self._places),
            rotary=self.engine.geometry.rotary,
            learned={name: torch.stack(of_heads[heads])[None] for name, of_heads in state.learned.items()},
            protected=self._protected,
            kernels=self.engine.kernels,
        )
        if not isinstance(self.evictor, StepEvictor):
            return self.evictor.scores(view)
        counts = keys.shape[1], keys.shape[2]
        attention = (
            view.window_attention(1) if state.queries.shape[2] else keys.new_zeros(1, counts[0], 1, 1, counts[1])
        )
        return self.evictor.step_scores(
            StepView(
                positions,
                attention,
                column_sums=keys.new_zeros(1, *counts),
                seen=self.seen,
                layer=place,
                layers=len(self._places),
                budget=int(self.evictor.budgeted.value),
                memory=state.memory,
            )
        )

    def _slots(self, index: int, tail: Any) -> list[Slots]:
        """The slots of a layer's KV heads, those of the tail last."""
        kv: PagedKV = self.layers[index]
        heads = []
        for head in range(len(kv.counts)):
            k, v = kv.head(head)
            positions = kv.kept_positions(0, head)
            if tail.length:
                k, v = (torch.cat([x, new[0, head]]) for x, new in zip((k, v), tail.tail, strict=True))
                new = torch.arange(self.seen - tail.length, self.seen, device=positions.device)
                positions = torch.cat([positions, new])
            heads.append((k, v, positions))
        return heads

    def _kept(self, index: int, tail: Any, masks: list[Tensor] | None) -> PagedKV:
        """A layer's new slots."""
        heads = self._slots(index, tail)
        if masks is None:
            if not tail.length:
                return self.layers[index]  # type: ignore[no-any-return]
            return PagedKV.of_heads(heads, [len(positions) for *_, positions in heads], len(heads), like=heads[0][0])
        learned = self._states[index].learned
        for scorer, of_heads in learned.items():
            learned[scorer] = [scores[mask] for scores, mask in zip(of_heads, masks, strict=True)]
        kept = (tuple(x[mask] for x in slots) for slots, mask in zip(heads, masks, strict=True))
        counts = torch.stack([mask.sum() for mask in masks]).tolist()
        return PagedKV.of_heads(kept, counts, len(heads), like=heads[0][0])  # type: ignore[arg-type]

    @staticmethod
    def _window(context: WindowKV, k: Tensor, v: Tensor) -> WindowKV:
        """The last tokens of a sliding-window layer."""
        last = slice(-(context.window - 1), None) if context.window > 1 else slice(0, 0)
        k, v = (torch.cat(x, 2)[:, :, last].contiguous() for x in ((context.k, k), (context.v, v)))
        return WindowKV(k, v, context.window)

    def _allocated(self) -> int:
        return sum(layer.allocated_bytes for layer in self.layers)
