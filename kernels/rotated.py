"""A quantized context whose keys and values are rotated by a Hadamard matrix, which spreads outliers over channels.

With H orthonormal and symmetric, q k^T = (q H) (k H)^T and p v = (p (v H)) H: queries are rotated before attention over
the stored slots, and outputs after it, so that the kernels of the layout need no change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lceval.kernels.paged import Around, PagedKV


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix [size, size] float32 by Sylvester's construction; size is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def rotate(x: Tensor) -> Tensor:
    """x [..., D] H in x's dtype, computed in float32; its own inverse.

    Where D is no power of two, H is block-diagonal: as many equal blocks as are necessary.
    """
    block = x.shape[-1] & -x.shape[-1]
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // block, block).float()
    return torch.matmul(parts, hadamard(block, x.device)).to(x.dtype).view(x.shape)


def rotated(kv: PagedKV) -> PagedKV:
    """The same slots with rotated keys and values."""
    return PagedKV(rotate(kv.k), rotate(kv.v), kv.table, kv.lens, kv.positions, kv.counts)


@dataclass(frozen=True)
class Rotated(Around):
    """One layer of a compressed context, as a `KV`, around slots with rotated keys and values."""

    def head(self, row: int) -> tuple[Tensor, Tensor]:
        """As `KV.head`, rotated back."""
        k, v = self.kv.head(row)
        return rotate(k), rotate(v)

    def take(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """As `KV.take`, rotated back."""
        k, v = self.kv.take(row, slots)
        return rotate(k), rotate(v)

    def attend(self, q: Tensor, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
        """As `KV.attend`."""
        o, lse = self.kv.attend(rotate(q), scaling, cap)
        return rotate(o), lse
