"""Cache layers of the prefill. Each computes its own attention, since only the layer knows its storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import CacheLayerMixin

from lceval.kernels import compact, paged
from lceval.kernels.dense import attend_in_blocks
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.softmax import Softmax
from lceval.models.prefill_stats import PrefillStats

# Queries per block in a sliding-window layer: their keys form a band, not the whole context.
BAND_ROWS = 512


def attend_dense(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
    """Causal attention; the last of the queries [B, H, T, D] attends to the last of the keys [B, Hkv, S, D], S >= T."""
    if softmax.is_special:
        return attend_in_blocks(q, k, v, softmax)
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax.scaling, enable_gqa=True)
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax.scaling, enable_gqa=True)


class AttendingLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer that `update` attaches to the key tensor, so that the attention function can call its `attend`."""

    is_compileable = False
    is_sliding = False
    attends = True

    @property
    def is_full(self) -> bool:
        """Whether it is a full-attention layer."""
        return not self.is_sliding

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store k, v [B, Hkv, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        self.append(k, v)
        k.lceval_layer = self  # type: ignore[attr-defined]
        return k, v

    def append(self, k: Tensor, v: Tensor) -> None:
        raise NotImplementedError

    def attend(self, q: Tensor, softmax: Softmax) -> Tensor:
        """Attention of q [B, H, T, D] over all stored tokens, causal within the last T; returns [B, H, T, D]."""
        raise NotImplementedError

    def observe(self, q: Tensor, softmax: Softmax) -> None:
        """Collect statistics of the layer's own queries q [B, H, T, D], before they attend."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class PrefillLayer(AttendingLayer):
    """Dense keys and values of a context in a preallocated buffer, and its prefill statistics."""

    def __init__(self, tokens: int, stats: PrefillStats) -> None:
        super().__init__()
        self.tokens = tokens
        self.stats = stats
        self.softmax = Softmax(0.0)
        self.seen = 0

    def lazy_initialization(self, k: Tensor, v: Tensor) -> None:
        # Whole pages, so that an unevicted context becomes pages without a copy.
        slots = -(-self.tokens // PAGE) * PAGE
        self.keys, self.values = paged.both(k, v, lambda x: x.new_zeros(*x.shape[:2], slots, x.shape[3]))
        self.is_initialized = True

    def append(self, k: Tensor, v: Tensor) -> None:
        new = slice(self.seen, self.seen + k.shape[2])
        self.keys[:, :, new] = k
        self.values[:, :, new] = v
        self.seen = new.stop

    def observe(self, q: Tensor, softmax: Softmax) -> None:
        self.softmax = softmax
        self.stats.update(q, self.keys[:, :, : self.seen], softmax)

    def attend(self, q: Tensor, softmax: Softmax) -> Tensor:
        return attend_dense(q, self.keys[:, :, : self.seen], self.values[:, :, : self.seen], softmax)

    def get_seq_length(self) -> int:
        return self.seen

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers."""
        return paged.bytes_of(self.keys, self.values)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all `tokens` tokens, without page slack."""
        return self.buffer_bytes * self.tokens // self.keys.shape[2]

    @property
    def compacts(self) -> bool:
        """Whether the Triton kernels can compact its keys and values."""
        return compact.fits(self.keys, self.values)

    def kept(self, mask: Tensor | None, counts: Sequence[int], *, kernels: bool) -> PagedKV:
        """The tokens in `mask` [B, Hkv, S], of which each head has `counts`; all of them, without a copy, if None."""
        if mask is None:
            return PagedKV.full(self.keys, self.values, self.seen)
        k, v = self.keys[:, :, : self.seen], self.values[:, :, : self.seen]
        return compact.gather(k, v, mask, counts) if kernels and self.compacts else PagedKV.gather(k, v, mask)

    def release(self) -> None:
        """Free the keys and values."""
        self.keys = self.values = self.keys.new_empty(0)


class Windowed(Protocol):
    """A layer of which a query sees a window. Attributes: as in `LayerKind`."""

    @property
    def window(self) -> int: ...

    @property
    def chunked(self) -> bool: ...


def first_visible(queries: Tensor, layer: Windowed, start: int) -> Tensor:
    """The first column that queries in the columns `queries` see. start: the position of column 0 in the sequence."""
    if layer.chunked:
        return queries - (queries + start) % layer.window
    return queries - (layer.window - 1)


class SlidingPrefillLayer(PrefillLayer):
    """A sliding-window layer: a query attends to `window` tokens including itself; older tokens are dropped."""

    is_sliding = True

    def __init__(self, tokens: int, stats: PrefillStats, window: int, chunked: bool = False) -> None:
        super().__init__(tokens, stats)
        self.window = window
        self.chunked = chunked

    def lazy_initialization(self, k: Tensor, v: Tensor) -> None:
        self.keys, self.values = k[:, :, :0], v[:, :, :0]
        self.is_initialized = True

    def append(self, k: Tensor, v: Tensor) -> None:
        # The tokens within the window of the first new token, and the new tokens.
        past = min(self.keys.shape[2], self.window - 1)
        self.keys, self.values = (
            torch.cat([old[:, :, old.shape[2] - past :], new], 2) for old, new in ((self.keys, k), (self.values, v))
        )
        self.seen += k.shape[2]

    def observe(self, q: Tensor, softmax: Softmax) -> None:
        pass

    def attend(self, q: Tensor, softmax: Softmax) -> Tensor:
        if softmax.is_special:
            assert not self.chunked, "chunked attention with a cap or a sink"
            return attend_in_blocks(q, self.keys, self.values, softmax, self.window)
        o = q.new_empty(*q.shape[:3], self.values.shape[3])
        tokens = q.shape[2]
        past = self.keys.shape[2] - tokens
        for start in range(0, tokens, BAND_ROWS):
            rows = torch.arange(start, min(tokens, start + BAND_ROWS), device=q.device) + past
            band = slice(max(0, past + start + 1 - self.window), int(rows[-1]) + 1)
            columns = torch.arange(band.start, band.stop, device=q.device)
            first = first_visible(rows[:, None], self, self.seen - self.keys.shape[2])
            mask = (columns <= rows[:, None]) & (columns >= first)
            k, v = self.keys[:, :, band], self.values[:, :, band]
            part = q[:, :, start : start + BAND_ROWS]
            o[:, :, start : start + BAND_ROWS] = F.scaled_dot_product_attention(
                part, k, v, attn_mask=mask, scale=softmax.scaling, enable_gqa=True
            )
        return o

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, n, D] of the tokens that later queries can attend to, n < window."""
        n = min(self.keys.shape[2], self.window - 1)
        first = self.keys.shape[2] - n
        return self.keys[:, :, first:].contiguous(), self.values[:, :, first:].contiguous()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the tokens that later queries can attend to."""
        return sum(x.numel() * x.element_size() for x in self.last)
