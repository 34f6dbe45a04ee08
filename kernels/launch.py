"""Shared by all launchers: triton if installed, whether it compiles or interprets, and common limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language
except ImportError:  # there is no wheel for macOS; the references run everywhere
    triton = language = None

tl: Any = language

# Read once, since triton decides at a kernel's definition whether it compiles or interprets it.
AVAILABLE = triton is not None
INTERPRETED = AVAILABLE and bool(triton.knobs.runtime.interpret)

# Before 3.8, Triton's code for a few kernels spills, or takes too many registers, with four warps.
NEEDS_MORE_WARPS = AVAILABLE and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(16, 257, 16)
# Channels of a latent and of the rotated key beside it (multi-head latent attention).
LATENT_DIMS, ROTATED_DIMS = range(16, 513, 16), range(16, 65, 16)
# Rows of one tensor-core tile. More query heads per KV head are split over several programs.
BLOCK_G = 16
MAX_SPLITS = 128
OPTIONS: dict[str, int | bool] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def jit(*plain: str) -> Callable[[Any], Any]:
    """`triton.jit`, or the identity without triton.

    Args:
        plain: arguments that are not specialised on, since their values differ between contexts, layers or models.
            Names that a function does not have are ignored.
    """

    def decorate(fn: Any) -> Any:
        names = [name for name in plain if name in fn.__code__.co_varnames]
        return triton.jit(fn, do_not_specialize=names) if AVAILABLE else fn

    return decorate


def runs_kernels(x: Tensor, what: str) -> bool:
    """Whether `x` is for the kernels: on CUDA, or anywhere in the interpreter. Otherwise the reference runs.

    Raises:
        RuntimeError: a CUDA tensor without triton installed; `what` is named.
    """
    kernels = x.is_cuda or INTERPRETED
    if kernels and not AVAILABLE:
        raise RuntimeError(f"{what} on {x.device} needs the package triton, which is not installed")
    return kernels


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors as a kernel can take them: the interpreter represents bfloat16 as raw 16-bit integers and multiplies
    those silently, so there they become float32."""
    return [x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x for x in tensors]


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of the tensor's device; 1 on a CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
