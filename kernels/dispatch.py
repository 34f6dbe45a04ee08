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


def attend(q: Tensor, kv: KV, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """As `KV.attend`, by a kernel for one query token and a layout that has one.

    The rest runs in PyTorch: several tokens (prefill of a question), sparse attention over quantized slots, faiss,
    quantized latents, and widths that the kernels do not have (`decode.fits`).

    Args:
        q: [R, H, T, D]; the rows share the one sequence of `kv`.

    Returns:
        o [R, H, T, E] and lse [R, H, T] float32.
    """
    if isinstance(kv, Rotated):
        o, lse = attend(rotate(q), kv.kv, scaling, cap)
        return rotate(o), lse
    pages = kv.kv if isinstance(kv, Fp8KV) else kv
    latent = isinstance(pages, PagedKV) and decode.is_latent(pages.k, pages.v)
    if q.shape[2] != 1 or not decode.fits(q.shape[3], kv.value_dim, latent=latent):
        return kv.attend(q, scaling, cap)
    one, rows = q[:, :, 0].contiguous(), q.shape[0]
    if isinstance(pages, PagedKV):
        table, lens = pages.table.expand(rows, -1, -1), pages.lens.expand(rows, -1)
        scaled = kv.scaled(one) if isinstance(kv, Fp8KV) else one
        o, lse = decode.decode(scaled, pages.k, pages.v, table, lens, scaling, cap)
        o = kv.unscaled(o) if isinstance(kv, Fp8KV) else o
    elif isinstance(kv, QuantKV):
        o, lse = decode_quantised(one, kv, scaling, cap)
    elif isinstance(kv, Selective) and isinstance(kv.kv, PagedKV) and isinstance(kv.index, Bits | Bounds):
        o, lse = decode_selected(one, kv, scaling, cap)
    else:
        return kv.attend(q, scaling, cap)
    return o[:, :, None], lse[:, :, None]
