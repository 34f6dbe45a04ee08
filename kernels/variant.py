"""The ahead-of-time check's description of a kernel: its specialisations and their resource limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

INSTRUCTIONS = ("LDGSTS", "HMMA", "HGMMA")
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Phi-3 has head_dim 96, Gemma 256, most others 64 or 128. G is an argument and needs no variants. Models run in
# bfloat16: of float16, whose code is the same but for the type of a few instructions, and of float32 one size is gated.
USED_HEAD_DIMS = {"fp16": (128,), "bf16": (64, 96, 128, 256), "fp32": (64,)}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as its launcher would compile it.

    Attributes:
        kernel, name: label of the row; name starts with the dtype.
        fn: the jitted function.
        pointers: Triton type of each pointer argument.
        floats: the arguments that are Python floats; every other one is an int32.
        aligned: prefixes of the int arguments that are multiples of 16 in every cache we build. A launch detects
            that; without this hint the copies of a tile would not be vectorised here.
        constants: compile-time arguments.
        options: num_warps, num_stages and the like.
    """

    kernel: str
    name: str
    fn: Any
    pointers: dict[str, str]
    floats: tuple[str, ...]
    aligned: tuple[str, ...]
    constants: Mapping[str, float]
    options: dict[str, int | bool]


@dataclass(frozen=True)
class Limit:
    """Resource limits of a kernel. `needs`: at least one instruction of each group must be present."""

    registers: int
    shared: int
    needs: tuple[tuple[str, ...], ...] = ()


# HGMMA requires 64 rows, so 16 heads use HMMA.
TENSOR_CORES = (("LDGSTS",), ("HMMA", "HGMMA"))
SHARED = 99 * 1024
"""Maximum shared memory per block on sm_86 and sm_89, in bytes."""


def head_dims() -> Iterator[tuple[str, int]]:
    """Every dtype and head dimension in use."""
    return ((dtype, dim) for dtype, dims in USED_HEAD_DIMS.items() for dim in dims)


def widths(dim: int, value_dim: int) -> str:
    """The numbers of channels of keys and values in the name of a variant."""
    return f"D{dim}" if dim == value_dim else f"D{dim} E{value_dim}"


def tile_limits(registers: int, *kernels: str) -> dict[tuple[str, str], Limit]:
    """Limits of kernels that stream tiles through tensor cores; float32 uses none, but copies asynchronously too."""
    needs = {"fp16": TENSOR_CORES, "bf16": TENSOR_CORES, "fp32": TENSOR_CORES[:1]}
    return {(kernel, dtype): Limit(registers, SHARED, of) for kernel in kernels for dtype, of in needs.items()}


def with_single(shares: Variant) -> Iterator[Variant]:
    """A kernel that writes float32 shares, and its launch with a single share, which writes the result itself."""
    yield shares
    dtype = shares.name.split()[0]
    if dtype != "fp32":
        yield replace(shares, name=f"{shares.name} single", pointers=shares.pointers | {"o_ptr": f"*{dtype}"})
