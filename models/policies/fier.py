"""FIER: sparse attention to the tokens that one-bit keys rank highest."""

from __future__ import annotations

from dataclasses import dataclass

from lceval.kernels.bits import Bits
from lceval.kernels.paged import KV
from lceval.kernels.select import selective
from lceval.models.policies.base import Amount


@dataclass(frozen=True, kw_only=True)
class Fier:
    """Attend to the tokens with the highest logits, estimated from 1-bit keys (Wang et al. 2025, arXiv 2508.08256,
    algorithm 1).

    The first `skip` layers stay dense.

    Differs from the paper: the query heads of a KV head select together by the mean of their softmaxes, and the two
    levels of a quantization group are the means of its halves; the paper specifies neither.

    Cost: no memory is freed; the index adds an eighth of the keys' fp16 size.
    """

    amount: Amount
    skip: int = 2

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise ValueError("skip must be at least 0")

    def wrap(self, kv: KV, layer: int, context_tokens: int) -> KV:
        """One layer's slots with sparse attention; a share is of the context's tokens, not of the kept ones."""
        return kv if layer < self.skip else selective(kv, self.amount.tokens(context_tokens), Bits.build)
