"""Selects the decode kernel for a layer of a compressed context: full precision, quantized or sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from lceval.kernels import decode
from lceval.kernels.bits import Bits
from lceval.kernels.bounds import Bounds
from lceval.kernels.dense import folded, unfolded
from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.gather_decode import decode_selected
from lceval.kernels.launch import BLOCK_G
from lceval.kernels.paged import KV, PagedKV, is_view
from lceval.kernels.quant import QuantKV
from lceval.kernels.quant_decode import decode_quantised
from lceval.kernels.rotated import Rotated, rotate
from lceval.kernels.select import Selective

# Queries over one KV head in one launch: CUDA's grids have at most 65,535 programs in that direction.
MAX_ROWS = 65_535 * BLOCK_G


def attend(q: Tensor, kv: KV, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """As `KV.attend`, by the kernels where they have the layout, whatever the number of query tokens.

    All queries over the same keys, of every row and token, are one group of query heads, so a question of any length
    takes as many launches as a decoding step: at most two in full precision, four over codes. In PyTorch run sparse
    attention of several tokens, over quantized slots and by faiss, quantized latents, and widths that the kernels do
    not have (`decode.fits`).

    Args:
        q: [B', H, T, D], B' = B or a multiple: consecutive rows share a sequence of `kv`.

    Returns:
        o [B', H, T, E] and lse [B', H, T] float32.
    """
    if isinstance(kv, Rotated):
        o, lse = attend(rotate(q), kv.kv, scaling, cap)
        return rotate(o), lse
    pages = kv.kv if isinstance(kv, Fp8KV) else kv
    latent = isinstance(pages, PagedKV) and is_view(pages.k, pages.v)
    if not decode.fits(q.shape[3], kv.value_dim, latent=latent):
        return kv.attend(q, scaling, cap)
    if isinstance(pages, PagedKV | QuantKV):
        sequences, kv_heads = kv.lens.shape
        most = max(1, MAX_ROWS * kv_heads * sequences // (q.shape[0] * q.shape[1]))
        if q.shape[2] > most:
            parts = [attend(part, kv, scaling, cap) for part in torch.split(q, most, 2)]
            o, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
            return o, lse
        rows = folded(q, sequences, kv_heads).view(sequences, -1, q.shape[3])
        if isinstance(pages, QuantKV):
            o, lse = decode_quantised(rows, pages, scaling, cap)
        else:
            rows = kv.scaled(rows) if isinstance(kv, Fp8KV) else rows
            o, lse = decode.decode(rows, pages.k, pages.v, pages.table, pages.lens, scaling, cap)
            o = kv.unscaled(o) if isinstance(kv, Fp8KV) else o
        o, lse = (x.reshape(sequences * kv_heads, -1, x.shape[-1]) for x in (o, lse[..., None]))
        return unfolded(o, q.shape, kv_heads), unfolded(lse, q.shape, kv_heads)[..., 0]
    if (
        isinstance(kv, Selective)
        and isinstance(kv.kv, PagedKV)
        and isinstance(kv.index, Bits | Bounds)
        and q.shape[2] == 1
    ):
        o, lse = decode_selected(q[:, :, 0].contiguous(), kv, scaling, cap)
        return o[:, :, None], lse[:, :, None]
    return kv.attend(q, scaling, cap)
