"""Selects the decode kernel for a layer of a compressed context: full precision, quantized or sparse."""

from __future__ import annotations

from torch import Tensor

from lceval.kernels import decode
from lceval.kernels.bits import Bits
from lceval.kernels.bounds import Bounds
from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.gather_decode import decode_selected
from lceval.kernels.paged import KV, PagedKV
from lceval.kernels.quant import QuantKV
from lceval.kernels.quant_decode import decode_quantised
from lceval.kernels.rotated import Rotated, rotate
from lceval.kernels.select import Selective


def attend(q: Tensor, kv: KV, scaling: float) -> tuple[Tensor, Tensor]:
    """As `KV.attend` without a cap, by a kernel for one query token and a layout that has one.

    The rest runs in PyTorch: several tokens (prefill of a question), sparse attention over quantized slots, faiss.

    Args:
        q: [R, H, T, D]; the rows share the one sequence of `kv`.

    Returns:
        o [R, H, T, D] and lse [R, H, T] float32.
    """
    if isinstance(kv, Rotated):
        o, lse = attend(rotate(q), kv.kv, scaling)
        return rotate(o), lse
    if q.shape[2] != 1:
        return kv.attend(q, scaling)
    one, rows = q[:, :, 0].contiguous(), q.shape[0]
    if isinstance(kv, PagedKV):
        o, lse = decode.decode(one, kv.k, kv.v, kv.table.expand(rows, -1, -1), kv.lens.expand(rows, -1), scaling)
    elif isinstance(kv, Fp8KV):
        codes = kv.kv
        o, lse = decode.decode(
            kv.scaled(one), codes.k, codes.v, codes.table.expand(rows, -1, -1), codes.lens.expand(rows, -1), scaling
        )
        o = kv.unscaled(o)
    elif isinstance(kv, QuantKV):
        o, lse = decode_quantised(one, kv, scaling)
    elif isinstance(kv, Selective) and isinstance(kv.kv, PagedKV) and isinstance(kv.index, Bits | Bounds):
        o, lse = decode_selected(one, kv, scaling)
    else:
        return kv.attend(q, scaling)
    return o[:, :, None], lse[:, :, None]
