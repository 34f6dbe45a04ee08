"""Runs a causal LM over the caches: prefill of contexts and questions, and batched forward passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lceval.models.cache import CompressedContext, Prefill, QuestionCache, synchronize
from lceval.models.geometry import Geometry
from lceval.models.policies import StatsSpec
from lceval.models.prefill_stats import QueryAwareStats, ReconstructionStats
from lceval.models.question import Rows
from lceval.models.recipe import Recipe

# Context tokens per reconstruction pass (KVzip, section 3.3).
RECONSTRUCTION_CHUNK = 2048
# Tokens before the chunk that precede it in the reconstruction input.
RECONSTRUCTION_LEAD = 8


class Engine:
    """A causal LM that attends through lceval's attention function.

    Args:
        model: the model that generates: a transformers model, or a PEFT model around it.
        base: the transformers model itself.
        chunk: tokens per forward pass during prefill; 0 prefills a context in one pass.
        kernels: score, compact and decode with the Triton kernels.
        autocast: returns the context manager for forward passes.
        repeat_ids: tokens of the request to repeat the context (`StatsSpec.reconstruction`).
    """

    def __init__(
        self,
        model: Any,
        base: Any,
        *,
        chunk: int,
        kernels: bool,
        autocast: Callable[[], AbstractContextManager[Any]],
        repeat_ids: Sequence[int],
    ) -> None:
        self.model = model
        self.geometry = Geometry.of(base)
        self.kernels = kernels
        self._decoder = base.get_decoder()
        _make_input_contiguous(base.get_output_embeddings())
        self._chunk = chunk
        self._autocast = autocast
        self._repeat_ids = tuple(repeat_ids)
        self.device = base.device
        self._dtype = base.dtype

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], stats_spec: StatsSpec) -> Prefill:
        """Prefill a context of at least one token and collect the statistics of `stats_spec`."""
        start_s = time.perf_counter()
        prefill = Prefill(self.geometry, len(ids), stats_spec, kernels=self.kernels)
        step = self._chunk or len(ids)
        for start in range(0, len(ids), step):
            self._decode(prefill, [ids[start : start + step]])
        if stats_spec.reconstruction:
            prefill.reconstruction_attention = self._reconstruct(prefill, ids)
        synchronize(prefill.devices)
        prefill.prefill_s = time.perf_counter() - start_s
        return prefill

    def empty_context(self) -> CompressedContext:
        """The context of a prompt that is a question only."""
        return CompressedContext.empty(len(self.geometry.windows), self._dtype, self.device)

    def _decode(self, cache: Any, ids: Sequence[Sequence[int]]) -> None:
        with self._autocast():
            self._decoder(input_ids=torch.tensor(ids, device=self.device), cache=cache, use_cache=True)

    def _reconstruct(self, prefill: Prefill, ids: Sequence[int]) -> list[Tensor]:
        """Per layer [B, Hkv, S] float32, the maximum attention that each token receives in the reconstruction.

        The model repeats the context chunk by chunk.
        """
        whole = prefill.compress(Recipe(), consume=False)
        received = []
        for start in range(0, len(ids), RECONSTRUCTION_CHUNK):
            chunk = ids[start : start + RECONSTRUCTION_CHUNK]
            input_ids = [*self._repeat_ids, *ids[max(0, start - RECONSTRUCTION_LEAD) : start], *chunk]
            cache = whole.fork(len(input_ids))
            collectors = [
                ReconstructionStats(k, slice(start, start + len(chunk))) if k is not None else None
                for k in prefill.keys
            ]
            cache.collect(collectors)
            self._decode(cache, [input_ids])
            received.append([c.received for c in collectors if c is not None])
        return [torch.cat(parts, -1) for parts in zip(*received, strict=True)]

    @torch.inference_mode()
    def attention_paid(self, prefill: Prefill, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per full-attention layer [B, Hkv, S] float32, the most attention that each token of a context receives from
        continuations of it, over their tokens and the query heads of a KV head.

        Args:
            continuations: token ids, each after the context alone; at least one.
        """
        whole, paid = prefill.compress(Recipe(), consume=False), None
        for ids in continuations:
            cache = whole.fork(len(ids))
            collectors = [None if k is None else ReconstructionStats(k, slice(0, prefill.tokens)) for k in prefill.keys]
            cache.collect(collectors)
            self._decode(cache, [ids])
            received = [c.received for c in collectors if c is not None]
            paid = received if paid is None else [torch.maximum(*pair) for pair in zip(paid, received, strict=True)]
        assert paid is not None, "at least one continuation"
        return paid

    @torch.inference_mode()
    def prefill_question(self, prefill: Prefill, question: Sequence[int], capacity: int) -> QuestionCache:
        """A question prefilled over the uncompressed context, with the same statistics collected as for the context."""
        cache = prefill.compress(Recipe(), consume=False).fork(capacity, kernels=self.kernels)
        cache.collect(
            [
                None if k is None else QueryAwareStats(layer.stats, k)
                for layer, k in zip(prefill.layers, prefill.keys, strict=True)
            ]
        )
        self._decode(cache, [question])
        return cache

    def batch(
        self, contexts: Sequence[CompressedContext], questions: Sequence[Sequence[int]], capacity: int
    ) -> QuestionCache:
        """A cache with one row per question over its context; rows of the same context must be adjacent.

        Args:
            capacity: tokens after the longest question.
        """
        distinct = list({id(context): context for context in contexts}.values())
        owners = tuple(next(i for i, d in enumerate(distinct) if d is context) for context in contexts)
        longest = max(len(q) for q in questions)
        pads = tuple(longest - len(q) for q in questions)
        rows = Rows(owners, tuple(c.tokens for c in contexts), pads if any(pads) else None)
        return QuestionCache(distinct, rows, longest + capacity, self.kernels)

    @torch.inference_mode()
    def forward(self, cache: QuestionCache, ids: Tensor, keep: int = 0) -> Tensor:
        """Logits [B, T or `keep`, V] of ids [B, T] that continue `cache`; `keep` = 0 returns all T."""
        with self._autocast():
            out = self.model(
                input_ids=ids,
                position_ids=cache.next_positions(ids.shape[1], ids.device),
                cache=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: Tensor = out.logits
        return logits


def _make_input_contiguous(head: torch.nn.Module | None) -> None:
    """Make the input of an output layer contiguous.

    transformers slices the last positions of a batch; PyTorch multiplies such a slice by a frozen matrix as a batched
    product, with a copy of the matrix for every row (under an adapter all matrices are frozen).
    """
    if head is not None and _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
