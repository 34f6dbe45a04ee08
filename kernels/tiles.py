# ruff: noqa: N803, N806
"""What the kernels over pages share: the loop over tiles of slots, its sizes and its launch options.

Keys can be wider than values. Their product with the query is then the sum of two, over the first channels, as many as
values have, and over the rest. The values of latent attention are the first channels of its keys, and are read once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lceval.kernels.launch import BLOCK_G, NEEDS_MORE_WARPS, OPTIONS, jit, tl
from lceval.kernels.paged import PAGE
from lceval.kernels.softmax import log2_logits


@jit()
def e4m3(codes):  # type: ignore[no-untyped-def]
    """float32 of 8-bit floats, by bits: as the upper half of a float16, whose exponent has another bias."""
    bits = codes.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@jit()
def attend_tiles(  # type: ignore[no-untyped-def]
    q, q_rest, m, l, acc, k_ptr, v_ptr, page_ptr, first, last, low, n, scaling,  # noqa: E741
    stride_kp, stride_ks, stride_vp, stride_vs,
    D: tl.constexpr, D_PAD: tl.constexpr, REST: tl.constexpr, REST_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_S: tl.constexpr, FP8: tl.constexpr, LATENT: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Continue a softmax m [G] (log2), l [G], acc [G, E] of queries q [G, D] over the tiles from `first` to `last`.

    The slots from `low` to `n` count; every tile has one. Their pages are listed at `page_ptr`.
    """
    TILES: tl.constexpr = PAGE // BLOCK_S
    offs_d = tl.arange(0, D_PAD)
    offs_e = tl.arange(0, E_PAD)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < D
    mask_e = offs_e < E
    if REST:
        offs_r = D + tl.arange(0, REST_PAD)
        mask_r = offs_r < D + REST
    # The page id is loaded one tile ahead: loaded in the tile that uses it, it would be a second level of loads to
    # pipeline, which leaves one tile in flight at num_stages=3 instead of two.
    page = tl.load(page_ptr + first // TILES, mask=first < last, other=0).to(tl.int64)
    for tile in range(first, last):
        slot = tile * BLOCK_S + offs_s
        row = (tile % TILES * BLOCK_S + offs_s)[:, None]
        # Past the last slot the page is uninitialised; a NaN there is not removed by a weight of zero.
        mask_s = (slot >= low) & (slot < n)
        key = k_ptr + page * stride_kp + row * stride_ks
        k = tl.load(key + offs_d[None, :], mask=mask_s[:, None] & mask_d[None, :], other=0)
        if FP8:
            k = e4m3(k).to(q.dtype)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        if REST:
            k_rest = tl.load(key + offs_r[None, :], mask=mask_s[:, None] & mask_r[None, :], other=0)
            if FP8:
                k_rest = e4m3(k_rest).to(q.dtype)
            products = tl.dot(q_rest, tl.trans(k_rest), products, input_precision="ieee")
        if LATENT:
            v = k
        else:
            value = v_ptr + page * stride_vp + row * stride_vs
            v = tl.load(value + offs_e[None, :], mask=mask_s[:, None] & mask_e[None, :], other=0)
            if FP8:
                v = e4m3(v).to(q.dtype)
        scores = tl.where(mask_s[None, :], log2_logits(products, scaling, CAP), float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
        page = tl.load(page_ptr + (tile + 1) // TILES, mask=tile + 1 < last, other=0).to(tl.int64)
    return m, l, acc


def constants(dtype: torch.dtype, head_dim: int, value_dim: int) -> dict[str, int]:
    """The sizes of a kernel over pages.

    A 16-bit tile of K or V is 16 KiB at head_dim 128 and 256. Two of each in flight take 70 KiB of shared memory: three
    programs per multiprocessor on an H100, two on an A100, one on a consumer card. Float32 uses no tensor cores here
    ("ieee", not tf32) and unrolls into FMAs: 32 slots at head_dim 128 spilled.
    """
    D = min(head_dim, value_dim)
    sizes = {"D": D, "REST": head_dim - D, "E": value_dim}
    sizes |= {f"{name}_PAD": padded(size) for name, size in sizes.items()}
    BLOCK_S = 16 if dtype == torch.float32 else 64 if sizes["D_PAD"] <= 128 else 32
    return sizes | {"PAGE": PAGE, "BLOCK_G": BLOCK_G, "BLOCK_S": BLOCK_S}


def padded(size: int) -> int:
    """The smallest power of two that is not below size, at least 16, as tensor cores need it; 0 of 0."""
    return max(16, 1 << (size - 1).bit_length()) if size else 0


def options(dtype: torch.dtype, constants: Mapping[str, float]) -> dict[str, int | bool]:
    """The launch options of a kernel over pages.

    Keys wider than values spilled with four warps in float32 and over codes; with three stages a tile of latents in
    float32 exceeds the shared memory of consumer cards.
    """
    wide, exact = constants["REST"] > 0, dtype == torch.float32
    large = wide or (constants["FP8"] and constants["D_PAD"] == 256)
    warps = 8 if (wide and (exact or constants["FP8"])) or (large and NEEDS_MORE_WARPS) else 4
    return OPTIONS | {"num_warps": warps, "num_stages": 2 if wide and exact else 3}


def kinds(cap: float | None = None, latent: bool = False, codes: bool = False) -> dict[str, float]:
    """The compile-time arguments that say how a kernel reads and weighs."""
    return {"CAP": cap or 0.0, "LATENT": int(latent), "FP8": int(codes)}
