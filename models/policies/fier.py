"""FIER: the tokens that one-bit keys rank highest."""

from __future__ import annotations

from dataclasses import dataclass

from lceval.kernels.bits import Bits
from lceval.kernels.paged import KV
from lceval.kernels.select import selective
from lceval.models.policies.base import Amount


@dataclass(frozen=True, kw_only=True)
class Fier:
    """Attend to the tokens whose logits, estimated from one-bit keys, are highest (Wang et al. 2025, algorithm 1).

    The first `skip` layers are read whole. Query heads that share a KV head select together, by the mean of their
    softmaxes; the paper does not say.
    """

    amount: Amount
    skip: int = 2

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise ValueError("skip is at least 0")

    def wrap(self, kv: KV, layer: int, context_tokens: int) -> KV:
        """One layer's slots, read selectively; the amount is of the context's tokens, not of the kept ones."""
        return kv if layer < self.skip else selective(kv, self.amount.tokens(context_tokens), Bits.build)
