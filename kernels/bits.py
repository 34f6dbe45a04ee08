"""One-bit keys: an index that estimates the attention logits of all slots with an eighth of the fp16 key bytes.

32 consecutive slots of a channel form a group with two levels; the bit of a slot selects one of them:

    bit_i = k_i >= (max + min) / 2        k~_i = zero + scale * (2 bit_i - 1)

    words   [W, D] int32    bit i is slot i of the group; groups of a head in order, heads concatenated
    zero    [W, D] 16-bit   centre of the two levels
    scale   [W, D] 16-bit   half their distance

The estimate is q . k~_i = q . zero + sum_c (q_c scale_c) (2 bit_ic - 1): the scale is folded into the query, so that
the keys are signs only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.kernels.select import mean_softmax

GROUP = 32


@dataclass(frozen=True)
class Bits:
    """The 1-bit keys of one layer. Fields as in the layout above; `starts` is each head's first group."""

    words: Tensor
    zero: Tensor
    scale: Tensor
    starts: tuple[int, ...]

    unit = 1

    @classmethod
    def build(cls, keys: Iterable[Tensor]) -> Bits:
        """Build the index from the keys [n, D] of every head; n = 0 for heads without an index."""
        words, zero, scale = zip(*(quantize(k) for k in keys), strict=True)
        starts = accumulate((len(w) for w in words[:-1]), initial=0)
        return cls(torch.cat(words), torch.cat(zero), torch.cat(scale), tuple(starts))

    @property
    def stored_bytes(self) -> int:
        """Bytes of words, centres and scales: 8 per group and channel."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.zero, self.scale))

    @property
    def read_bytes(self) -> int:
        """Bytes that one decoding step reads: the whole index."""
        return self.stored_bytes

    def scores(self, first: int, n: int, q: Tensor, scaling: float) -> Tensor:
        """[R, Q, n] float32, as `Index.scores`. q: [R, Q, G, D]."""
        heads, queries, group, dim = q.shape
        groups = -(-n // GROUP)
        span = slice(self.starts[first], self.starts[first] + heads * groups)
        rows = q.reshape(heads, 1, queries * group, dim).float() * scaling
        zero, scale = (x[span].view(heads, groups, 1, dim).float() for x in (self.zero, self.scale))
        logits = torch.bmm((rows * scale).view(heads * groups, -1, dim), signs(self.words[span]))
        logits = logits.view(heads, groups, -1, GROUP)
        logits += torch.matmul(zero, rows.transpose(2, 3)).transpose(2, 3)
        logits = logits.transpose(1, 2).reshape(heads, queries, group, groups * GROUP)
        return mean_softmax(logits[..., :n])


def quantize(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Words, zero and scale [ceil(n / 32), D] of keys [n, D].

    The bit rounds to the nearer end of the group's range, as in FIER (Wang et al. 2025, arXiv 2508.08256, eq. 5 and
    algorithm 1). The paper does not specify the levels; here they are the means of the two halves, which minimise the
    squared error for these bits and have a higher recall than the ends of the range or points half way to them.
    """
    n, dim = k.shape
    real = F.pad(k.new_ones(n, 1, dtype=torch.bool), (0, 0, 0, -n % GROUP)).view(-1, GROUP, 1)
    x = F.pad(k.float(), (0, 0, 0, -n % GROUP)).view(-1, GROUP, dim)
    top, bottom = x.masked_fill(~real, -torch.inf).amax(1), x.masked_fill(~real, torch.inf).amin(1)
    high = (x >= ((top + bottom) / 2)[:, None]) & real
    n_high, n_low = high.sum(1), (~high & real).sum(1)
    upper = (x * high).sum(1) / n_high.clamp(min=1)
    # A group of equal values has no lower half: one level.
    lower = torch.where(n_low > 0, (x * (~high & real)).sum(1) / n_low.clamp(min=1), upper)
    shifts = torch.arange(GROUP, dtype=torch.int32, device=k.device)[:, None]
    words = (high.int() << shifts).sum(1, dtype=torch.int32)
    # Except in bfloat16 models, keys are well within float16's range, and its 11 bits are more precise.
    dtype = torch.bfloat16 if k.dtype == torch.bfloat16 else torch.float16
    return words, ((upper + lower) / 2).to(dtype), ((upper - lower) / 2).to(dtype)


def signs(words: Tensor) -> Tensor:
    """[W, D, 32] float32, +1 where the bit is set, -1 where not. words: [W, D] int32."""
    # Eight signs at a time from a table of 256 int64 entries: a third of the time of shifting bit by bit.
    octets = words.contiguous().view(torch.uint8).int()
    table = _table(words.device)
    return table.index_select(0, octets.view(-1)).view(torch.int8).view(*words.shape, GROUP).float()


@cache
def _table(device: torch.device) -> Tensor:
    """[256] int64, whose byte j is bit j of the index as +1 or -1 (int8)."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(torch.int8).view(torch.int64).view(-1)
