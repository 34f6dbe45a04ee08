"""Page bounds: an index of each channel's smallest and largest key per page of consecutive slots.

The logit of a slot cannot exceed the bound of its page, whatever the signs of the query:

    q . k <= sum_c max(q_c min_c, q_c max_c) = relu(q) . max - relu(-q) . min

    bounds  [U, 2, D]    max, then min of each page of `unit` slots; pages of a head in order, heads concatenated
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lceval.kernels.dense import attention_logits
from lceval.kernels.select import mean_softmax


@dataclass(frozen=True)
class Bounds:
    """The page bounds of one layer, in the keys' own dtype. `starts` is each head's first page."""

    bounds: Tensor
    starts: tuple[int, ...]
    unit: int

    @classmethod
    def build(cls, keys: Iterable[Tensor], unit: int) -> Bounds:
        """Build the index from the keys [n, D] of every head, pages of `unit` slots; n = 0 for heads without index."""
        pages = [page_bounds(k, unit) for k in keys]
        return cls(torch.cat(pages), tuple(accumulate((len(p) for p in pages[:-1]), initial=0)), unit)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the bounds: two keys per page."""
        return self.bounds.numel() * self.bounds.element_size()

    @property
    def read_bytes(self) -> int:
        """Bytes that one decoding step reads: the whole index."""
        return self.stored_bytes

    def scores(self, first: int, n: int, q: Tensor, scaling: float) -> Tensor:
        """[R, Q, ceil(n / unit)] float32, as `Index.scores`. q: [R, Q, G, D]."""
        heads, queries, group, dim = q.shape
        pages = -(-n // self.unit)
        span = slice(self.starts[first], self.starts[first] + heads * pages)
        bounds = self.bounds[span].view(heads, pages, 2 * dim)
        halves = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1).view(heads, queries * group, 2 * dim)
        logits = attention_logits(halves, bounds, scaling)
        return mean_softmax(logits.view(heads, queries, group, pages))


def page_bounds(k: Tensor, unit: int) -> Tensor:
    """[ceil(n / unit), 2, D] of keys [n, D]; the last page may have fewer slots."""
    n, dim = k.shape
    # Repeating the last slot fills its page without moving the bounds.
    filled = torch.cat([k, k[-1:].expand(-n % unit, -1)]).view(-1, unit, dim)
    return torch.stack([filled.amax(1), filled.amin(1)], 1)
