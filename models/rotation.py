"""RoPE on tensors, forwards and backwards."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE. x: [B, H, T, D]; cos, sin: [T, R], R <= D: only the first R dimensions rotate.

    y = x cos + r(x) sin with r(a, b) = (-b, a).
    """
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = rotary.chunk(2, -1)
    return torch.cat([rotary * cos + torch.cat([-b, a], -1) * sin, rest], -1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Inverse of `rotate`: x = (y cos - r(y) sin) / (cos^2 + sin^2).

    The divisor is not 1 where RoPE scales attention (YaRN).
    """
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = rotary.chunk(2, -1)
    unrotated = (rotary * cos - torch.cat([-b, a], -1) * sin) / (cos * cos + sin * sin)
    return torch.cat([unrotated, rest], -1)
