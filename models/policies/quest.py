"""Quest: sparse attention to the pages that can contain the highest logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lceval.kernels.bounds import Bounds
from lceval.kernels.paged import KV
from lceval.kernels.select import selective
from lceval.models.policies.base import Amount


@dataclass(frozen=True, kw_only=True)
class Quest:
    """Attend to the pages with the highest upper bound on their logits (Tang et al. 2024, arXiv 2406.10774,
    algorithm 1).

    A page is `page` consecutive kept slots. The first `skip` layers stay dense. The budget is rounded down to whole
    pages but is at least one page.

    Differs from the paper: the query heads of a KV head select together, by the mean of their softmaxes over the pages'
    bounds; the paper's models have one query head per KV head.

    Cost: no memory is freed; the index adds two keys per page.
    """

    amount: Amount
    page: int = 16
    skip: int = 2

    def __post_init__(self) -> None:
        if self.page < 1 or self.skip < 0:
            raise ValueError("page must be at least 1, skip at least 0")

    def wrap(self, kv: KV, layer: int, context_tokens: int) -> KV:
        """One layer's slots with sparse attention; a share is of the context's tokens, not of the kept ones."""
        if layer < self.skip:
            return kv
        return selective(kv, self.amount.tokens(context_tokens), partial(Bounds.build, unit=self.page))
