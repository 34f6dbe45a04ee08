"""KIVI: quantization of the kept slots to 8, 4 or 2 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lceval.kernels import compact
from lceval.kernels.paged import PagedKV
from lceval.kernels.quant import BITS, QuantKV
from lceval.kernels.rotated import Rotated, rotate, rotated

ROTATIONS = ("none", "hadamard")
# Bits of keys and values by recipe name; 16 is the model's own dtype.
NAMES: dict[str, tuple[int, int]] = {f"int{bits}": (bits, bits) for bits in BITS if bits != 16} | {
    f"kv{k}v{v}": (k, v) for k in BITS for v in BITS if k != v
}


@dataclass(frozen=True)
class Quantizer:
    """Quantize keys per channel and values per token, in groups of 32 (KIVI, Liu et al. 2024, arXiv 2402.02750,
    section 4).

    The newest `residual` slots of every head, and at most 63 more, stay in full precision, since only whole pages of 64
    slots are quantized. Keys and values can have different precisions; keys require more bits.

    `rotate=hadamard` multiplies keys and values by a Hadamard matrix before they are quantized, and queries and outputs
    too, which spreads outliers over the channels (as QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).

    Differs from the paper: the context is quantized once, after eviction, and question and answer stay in full
    precision, while KIVI continues to quantize during decoding; scale and zero are rounded outwards, not to nearest,
    so that a 16-bit scale never clips a group.
    """

    k_bits: int
    v_bits: int
    residual: int = 128
    rotate: str = "none"

    def __post_init__(self) -> None:
        if self.k_bits not in BITS or self.v_bits not in BITS:
            raise ValueError(f"keys and values have {', '.join(map(str, BITS))} bits, not {self.k_bits}, {self.v_bits}")
        if self.k_bits == self.v_bits == 16:
            raise ValueError("16 bits for keys and values is full precision: leave the quantization out")
        if self.residual < 0:
            raise ValueError(f"residual must be a number of tokens, at least 0, not {self.residual}")
        if self.rotate not in ROTATIONS:
            raise ValueError(f"rotate must be {' or '.join(ROTATIONS)}")

    def quantize(self, kv: PagedKV) -> QuantKV | Rotated:
        """One layer's slots with all but the newest pages quantized."""
        if self.rotate == "none":
            return QuantKV.quantize(kv, self.k_bits, self.v_bits, self.residual)
        return Rotated(QuantKV.quantize(rotated(kv), self.k_bits, self.v_bits, self.residual))

    def gathered(self, k: Tensor, v: Tensor, keep: Tensor | None, counts: Sequence[int]) -> QuantKV | Rotated:
        """As `quantize`, of the kept slots of a dense cache, in one pass by the Triton kernels.

        k, v: [B, Hkv, S, D]; keep: [B, Hkv, S] bool, None for all; counts: kept slots of each head, row by row.
        """
        arguments = keep, counts, self.k_bits, self.v_bits, self.residual
        if self.rotate == "none":
            return compact.quantize(k, v, *arguments)
        return Rotated(compact.quantize(rotate(k), rotate(v), *arguments))
