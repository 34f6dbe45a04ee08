"""A compressed context in 8-bit floats (e4m3: 4 bits of exponent, 3 of mantissa), and attention over it in PyTorch.

    code = e4m3(x / scale),   x~ = code * scale,   scale = 2 ** max(-6, ceil(log2(max |x| / 448)))

with one scale for the keys and one for the values of a KV head. A scale is a power of two, so that it moves exactly
between codes, queries and outputs: kernels read codes only. Relative error at most 2**-4, absolute at most
scale * 2**-10 near zero. Unlike the layout of kernels/quant.py all slots are stored in 8 bits, the newest too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lceval.kernels import paged
from lceval.kernels.paged import PAGE, Around, PagedKV, is_view

LARGEST = 448.0
# A smaller scale would push 16-bit queries, which it multiplies, below their normal range.
SMALLEST_SCALE = 2.0**-6


def encode(x: Tensor) -> Tensor:
    """The codes (uint8) of x, rounded to nearest, even on ties; magnitudes above 448 saturate."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """float32 of codes (uint8)."""
    return codes.view(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class Fp8KV(Around):
    """One layer of a compressed context in e4m3, as a `KV`. Immutable.

    Attributes:
        kv: codes as pages of uint8.
        k_scale, v_scale: [B, Hkv] float32, powers of two.
        dtype: of the model's keys and values.
    """

    kv: PagedKV
    k_scale: Tensor
    v_scale: Tensor
    dtype: torch.dtype

    @classmethod
    def quantize(cls, kv: PagedKV) -> Fp8KV:
        """All slots of `kv` in 8 bits."""
        counts = torch.tensor(kv.counts, device=kv.k.device)
        used = (counts + PAGE - 1) // PAGE
        owner = torch.repeat_interleave(torch.arange(len(counts), device=used.device), used, output_size=len(kv.k))
        page = torch.arange(len(kv.k), device=used.device) - (used.cumsum(0) - used)[owner]
        # What follows the last slot of a head may be anything.
        empty = (page[:, None] * PAGE + torch.arange(PAGE, device=used.device) >= counts[owner][:, None])[..., None]
        parts = []
        for pool in (kv.k,) if is_view(kv.k, kv.v) else (kv.k, kv.v):
            x = pool.float().masked_fill(empty, 0.0)
            largest = x.new_zeros(len(counts)).scatter_reduce_(0, owner, x.abs().amax((1, 2)), "amax")
            scale = torch.exp2((largest / LARGEST).log2().ceil()).clamp(min=SMALLEST_SCALE)
            parts.append((encode(x / scale[owner][:, None, None]), scale.view(kv.lens.shape)))
        (k, k_scale), (v, v_scale) = parts[0], parts[-1]
        # A view of the keys stays one.
        v = v[..., : kv.value_dim]
        return cls(PagedKV(k, v, kv.table, kv.lens, kv.positions, kv.counts), k_scale, v_scale, kv.k.dtype)

    @property
    def _scale_bytes(self) -> int:
        return self.k_scale.nbytes + self.v_scale.nbytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of codes, positions and scales."""
        return self.kv.kept_bytes + self._scale_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors: whole pages, page table, lengths and scales."""
        return self.kv.allocated_bytes + self._scale_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes that one decoding step reads: codes and scales."""
        return self.kv.read_bytes + self._scale_bytes

    def head(self, row: int) -> tuple[Tensor, Tensor]:
        """As `KV.head`, in the model's dtype."""
        return self._decoded(row, *self.kv.head(row))

    def take(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """As `KV.take`, in the model's dtype."""
        return self._decoded(row, *self.kv.take(row, slots))

    def _decoded(self, row: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scales = (scale.flatten()[row] for scale in (self.k_scale, self.v_scale))
        k, v = ((decode(codes) * scale).to(self.dtype) for codes, scale in zip((k, v), scales, strict=True))
        return k, v

    def attend(self, q: Tensor, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
        """As `KV.attend`; one head is decoded at a time."""
        return paged.attend(q, self, scaling, cap)

    def scaled(self, q: Tensor) -> Tensor:
        """Queries [R, H, D] that attend over the codes as q attends over the keys."""
        return _times(q, self.k_scale)

    def unscaled(self, o: Tensor) -> Tensor:
        """Outputs [R, H, D] over the values, of those over the codes."""
        return _times(o, self.v_scale)


def _times(x: Tensor, scale: Tensor) -> Tensor:
    """x [R, H, D] times the scale [B, Hkv] of each row's KV head, exactly; rows of one sequence are adjacent."""
    sequences, kv_heads = scale.shape
    grouped = x.view(sequences, -1, kv_heads, x.shape[1] // kv_heads, x.shape[2])
    return (grouped * scale[:, None, :, None, None].to(x.dtype)).view(x.shape)
