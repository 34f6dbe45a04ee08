"""What every launcher shares: triton where it is installed, whether it compiles or interprets, and common limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    from triton import language
except ImportError:  # there is no wheel for macOS; the references work everywhere
    triton = language = None

tl: Any = language

# Read once: triton decides when a kernel is defined whether it will be compiled or interpreted.
AVAILABLE = triton is not None
INTERPRETED = AVAILABLE and bool(triton.knobs.runtime.interpret)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(16, 257, 16)
# The rows of one tensor-core tile. More query heads than that on one KV head go to programs side by side.
BLOCK_G = 16
MAX_SPLITS = 128
OPTIONS: dict[str, int | bool] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def jit(*plain: str) -> Callable[[Any], Any]:
    """`triton.jit`, or nothing without triton.

    Args:
        plain: arguments whose values differ from one context, layer or model to the next: one binary serves them all.
            Those that a function does not have are passed over.
    """

    def decorate(fn: Any) -> Any:
        names = [name for name in plain if name in fn.__code__.co_varnames]
        return triton.jit(fn, do_not_specialize=names) if AVAILABLE else fn

    return decorate
