"""KIVI: the kept slots in 8, 4 or 2 bits a number."""

from __future__ import annotations

from dataclasses import dataclass

from lceval.kernels.paged import PagedKV
from lceval.kernels.quant import BITS, QuantKV

# Recipe names and their bits of keys and of values. 16 stands for the model's own dtype, whatever it is.
NAMES: dict[str, tuple[int, int]] = {f"int{bits}": (bits, bits) for bits in BITS if bits != 16} | {
    f"kv{k}v{v}": (k, v) for k in BITS for v in BITS if k != v
}


@dataclass(frozen=True)
class Quantizer:
    """Keys quantised per channel, values per token, in groups of 32 (KIVI, Liu et al. 2024, section 4).

    The newest `residual` slots of every head, and at most 63 more, stay in full precision: pages of 64 slots are
    quantised whole. Keys and values may differ in bits: keys need more.

    Where we differ: the context is quantised once, after eviction, and what follows it (the question, the answer)
    stays in full precision, where KIVI goes on quantising while it decodes. Its scale and zero are rounded to nearest;
    ours outwards, so that 16 bits of scale never cut off the ends of a group.
    """

    k_bits: int
    v_bits: int
    residual: int = 128

    def __post_init__(self) -> None:
        if self.k_bits not in BITS or self.v_bits not in BITS:
            raise ValueError(f"keys and values take {', '.join(map(str, BITS))} bits, not {self.k_bits}, {self.v_bits}")
        if self.k_bits == self.v_bits == 16:
            raise ValueError("keys and values at 16 bits is full precision: leave the store out")
        if self.residual < 0:
            raise ValueError(f"residual is a number of tokens, at least 0, not {self.residual}")

    def quantize(self, kv: PagedKV) -> QuantKV:
        """One layer's slots, its oldest pages quantised."""
        return QuantKV.quantize(kv, self.k_bits, self.v_bits, self.residual)
