"""The slots of one sequence, reduced to a budget or a threshold again and again while tokens are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.profiler import record_function

from lceval.kernels.paged import KV, PagedKV
from lceval.kernels.softmax import Softmax
from lceval.models.engine import Engine
from lceval.models.policies import Evictor, LayerView, StepEvictor, StepView
from lceval.models.prefill_stats import SCORING
from lceval.models.window_layers import WindowKV

# One KV head's slots: keys and values [n, D], positions [n].
Slots = tuple[Tensor, Tensor, Tensor]
# Keys and values [1, Hkv, T, D] of T new tokens of a layer.
Tail = tuple[Tensor, Tensor]


@dataclass
class LayerState:
    """What eviction needs of a full-attention layer, beside its slots.

    Attributes:
        queries: [1, H, W, D], the last queries, as many as the evictor requires; None if it requires none.
        softmax: of the attention logits.
        learned: by scorer and KV head, the scores [n] of the slots.
        memory: state of a StepEvictor.
    """

    queries: Tensor | None = None
    softmax: Softmax = field(default_factory=lambda: Softmax(0.0))
    learned: dict[str, list[Tensor]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    def add_queries(self, q: Tensor, softmax: Softmax, *, window: int) -> None:
        """Add the queries [1, H, T, D] of T tokens; the last `window` are kept."""
        self.softmax = softmax
        if window:
            before = [] if self.queries is None else [self.queries]
            # A clone: a view would keep the queries of all T tokens alive.
            self.queries = torch.cat([*before, q[:, :, -window:]], 2)[:, :, -window:].clone()

    def add_learned(self, scorer: str, scores: Tensor) -> None:
        """Add the scores [Hkv, T] of T tokens."""
        before = self.learned.get(scorer) or [scores.new_zeros(0)] * len(scores)
        self.learned[scorer] = [torch.cat(x) for x in zip(before, scores, strict=True)]


@dataclass
class Evictions:
    """The slots of one sequence, and the evictor that reduces them.

    Attributes:
        evictor: with a budget in tokens, that of the prompt included, or a threshold.
        layers: by index in the model, the slots that are left; a WindowKV for sliding-window layers.
        states: by index, of the full-attention layers.
        protected: as in `LayerView`.
        prompt: number of first tokens that are never evicted.
        store: how the slots that are left are stored; None in full precision.
        workspace: largest bytes of one layer's copies in the last eviction.
    """

    engine: Engine
    evictor: Evictor
    layers: list[Any]
    states: dict[int, LayerState]
    protected: int
    prompt: int = 0
    store: Callable[[PagedKV], KV] | None = None
    workspace: int = 0

    def evict(self, tails: Sequence[Tail | None], seen: int, release: Callable[[int], None] = lambda _: None) -> None:
        """Add the new tokens of each layer to its slots, and evict.

        Args:
            tails: by layer; None adds nothing.
            seen: tokens of the sequence so far, evicted or not, the new ones included.
            release: called with the index of a layer when its tail is no longer needed.
        """
        masks = self._masks(tails, seen)
        for index, tail in enumerate(tails):
            if index in self.states:
                self.layers[index] = self._kept(index, tail, seen, masks.get(index))
            elif tail is not None:
                self.layers[index] = _window(self.layers[index], *tail)
            release(index)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all slots, page slack and tables."""
        return sum(layer.allocated_bytes for layer in self.layers)

    def _masks(self, tails: Sequence[Tail | None], seen: int) -> dict[int, list[Tensor]]:
        """Per layer and KV head the slots [n] that are kept; empty where all are."""
        self.workspace = 0
        if not self.states or self.evictor.keeps_all(seen):
            return {}
        scores = {}
        for place, index in enumerate(self.states):
            heads = self._slots(index, tails[index], seen)
            self.workspace = max(self.workspace, sum(k.nbytes + v.nbytes for k, v, _ in heads))
            with record_function(SCORING):
                scores[index] = [
                    s.masked_fill(positions < self.prompt, torch.inf) if self.prompt else s
                    for s, (*_, positions) in zip(self._scores(place, seen, heads), heads, strict=True)
                ]
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

    def _scores(self, place: int, seen: int, heads: Sequence[Slots]) -> list[Tensor]:
        """The scores [n] of each KV head's slots."""
        if len({len(positions) for *_, positions in heads}) == 1:
            return list(self._scores_of(place, seen, heads, slice(0, len(heads)), len(heads))[0])
        # Heads that keep different numbers of slots are scored one by one.
        alone = (self._scores_of(place, seen, heads[h : h + 1], slice(h, h + 1), len(heads)) for h in range(len(heads)))
        return [scores[0, 0] for scores in alone]

    def _scores_of(self, place: int, seen: int, slots: Sequence[Slots], heads: slice, kv_heads: int) -> Tensor:
        """The scores [1, h, n] of h KV heads of `kv_heads`, with n slots each."""
        state = list(self.states.values())[place]
        keys, values, positions = (torch.stack(x)[None] for x in zip(*slots, strict=True))
        queries = keys.new_zeros(1, 0, 0, 0) if state.queries is None else state.queries
        group = queries.shape[1] // kv_heads
        view = LayerView(
            keys=keys,
            values=values,
            queries=queries[:, heads.start * group : heads.stop * group],
            softmax=state.softmax.of_heads(slice(heads.start * group, heads.stop * group)),
            layer=place,
            layers=len(self.states),
            rotary=self.engine.geometry.rotary,
            learned={name: torch.stack(of_heads[heads])[None] for name, of_heads in state.learned.items()},
            protected=self.protected,
            kernels=self.engine.kernels,
        )
        if not isinstance(self.evictor, StepEvictor):
            return self.evictor.scores(view)
        none = keys.new_zeros(keys.shape[:3])
        attention = none[:, :, None, None] if state.queries is None else view.window_attention(1)
        return self.evictor.step_scores(
            StepView(
                positions,
                attention,
                column_sums=none,
                seen=seen,
                layer=place,
                layers=len(self.states),
                budget=int(self.evictor.budgeted.value),
                memory=state.memory,
            )
        )

    def _slots(self, index: int, tail: Tail | None, seen: int) -> list[Slots]:
        """The slots of a layer's KV heads, those of the tail last."""
        kv: KV = self.layers[index]
        heads = []
        for head in range(len(kv.counts)):
            k, v = kv.head(head)
            positions = kv.kept_positions(0, head)
            if tail is not None:
                k, v = (torch.cat([x, new[0, head]]) for x, new in zip((k, v), tail, strict=True))
                new = torch.arange(seen - tail[0].shape[2], seen, device=positions.device)
                positions = torch.cat([positions, new])
            heads.append((k, v, positions))
        return heads

    def _kept(self, index: int, tail: Tail | None, seen: int, masks: list[Tensor] | None) -> KV:
        """A layer's new slots."""
        if masks is None and tail is None:
            return self.layers[index]  # type: ignore[no-any-return]
        heads = self._slots(index, tail, seen)
        (k, v, _), learned = heads[0], self.states[index].learned
        like = (k, k[..., : v.shape[-1]] if self.engine.geometry.latent else v)
        if masks is None:
            kv = PagedKV.of_heads(heads, [len(positions) for *_, positions in heads], len(heads), like=like)
        else:
            for scorer, of_heads in learned.items():
                learned[scorer] = [scores[mask] for scores, mask in zip(of_heads, masks, strict=True)]
            kept = ((k[mask], v[mask], at[mask]) for (k, v, at), mask in zip(heads, masks, strict=True))
            counts = torch.stack([mask.sum() for mask in masks]).tolist()
            kv = PagedKV.of_heads(kept, counts, len(heads), like=like)
        self.workspace = max(self.workspace, kv.allocated_bytes)
        return kv if self.store is None else self.store(kv)


def _window(context: WindowKV, k: Tensor, v: Tensor) -> WindowKV:
    """The last tokens of a sliding-window layer."""
    last = slice(-(context.window - 1), None) if context.window > 1 else slice(0, 0)
    k, v = (torch.cat(x, 2)[:, :, last].contiguous() for x in ((context.k, k), (context.v, v)))
    return replace(context, k=k, v=v)
