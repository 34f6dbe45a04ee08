"""Eviction while an answer is written (`when=decode`): after every so many tokens the budget, or the threshold, holds.

Between two evictions the new tokens are a row's tail, as under every recipe; then they join the row's own slots. The
prompt (context and question) is kept, or competes with what is written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lceval.kernels import dense
from lceval.kernels.paged import KV, PagedKV
from lceval.kernels.softmax import Softmax
from lceval.models.compressed import CompressedContext, QuestionCache
from lceval.models.engine import Engine
from lceval.models.evictions import Evictions, LayerState
from lceval.models.policies import Amount, Evictor
from lceval.models.question import NoKV, QuestionLayer, Rows, merged
from lceval.models.recipe import Recipe
from lceval.models.states import NoKVLayer, StatefulCache, continuing
from lceval.models.window_layers import WindowKV, WindowLayer


class WritingLayer(QuestionLayer):
    """A full-attention layer in which each row has slots of its own, and a tail.

    Attributes:
        contexts: the slots of each row.
        states: what eviction needs of each row.
    """

    def __init__(self, contexts: Sequence[KV], rows: Rows, capacity: int, kernels: bool, evictor: Evictor) -> None:
        super().__init__([contexts[owner] for owner in rows.owners], rows, capacity, kernels)
        self.evictor = evictor
        # Slots of the prompt are kept whatever their scores.
        self.states = [
            LayerState(
                learned={
                    scorer: [torch.zeros(n, device=kv.lens.device) for n in kv.counts]
                    for scorer in evictor.stats_spec.scorers
                },
            )
            for kv in self.contexts
        ]

    def lazy_initialization(self, k: Tensor, v: Tensor) -> None:
        super().lazy_initialization(k, v)
        # The context of a prompt that is a question only has no heads.
        kv_heads, none = k.shape[1], torch.zeros(0, dtype=torch.int64, device=k.device)
        slots = (k[0, 0, :0], v[0, 0, :0], none)
        empty = PagedKV.of_heads([slots] * kv_heads, [0] * kv_heads, kv_heads, like=(k, v))
        self.contexts = tuple(kv if kv.counts else empty for kv in self.contexts)

    def _is_step(self, k: Tensor, v: Tensor) -> bool:
        # The slots of a row move on, and its columns with them.
        return False

    def observe(self, q: Tensor, softmax: Softmax) -> None:
        for row, state in enumerate(self.states):
            new = q[row : row + 1, :, self.padding(row, self.length - q.shape[2]) :]
            state.add_queries(new, softmax, window=self.evictor.stats_spec.queries)

    def attend(self, q: Tensor, softmax: Softmax) -> Tensor:
        own = dense.attend_causal(q, *self.tail, softmax, None if self.start else self.rows.pads_on(q.device))
        parts = [self._attend_context(kv, q[row : row + 1], softmax) for row, kv in enumerate(self.contexts)]
        o, lse = (torch.cat(x) for x in zip(*parts, strict=True))
        return merged(o, lse, *own, softmax)

    def padding(self, row: int, column: int) -> int:
        """How many columns from this one on are padding of a row."""
        return max(0, (self.rows.pads[row] if self.rows.pads else 0) - column)

    def select(self, rows: Sequence[int], selected: Rows) -> None:
        super().select(rows, selected)
        self.contexts = tuple(self.contexts[row] for row in rows)
        self.states = [_copied(self.states[row]) for row in rows]

    def fork(self) -> WritingLayer:
        other = super().fork()
        assert isinstance(other, WritingLayer)
        other.states = [_copied(state) for state in self.states]
        return other

    def move(self, slots: Sequence[KV]) -> None:
        """Continue from these slots of each row, which include the tail."""
        self.contexts, self.start = tuple(slots), self.length
        # The question's columns are not needed again.
        columns = self.evictor.write_every
        self._replace(lambda old: old.new_empty(*old.shape[:2], columns, old.shape[3]))

    @property
    def own_bytes(self) -> int:
        """Bytes of the tail, and of the slots of rows that were evicted from."""
        return super().own_bytes + (sum(kv.allocated_bytes for kv in self.contexts) if self.start else 0)


def _copied(state: LayerState) -> LayerState:
    return replace(state, learned=dict(state.learned), memory=copy.deepcopy(state.memory))


class WritingCache(QuestionCache):
    """A batch of rows that continue contexts, and are evicted from while they are written.

    Attributes:
        peak_own_bytes: largest `own_bytes` so far, with the copies of an eviction.
        evictions: how often slots were evicted.
    """

    def __init__(
        self,
        engine: Engine,
        contexts: Sequence[CompressedContext],
        questions: Sequence[Sequence[int]],
        protected: Sequence[int],
        recipe: Recipe,
    ) -> None:
        evictor = recipe.evictor
        assert evictor is not None
        assert evictor.write_every
        longest = max(map(len, questions))
        pads = tuple(longest - len(question) for question in questions)
        rows = Rows(tuple(range(len(contexts))), tuple(c.tokens for c in contexts), pads if any(pads) else None)
        # Never room for the whole answer: what is written moves on.
        capacity = longest + evictor.write_every
        layers: list[Any] = [
            WindowLayer(kvs, rows, capacity, kernels=False)
            if isinstance(kvs[0], WindowKV)
            else NoKVLayer()
            if isinstance(kvs[0], NoKV)
            else WritingLayer(kvs, rows, capacity, engine.kernels, evictor)
            for kvs in zip(*(context.layers for context in contexts), strict=True)
        ]
        states = continuing([context.states for context in contexts])
        StatefulCache.__init__(self, layers, states, is_latent=contexts[0].is_latent)
        self.start_clock()
        self._share_progress()
        self.engine, self.evictor, self.recipe = engine, evictor, recipe
        prompts = (context.tokens + len(question) for context, question in zip(contexts, questions, strict=True))
        self.prompts = [tokens if evictor.keeps_prompt else 0 for tokens in prompts]
        self.protected = list(protected)
        self.evictions = 0
        self._evicted_at = longest
        self._peak_bytes = 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block, new tokens are scored as the evictor requires, and evicted between the model's passes."""

        def receive(index: int, scorer: str, scores: Tensor) -> None:
            layer = self.layers[index]
            for row, state in enumerate(layer.states):
                state.add_learned(scorer, scores[row, :, layer.padding(row, layer.length) :])

        with self.engine.scored(self.evictor.stats_spec, receive), self.engine.after_passes(self.evict_if_due):
            yield

    def evict_if_due(self) -> None:
        """Evict if `every` tokens were written since the last eviction."""
        if self.first.length - self._evicted_at >= self.evictor.write_every:
            self._evicted_at = self.first.length
            self._evict()

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self.prompts, self.protected = ([of[row] for row in rows] for of in (self.prompts, self.protected))

    @property
    def peak_own_bytes(self) -> int:
        return max(self._peak_bytes, self.own_bytes)

    def _evict(self) -> None:
        before, new_bytes = self.own_bytes, 0
        kept: list[list[Any]] = []
        for row, prompt in enumerate(self.prompts):
            slots = self._slots_of(row, prompt)
            tails: list[Any] = [
                self._tail(layer, row) if isinstance(layer, WritingLayer) else None for layer in self.layers
            ]
            slots.evict(tails, self._seen(row))
            kept.append(slots.layers)
            new_bytes += sum(slots.layers[index].allocated_bytes for index in slots.states)
            self._peak_bytes = max(self._peak_bytes, before + new_bytes + slots.workspace)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, WritingLayer):
                layer.move([layers[index] for layers in kept])
        self.evictions += 1

    def _slots_of(self, row: int, prompt: int) -> Evictions:
        """The slots of a row, without its tail."""
        amount, quantizer = self.evictor.amount, self.recipe.quantizer
        budget = Amount(int(amount.value) + prompt) if isinstance(amount, Amount) else None
        return Evictions(
            self.engine,
            self.evictor if budget is None else self.evictor.with_amount(budget),
            [layer.contexts[row] if isinstance(layer, WritingLayer) else None for layer in self.layers],
            {index: layer.states[row] for index, layer in enumerate(self.layers) if isinstance(layer, WritingLayer)},
            self.protected[row],
            prompt,
            None if quantizer is None else quantizer.quantize,
        )

    def _tail(self, layer: WritingLayer, row: int) -> tuple[Tensor, Tensor]:
        padding = layer.padding(row, layer.start)
        k, v = (x[row : row + 1, :, padding:] for x in layer.tail)
        return k, v

    def _seen(self, row: int) -> int:
        length, rows = self.first.length, self.first.rows
        seen: int = rows.tokens[row] + length - (rows.pads[row] if rows.pads else 0)
        return seen
