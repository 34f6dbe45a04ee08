"""Running a causal LM over our caches: reading contexts, asking questions, and the batches between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lceval.models.cache import CompressedContext, Prefill, QuestionCache
from lceval.models.geometry import Geometry
from lceval.models.policies import StatsSpec
from lceval.models.prefill_stats import QueryAwareStats, ReconstructionStats
from lceval.models.question import Rows
from lceval.models.recipe import Recipe

# Tokens of the context that are repeated in one pass (KVzip, section 3.3).
RECONSTRUCTION_CHUNK = 2048
# How many tokens before the chunk lead into it.
RECONSTRUCTION_LEAD = 8


class Engine:
    """A causal LM whose attention function is ours.

    Args:
        model: what generates: a transformers model, or a PEFT model around it.
        base: the transformers model itself.
        chunk: tokens per forward pass while reading a context; 0 reads it in one pass.
        kernels: score, compact and decode through the Triton kernels.
        autocast: makes the context manager that forward passes run under.
        repeat_ids: tokens of the request to repeat the context (`Needs.reread`).
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
        _read_in_one_piece(base.get_output_embeddings())
        self._chunk = chunk
        self._autocast = autocast
        self._repeat_ids = tuple(repeat_ids)
        self.device = base.device
        self._dtype = base.dtype

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], stats_spec: StatsSpec) -> Prefill:
        """Read a context of at least one token and observe what `needs` says."""
        began = time.perf_counter()
        prefill = Prefill(self.geometry, len(ids), stats_spec, kernels=self.kernels)
        step = self._chunk or len(ids)
        for start in range(0, len(ids), step):
            self._decode(prefill, [ids[start : start + step]])
        if stats_spec.reconstruction:
            prefill.reconstruction_attention = self._reconstruct(prefill, ids)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        prefill.prefill_s = time.perf_counter() - began
        return prefill

    def nothing(self) -> CompressedContext:
        """The context of a prompt that is all question."""
        return CompressedContext.empty(len(self.geometry.windows), self._dtype, self.device)

    def _decode(self, cache: Any, ids: Sequence[Sequence[int]]) -> None:
        with self._autocast():
            self._decoder(input_ids=torch.tensor(ids, device=self.device), cache=cache, use_cache=True)

    def _reconstruct(self, prefill: Prefill, ids: Sequence[int]) -> list[Tensor]:
        """The most attention that each token received while the model repeated the context, chunk by chunk."""
        whole = prefill.compress(Recipe(), consume=False)
        received = []
        for start in range(0, len(ids), RECONSTRUCTION_CHUNK):
            chunk = ids[start : start + RECONSTRUCTION_CHUNK]
            said = [*self._repeat_ids, *ids[max(0, start - RECONSTRUCTION_LEAD) : start], *chunk]
            cache = whole.fork(len(said))
            collectors = [
                ReconstructionStats(k, slice(start, start + len(chunk))) if k is not None else None
                for k in prefill.keys
            ]
            cache.collect(collectors)
            self._decode(cache, [said])
            received.append([w.received for w in collectors if w is not None])
        return [torch.cat(parts, -1) for parts in zip(*received, strict=True)]

    @torch.inference_mode()
    def ask(self, prefill: Prefill, question: Sequence[int], capacity: int) -> QuestionCache:
        """A question read over the whole, uncompressed context, observed as the context was."""
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
        """A cache for one row a question, over its context; rows of the same context stand side by side.

        Args:
            capacity: room for tokens after the longest question.
        """
        distinct = list({id(context): context for context in contexts}.values())
        owners = tuple(next(i for i, d in enumerate(distinct) if d is context) for context in contexts)
        longest = max(len(q) for q in questions)
        pads = tuple(longest - len(q) for q in questions)
        rows = Rows(owners, tuple(c.tokens for c in contexts), pads if any(pads) else None)
        return QuestionCache(distinct, rows, longest + capacity, self.kernels)

    @torch.inference_mode()
    def forward(self, cache: QuestionCache, ids: Tensor, keep: int = 0) -> Tensor:
        """Logits [B, T or `keep`, V] of ids [B, T] that continue `cache`; `keep` = 0 gives all T."""
        with self._autocast():
            out = self.model(
                input_ids=ids,
                position_ids=cache.next_positions(ids.shape[1]).to(ids.device),
                cache=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: Tensor = out.logits
        return logits


def _read_in_one_piece(head: torch.nn.Module | None) -> None:
    """Give an output layer its input contiguous.

    transformers slices the last positions of a batch out of all; PyTorch multiplies such a slice by a frozen matrix as
    a batched product, with a copy of the matrix for every row of the batch (under an adapter all matrices are frozen).
    """
    if head is not None and _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
