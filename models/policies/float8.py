"""8-bit floats for the kept slots."""

from __future__ import annotations

from dataclasses import dataclass

from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.paged import PagedKV


@dataclass(frozen=True)
class Float8:
    """Store keys and values as 8-bit floats (e4m3; Micikevicius et al. 2022, arXiv 2209.05433).

    Keys and values of a KV head each have one scale, a power of two at which their largest magnitude fits into 448. All
    slots are stored so, the newest too; question and answer stay in full precision. Kernels decode by bits, on any GPU.

    Differs from the paper: the scale is of a KV head of this context, and a power of two.
    """

    def quantize(self, kv: PagedKV) -> Fp8KV:
        """One layer's slots in 8 bits."""
        return Fp8KV.quantize(kv)
