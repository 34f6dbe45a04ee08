"""Prefill statistics: collects what a `StatsSpec` requires of a layer's attention during prefill.

No T x S matrix outlives a block of rows: sums and moments are accumulated, and only the last queries are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from lceval.kernels import window
from lceval.kernels.softmax import Softmax
from lceval.models.policies import LayerView, StatsSpec
from lceval.models.policies.base import SINKS, Chunks
from lceval.models.rotation import unrotate

# Label, in a profile, of the work that only eviction scores need.
SCORING = "lceval.scoring"


class PrefillStats:
    """The statistics of one layer. `fork` continues them for a question and leaves the context's unchanged."""

    def __init__(
        self, stats_spec: StatsSpec, rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None, *, kernels: bool = False
    ) -> None:
        self.stats_spec = stats_spec
        self.rotary = rotary
        self._kernels = kernels
        self.queries: Tensor | None = None
        self.column_sums: Tensor | None = None
        self.learned: dict[str, Tensor] = {}
        self.question_queries: Tensor | None = None
        self._chunks = {chunks: ChunkAttention(chunks) for chunks in stats_spec.chunk_attention}
        self._count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def fork(self) -> PrefillStats:
        """An independent copy: every update creates new tensors."""
        forked = copy.copy(self)
        forked._chunks = {chunks: copy.copy(attention) for chunks, attention in self._chunks.items()}
        return forked

    def update(self, q: Tensor, k: Tensor, softmax: Softmax) -> None:
        """Add T new tokens. q: [B, H, T, D]; k: [B, Hkv, S, D], whose last T are the keys of the new tokens."""
        with record_function(SCORING):
            self._update(q, k, softmax)

    def _update(self, q: Tensor, k: Tensor, softmax: Softmax) -> None:
        if self.stats_spec.queries:
            # A clone: a view would keep the queries of the whole context alive.
            last = q[:, :, -self.stats_spec.queries :].clone()
            if self.queries is not None:
                last = torch.cat([self.queries, last], 2)[:, :, -self.stats_spec.queries :]
            self.queries = last
        if self.stats_spec.column_sums:
            received = window.received if self._kernels and window.fits(k) else window.reference
            sums = received(q, k, softmax)
            if self.column_sums is not None:
                sums[..., : self.column_sums.shape[-1]] += self.column_sums
            self.column_sums = sums
        if self.stats_spec.query_moments:
            self._add_moments(q, start=k.shape[2] - q.shape[2])
        for attention in self._chunks.values():
            attention.update(q, k)

    def add_question(self, q: Tensor) -> None:
        """Add the queries [B, H, T, D] of T tokens of a question."""
        before = [] if self.question_queries is None else [self.question_queries]
        self.question_queries = torch.cat([*before, q], 2)

    def add_scores(self, scorer: str, scores: Tensor) -> None:
        """Add the scores [B, Hkv, T] float32 of T new tokens by the scorer of this digest."""
        before = [self.learned[scorer]] if scorer in self.learned else []
        self.learned = {**self.learned, scorer: torch.cat([*before, scores], 2)}

    def view(self, keys: Tensor, values: Tensor, softmax: Softmax, layer: int, layers: int, **more: Any) -> LayerView:
        """The statistics as a LayerView. keys, values: [B, Hkv, S, D]; `more`: other fields of LayerView."""
        return LayerView(
            keys=keys,
            values=values,
            queries=keys.new_zeros(keys.shape[0], 0, 0, 0) if self.queries is None else self.queries,
            softmax=softmax,
            layer=layer,
            layers=layers,
            column_sums=self.column_sums,
            query_mean=self.query_mean,
            query_cov=self.query_cov,
            rotary=self.rotary,
            learned=self.learned,
            chunk_attention={chunks: attention.received(keys) for chunks, attention in self._chunks.items()},
            question_queries=self.question_queries,
            **more,
        )

    def _add_moments(self, q: Tensor, start: int) -> None:
        """Update mean and scatter of the queries before RoPE (Chan's pairwise algorithm)."""
        q = q[:, :, max(0, SINKS - start) :].float()
        n = q.shape[2]
        if n == 0:
            return
        if self.rotary is not None:
            first = max(start, SINKS)
            q = unrotate(q, *self.rotary(torch.arange(first, first + n, device=q.device)))
        mean = q.mean(2)
        centred = q - mean[:, :, None]
        scatter = centred.transpose(2, 3) @ centred
        if self._mean is not None and self._scatter is not None:
            total = self._count + n
            shift = mean - self._mean
            mean = self._mean + shift * (n / total)
            scatter = self._scatter + scatter + shift[..., None] * shift[..., None, :] * (self._count * n / total)
        self._count += n
        self._mean, self._scatter = mean, scatter

    @property
    def query_mean(self) -> Tensor | None:
        """[B, H, D] float32, mean of the queries before RoPE, without the first SINKS."""
        return self._mean

    @property
    def query_cov(self) -> Tensor | None:
        """[B, H, D, D] float32, covariance of the same queries."""
        return None if self._scatter is None else self._scatter / self._count


class ChunkAttention:
    """The attention that tokens receive within their chunk (`StatsSpec.chunk_attention`).

    A chunk is summed as soon as all of its tokens, and the last tokens that are in none, have been seen; the queries of
    an incomplete one wait.
    """

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks
        self._waiting: Tensor | None = None
        self._sums: tuple[Tensor, ...] = ()

    def update(self, q: Tensor, k: Tensor) -> None:
        """Add T tokens. q: [B, H, T, D]; k: [B, Hkv, S, D], whose last T are the keys of the new tokens."""
        q = q[:, :, max(0, self.chunks.first - (k.shape[2] - q.shape[2])) :]
        waiting = q.clone() if self._waiting is None else torch.cat([self._waiting, q], 2)
        while waiting.shape[2] >= self.chunks.size + self.chunks.last:
            self._sums = (*self._sums, self._sum(waiting[:, :, : self.chunks.size], k))
            waiting = waiting[:, :, self.chunks.size :].clone()
        self._waiting = waiting

    def received(self, k: Tensor) -> Tensor:
        """[B, Hkv, S - first - last] float32 for the keys k [B, Hkv, S, D] of all tokens."""
        assert self._waiting is not None
        rest = self._waiting[:, :, : max(0, self._waiting.shape[2] - self.chunks.last)]
        return torch.cat([*self._sums, self._sum(rest, k)], 2)

    def _sum(self, q: Tensor, k: Tensor) -> Tensor:
        """The sums [B, Hkv, n] of the next chunk, whose queries are q [B, H, n, D]."""
        start = self.chunks.first + len(self._sums) * self.chunks.size
        k = k[:, :, start : start + q.shape[2]].float()
        grouped = q.float().reshape(*k.shape[:2], q.shape[1] // k.shape[1], *q.shape[2:])
        logits = torch.matmul(grouped, k[:, :, None].transpose(3, 4))
        return logits.softmax(-1).sum(3).mean(2)


class QueryAwareStats:
    """Adds a question's tokens to the statistics of its context (`query_aware=true`)."""

    def __init__(self, stats: PrefillStats, context_keys: Tensor) -> None:
        self.stats = stats.fork()
        self._context_keys = context_keys

    def update(self, q: Tensor, k: Tensor, softmax: Softmax) -> None:
        """Add T tokens. q: [1, H, T, D]; k: [1, Hkv, L, D], all keys of the question so far."""
        if self.stats.stats_spec.question:
            self.stats.add_question(q)
        self.stats.update(q, torch.cat([self._context_keys, k], 2), softmax)
