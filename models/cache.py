"""The KV cache in its two states: a context being prefilled, and questions over a compressed context.

Eviction happens between the two, outside the model: the prefill keeps every token's keys and values and the queries
of the last few, so one uncompressed prefill can serve any number of recipes. A compressed context never changes;
each question appends to a tail of its own (`fork`), so sharing costs nothing and rolling back is forgetting the tail.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import Cache, CacheLayerMixin

from lceval.kernels import decode, paged
from lceval.kernels.paged import PAGE, PagedKV
from lceval.models.policies import LayerView
from lceval.models.recipe import Recipe


class AttendingLayer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer that computes the attention itself, because only it knows what it kept."""

    is_compileable = False
    is_sliding = False

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store k, v [B, Hkv, T, D]. The returned key carries this layer to the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        self.append(k, v)
        k.lceval_layer = self  # type: ignore[attr-defined]
        return k, v

    def append(self, k: Tensor, v: Tensor) -> None:
        raise NotImplementedError

    def attend(self, q: Tensor, scaling: float) -> Tensor:
        """Attention of q [B, H, T, D] over everything stored, the last T tokens causally; returns [B, H, T, D]."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class PrefillLayer(AttendingLayer):
    """Dense keys and values of a context, in a buffer allocated once, and the queries of its last tokens."""

    def __init__(self, tokens: int, queries_kept: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.queries_kept = queries_kept
        self.queries: Tensor | None = None
        self.scaling = 0.0
        self.seen = 0

    def lazy_initialization(self, k: Tensor, v: Tensor) -> None:
        # Whole pages, so that a context of which nothing is dropped becomes pages without a copy.
        shape = (*k.shape[:2], -(-self.tokens // PAGE) * PAGE, k.shape[3])
        self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        self.is_initialized = True

    def append(self, k: Tensor, v: Tensor) -> None:
        new = slice(self.seen, self.seen + k.shape[2])
        self.keys[:, :, new] = k
        self.values[:, :, new] = v
        self.seen = new.stop

    def attend(self, q: Tensor, scaling: float) -> Tensor:
        self.scaling = scaling
        self._remember(q)
        k, v = self.keys[:, :, : self.seen], self.values[:, :, : self.seen]
        if q.shape[2] == self.seen:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        mask = causal_lower_right(q.shape[2], self.seen)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)

    def _remember(self, q: Tensor) -> None:
        if self.queries_kept:
            # A clone: a view would keep the queries of the whole context alive.
            q = q[:, :, -self.queries_kept :].clone()
            if self.queries is not None:
                q = torch.cat([self.queries, q], 2)[:, :, -self.queries_kept :]
            self.queries = q

    def get_seq_length(self) -> int:
        return self.seen


class Prefill(Cache):  # type: ignore[misc]
    """The cache that a model fills while it reads a context of `tokens` tokens, in one piece or in chunks."""

    def __init__(self, layers: int, tokens: int, queries_kept: int) -> None:
        super().__init__(layers=[PrefillLayer(tokens, queries_kept) for _ in range(layers)])
        self.tokens = tokens

    def kv_bytes(self) -> int:
        """Bytes of the keys and values of `tokens` tokens in all layers, without page slack."""
        return sum(
            2 * self.tokens * layer.keys.shape[1] * layer.keys.shape[3] * layer.keys.element_size()
            for layer in self.layers
        )

    def compress(self, recipe: Recipe, *, consume: bool) -> Context:
        """The context under a recipe.

        Args:
            consume: free each layer's dense keys and values as soon as it is compressed. The prefill can then serve
                no other recipe.
        """
        start, full_bytes = time.perf_counter(), self.kv_bytes()
        held = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in self.layers)
        peak, pages = held, []
        for index, layer in enumerate(self.layers):
            compressed = _compress_layer(layer, recipe, index, len(self.layers))
            pages.append(compressed)
            if compressed.k.untyped_storage().data_ptr() != layer.keys.untyped_storage().data_ptr():
                held += compressed.allocated_bytes
                peak = max(peak, held)
                if consume:
                    held -= 2 * layer.keys.numel() * layer.keys.element_size()
                    layer.keys = layer.values = layer.queries = None
        if pages and pages[0].k.is_cuda:
            torch.cuda.synchronize()
        return Context(tuple(pages), self.tokens, full_bytes, peak, time.perf_counter() - start)


def _compress_layer(layer: PrefillLayer, recipe: Recipe, index: int, layers: int) -> PagedKV:
    keys, values = layer.keys[:, :, : layer.seen], layer.values[:, :, : layer.seen]
    evictor = recipe.evictor
    if evictor is None or evictor.amount.tokens(layer.seen) >= layer.seen:
        return PagedKV.full(layer.keys, layer.values, layer.seen)
    queries = layer.queries if layer.queries is not None else keys.new_zeros(keys.shape[0], 0, 0, keys.shape[3])
    view = LayerView(keys, values, queries, layer.scaling, index, layers)
    return PagedKV.gather(keys, values, evictor.keep(view))


@dataclass(frozen=True)
class Context:
    """A compressed context, shared by every question about it.

    Attributes:
        layers: one PagedKV a layer.
        tokens: how many tokens were read, kept or not: the position of the next one.
        full_bytes: KV bytes of all `tokens` tokens in all layers, nothing dropped.
        peak_bytes: the most KV bytes held at once while compressing.
        compress_s: seconds that scoring and gathering took.
    """

    layers: tuple[PagedKV, ...]
    tokens: int
    full_bytes: int
    peak_bytes: int
    compress_s: float

    @classmethod
    def empty(cls, layers: int, dtype: torch.dtype, device: torch.device) -> Context:
        """No context at all: a prompt of one token is all question."""
        none = torch.empty(0, PAGE, 0, dtype=dtype, device=device)
        table, lens = (torch.empty(shape, dtype=torch.int32, device=device) for shape in ((1, 0, 0), (1, 0)))
        return cls((PagedKV(none, none, table, lens, None, ()),) * layers, 0, 0, 0, 0.0)

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
        return sum(sum(p.counts) * 2 * p.k.shape[-1] * p.k.element_size() for p in self.layers)

    @property
    def dtype(self) -> str:
        """Data type of the stored keys and values, as in `float32`."""
        return str(self.layers[0].k.dtype).removeprefix("torch.")

    def kept_tokens(self) -> list[dict[str, float]]:
        """Per layer, the fewest, mean and most tokens that a KV head kept."""
        counts = [layer.counts for layer in self.layers if layer.counts]
        return [{"min": min(c), "mean": sum(c) / len(c), "max": max(c)} for c in counts]

    def fork(self, capacity: int, *, kernels: bool = False) -> QuestionCache:
        """A cache that continues from this context, with room for `capacity` more tokens (it grows if need be).

        Args:
            kernels: decode through the Triton kernels instead of PyTorch.
        """
        return QuestionCache(self, capacity, kernels)


class QuestionLayer(AttendingLayer):
    """The shared pages of a context, and a dense tail that belongs to the question."""

    is_croppable = True

    def __init__(self, context: PagedKV, context_tokens: int, capacity: int, kernels: bool) -> None:
        super().__init__()
        self.context = context
        self.context_tokens = context_tokens
        self.capacity = capacity
        self.kernels = kernels
        self.length = 0

    def lazy_initialization(self, k: Tensor, v: Tensor) -> None:
        shape = (*k.shape[:2], max(self.capacity, k.shape[2]), k.shape[3])
        self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        self.is_initialized = True

    def append(self, k: Tensor, v: Tensor) -> None:
        new = slice(self.length, self.length + k.shape[2])
        if new.stop > self.keys.shape[2]:
            grown = (*self.keys.shape[:2], 2 * new.stop, self.keys.shape[3])
            self.keys, self.values = (
                torch.cat([old, old.new_empty(grown)], 2)[:, :, : grown[2]] for old in (self.keys, self.values)
            )
        self.keys[:, :, new] = k
        self.values[:, :, new] = v
        self.length = new.stop

    def attend(self, q: Tensor, scaling: float) -> Tensor:
        k, v = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        own = paged.attend_causal(q, k, v, scaling)
        if self.context_tokens == 0:
            return own[0]
        past = self._decode(q, scaling) if self.kernels and q.shape[2] == 1 else paged.attend(q, self.context, scaling)
        return paged.merge(*past, *own)

    def _decode(self, q: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """One query token a row over the context, by the kernel; every row reads the same pages."""
        kv, rows = self.context, q.shape[0]
        o, lse = decode.decode(
            q[:, :, 0].contiguous(), kv.k, kv.v, kv.table.expand(rows, -1, -1), kv.lens.expand(rows, -1), scaling
        )
        return o[:, :, None], lse[:, :, None]

    def get_seq_length(self) -> int:
        """The logical length: tokens seen, so that positions stay right after eviction."""
        return self.context_tokens + self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens of the tail (transformers' convention: a negative number)."""
        self.length += min(tokens_to_remove, 0)
        assert self.length >= 0, "a rollback cannot reach into the context"

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Give each row of the tail `repeats` copies; the context stays one for all."""
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, 0)
            self.values = self.values.repeat_interleave(repeats, 0)


class QuestionCache(Cache):  # type: ignore[misc]
    """One or more rows of tokens after one compressed context."""

    def __init__(self, context: Context, capacity: int, kernels: bool) -> None:
        super().__init__(layers=[QuestionLayer(layer, context.tokens, capacity, kernels) for layer in context.layers])
        self.context = context
        self.first_step: float | None = None

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # The first token is out when the model is called again: that call marks the start of decoding.
        if layer_idx == 0 and self.first_step is None and self.layers[0].length:
            self.first_step = time.perf_counter()
        return super().update(k, v, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    @property
    def tail_bytes(self) -> int:
        """Bytes of the tails' buffers in all layers."""
        return sum(2 * x.keys.numel() * x.keys.element_size() for x in self.layers if x.is_initialized)

    def rollback(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""
        self.crop(-tokens)
