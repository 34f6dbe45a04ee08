"""Resolve `dtype: auto` on this machine.

bfloat16 halves memory, but a CPU without bfloat16 instructions converts element by element: with AVX2 alone a matrix
product runs at about 1 GFLOP/s, against 50 to 100 in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lceval.training.config import Config


def fast_dtype() -> str:
    """`bfloat16` on CUDA and on CPUs that multiply in it, else `float32`.

    A CPU requires AVX512-BF16 or AMX, and oneDNN must be allowed to use them (`ONEDNN_MAX_CPU_ISA`).
    """
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if instructions and _onednn_multiplies_bfloat16() else "float32"


def resolve(recipe: Config) -> Config:
    """The recipe with `auto` replaced by a dtype."""
    if recipe.model.dtype != "auto":
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": fast_dtype()})})


def _onednn_multiplies_bfloat16() -> bool:
    import torch

    mkldnn: Any = torch.backends.mkldnn
    return bool(mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
