# ruff: noqa: N803, N806
"""Decode attention over a paged cache whose KV heads keep different counts (split-KV flash-decoding).

o_h = softmax(scaling * q_h K^T) V over the kept slots of query head h's KV head. The slots of a KV head are in the
pages listed in its row of `table`; the first `lens[b, h]` of them are valid. One program processes one share of one
KV head's pages for all its G = H // Hkv query heads, so K and V cross the memory bus once, and writes a partial o_i
with its log-sum-exp lse_i. Shares are merged by

    lse = log(sum_i exp(lse_i)),   o = sum_i exp(lse_i - lse) o_i.

The device computes the shares from each head's page count, so a launch never waits for `lens`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from lceval.kernels import fp8, merge
from lceval.kernels.launch import (
    BLOCK_G,
    DTYPES,
    HEAD_DIMS,
    MAX_SPLITS,
    OPTIONS,
    jit,
    multiprocessors,
    runs_kernels,
    tl,
    widened,
)
from lceval.kernels.paged import PAGE
from lceval.kernels.variant import TORCH, Variant, head_dims, tile_limits, with_single


def reference(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The definition, in float32. Every test compares against this, never against the kernel.

    Args:
        q: [B, H, D], one query token per sequence, after RoPE.
        k, v: [P, PAGE, D], the layer's pool of key pages and of value pages; uint8 are codes of kernels/fp8.py.
        table: [B, Hkv, M] int32, page ids of each KV head, in order.
        lens: [B, Hkv] int32, kept slots of each KV head (0 is legal).
        scaling: factor on q K^T, usually D ** -0.5.

    Returns:
        o [B, H, D] float32 and lse [B, H] float32 (natural log; zeros and -inf where lens == 0).
    """
    B, H, D = q.shape
    G = H // table.shape[1]
    k, v = (fp8.decode(x) if x.dtype == torch.uint8 else x for x in (k, v))
    o = torch.zeros(B, H, D, dtype=torch.float32, device=q.device)
    lse = torch.full((B, H), -math.inf, dtype=torch.float32, device=q.device)
    # A loop, because heads keep different counts: a batch padded to the longest head took 0.9 times as long on two
    # CPU cores if three heads keep 600 slots each, but 5 times as long if they keep 6000, 600 and 100.
    for b, counts in enumerate(lens.tolist()):
        for h, n in enumerate(counts):
            if n > 0:
                pages = table[b, h, : -(-n // PAGE)]
                heads = slice(h * G, (h + 1) * G)
                scores = scaling * (q[b, heads].float() @ k[pages].flatten(0, 1)[:n].float().T)
                lse[b, heads] = scores.logsumexp(-1)
                o[b, heads] = scores.softmax(-1) @ v[pages].flatten(0, 1)[:n].float()
    return o, lse


# G is an argument, so that one binary serves every G. The table grows with a sequence: specialising on its strides
# would recompile during a generation.
_jit = jit("G", "kv_heads", "stride_tb", "stride_th", "stride_lb", "stride_lh", "splits")


@_jit
def e4m3(codes):  # type: ignore[no-untyped-def]
    """float32 of 8-bit floats, by bits: as the upper half of a float16, whose exponent has another bias."""
    bits = codes.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@_jit
def split_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, table_ptr, lens_ptr, o_ptr, lse_ptr, scaling, G, kv_heads,
    stride_qb, stride_qh, stride_kp, stride_ks, stride_vp, stride_vs,
    stride_tb, stride_th, stride_lb, stride_lh,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """Attend to one share of one KV head's pages. o: [B, H, splits, D], lse: [B, H, splits], contiguous."""
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    TILES: tl.constexpr = PAGE // BLOCK_S

    # 64-bit offsets: 2**18 pages of 64 x 128 are 2**31 elements.
    bh = tl.program_id(0).to(tl.int64)
    b = bh // kv_heads
    h = bh % kv_heads
    split = tl.program_id(1)
    splits = tl.num_programs(1)

    n = tl.load(lens_ptr + b * stride_lb + h * stride_lh)
    pages = tl.cdiv(n, PAGE)
    first = split * pages // splits * TILES
    # Every tile of [first, last) has a kept slot: m is finite from the first tile on.
    last = tl.minimum((split + 1) * pages // splits * TILES, tl.cdiv(n, BLOCK_S))

    offs_g = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, D_PAD)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < D
    mask_q = (offs_g < G)[:, None] & mask_d[None, :]
    q_row = q_ptr + b * stride_qb + (h * G + offs_g) * stride_qh
    q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask_q, other=0.0)

    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_G, D_PAD], tl.float32)
    page_ptr = table_ptr + b * stride_tb + h * stride_th
    # The page id is loaded one tile ahead: loaded in the tile that uses it, it would be a second level of loads to
    # pipeline, which leaves one tile in flight at num_stages=3 instead of two.
    page = tl.load(page_ptr + first // TILES, mask=first < last, other=0).to(tl.int64)
    for tile in range(first, last):
        slot = tile * BLOCK_S + offs_s
        row = (tile % TILES * BLOCK_S + offs_s)[:, None]
        # Past the last slot the page is uninitialised; a NaN there is not removed by a weight of zero.
        mask_s = slot < n
        mask = mask_s[:, None] & mask_d[None, :]
        k = tl.load(k_ptr + page * stride_kp + row * stride_ks + offs_d[None, :], mask=mask, other=0)
        v = tl.load(v_ptr + page * stride_vp + row * stride_vs + offs_d[None, :], mask=mask, other=0)
        if FP8:
            k = e4m3(k).to(q.dtype)
            v = e4m3(v).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scaling * LOG2E)
        scores = tl.where(mask_s[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
        page = tl.load(page_ptr + (tile + 1) // TILES, mask=tile + 1 < last, other=0).to(tl.int64)

    # A share without slots writes zeros and -inf, which have weight 0 in the merge.
    empty = last <= first
    l = tl.where(empty, 1.0, l)  # noqa: E741
    out = (bh * G + offs_g) * splits + split
    tl.store(lse_ptr + out, tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2), mask=offs_g < G)
    o = (acc / l[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + out[:, None] * D + offs_d[None, :], o, mask=mask_q)


def split_constants(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """The compile-time arguments of `split_kernel`; with `OPTIONS` they define the AOT variants.

    A 16-bit tile of K or V is 16 KiB at head_dim 128 and 256. Two of each in flight take 70 KiB of shared memory: three
    programs per multiprocessor on an H100, two on an A100, one on a consumer card. Float32 uses no tensor cores here
    ("ieee", not tf32) and unrolls into FMAs: 32 slots at head_dim 128 spilled.
    """
    D_PAD = 1 << (head_dim - 1).bit_length()
    BLOCK_S = 16 if dtype == torch.float32 else 64 if D_PAD <= 128 else 32
    return {"D": head_dim, "D_PAD": D_PAD, "PAGE": PAGE, "BLOCK_G": BLOCK_G, "BLOCK_S": BLOCK_S}


def choose_splits(rows: int, pages: int, multiprocessors: int) -> int:
    """Number of shares per KV head, from 1 to `MAX_SPLITS`.

    Four programs per multiprocessor, so that short heads leave room for long ones; at least two pages per program, so
    that writing and reading float32 partials is at most 6% of K and V (16-bit, G = 4).

    Args:
        rows: programs per share, B * Hkv * ceil(G / BLOCK_G).
        pages: maximum pages of a head, M; reading lens itself would wait for the device.
        multiprocessors: number of multiprocessors of the device.
    """
    return max(1, min(-(-4 * multiprocessors // rows), pages // 2, MAX_SPLITS))


def decode(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, scaling: float, *, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one query token per sequence over the kept slots of a paged, ragged cache.

    CUDA tensors run the kernels, without waiting for the device; others run `reference`, or the kernels if
    TRITON_INTERPRET=1 was set before the import. No gradient flows through the kernels.

    Args:
        q: [B, H, D] float16, bfloat16 or float32, D a multiple of 16 up to 256, any G = H // Hkv.
        k, v: [P, PAGE, D] in q's dtype, or uint8 (codes of kernels/fp8.py, without their scales), rows contiguous.
        table: [B, Hkv, M] int32; page ids must lie in [0, P) up to each head's last used page.
        lens: [B, Hkv] int32 in [0, M * PAGE]; checked if lens is on the host.
        scaling: factor on q K^T, usually D ** -0.5.
        splits: number of shares per KV head; None chooses it from M and the device.

    Returns:
        o [B, H, D] in q's dtype and lse [B, H] float32 (natural log; zeros and -inf where lens == 0).

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    _check(q, k, v, table, lens, splits)
    if not runs_kernels(q, "decode"):
        o, lse = reference(q, k, v, table, lens, scaling)
        return o.to(q.dtype), lse
    if splits is None:
        B, Hkv, M = table.shape
        splits = choose_splits(B * Hkv * -(-(q.shape[1] // Hkv) // BLOCK_G), M, multiprocessors(q))
    dtype = q.dtype
    q, k, v = widened(q, k, v)
    o, lse = _launch(q, k, v, table, lens, scaling, splits)
    return o.to(dtype), lse


def _launch(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, scaling: float, splits: int
) -> tuple[Tensor, Tensor]:
    B, Hkv = table.shape[:2]
    G, D = q.shape[1] // Hkv, q.shape[2]
    part_o, part_lse = merge.outputs(q, splits)
    strides = [stride for t in (q, k, v, table, lens) for stride in t.stride()[:2]]
    constants = split_constants(q.dtype, D) | {"FP8": int(k.dtype == torch.uint8)}
    with torch.cuda.device(q.get_device()):
        split_kernel[(B * Hkv, splits, -(-G // BLOCK_G))](
            q, k, v, table, lens, part_o, part_lse, scaling, G, Hkv, *strides, **constants, **OPTIONS
        )
    return (part_o, part_lse) if splits == 1 else merge.launch(part_o, part_lse, None, q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, splits: int | None) -> None:
    check_cache(q, k, v, splits, pools=(torch.uint8,), table=table, lens=lens)
    B, H, _ = q.shape
    Hkv, M = table.shape[1:]
    if table.dtype != torch.int32 or lens.dtype != torch.int32:
        raise ValueError(f"table and lens must be torch.int32, got {table.dtype} and {lens.dtype}")
    if table.shape[0] != B or not Hkv or H % Hkv:
        raise ValueError(f"table must be [{B}, Hkv, M] with Hkv a divisor of {H}, got {tuple(table.shape)}")
    if lens.shape != table.shape[:2]:
        raise ValueError(f"lens must be {tuple(table.shape[:2])} as table, got {tuple(lens.shape)}")
    if lens.device.type == "cpu" and lens.numel():
        low, high = lens.aminmax()
        if low < 0 or high > M * PAGE:
            raise ValueError(f"lens must be 0 to {M * PAGE}, table {tuple(table.shape)}, got {lens.tolist()}")


def check_cache(
    q: Tensor, k: Tensor, v: Tensor, splits: int | None, pools: tuple[torch.dtype, ...] = (), **indices: Tensor
) -> None:
    """Check queries, pools of pages, the number of splits, and the axes and device of the other arguments.

    Args:
        pools: dtypes of k and v other than q's.
        indices: by name, with three axes; `lens` has two.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    for name, tensor in {"q": q, "k": k, "v": v, **indices}.items():
        axes = 2 if name == "lens" else 3
        if tensor.ndim != axes:
            raise ValueError(f"{name} must have {axes} axes, got shape {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {tensor.device}")
        if axes == 3 and tensor.stride(2) != 1 and tensor.shape[2] > 1:
            raise ValueError(f"the last axis of {name} must be contiguous, got strides {tensor.stride()}")
    D = q.shape[2]
    if D not in HEAD_DIMS:
        raise ValueError(f"q must be [B, H, D] with D a multiple of 16 up to 256, got {tuple(q.shape)}")
    if q.dtype not in DTYPES or k.dtype != v.dtype or k.dtype not in (q.dtype, *pools):
        raise ValueError(f"q, k, v must share one of {DTYPES}, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[1:] != (PAGE, D) or v.shape != k.shape:
        raise ValueError(f"k and v must be [P, {PAGE}, {D}], got {tuple(k.shape)} and {tuple(v.shape)}")
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits must be 1 to {MAX_SPLITS}, got {splits}")


# 168 registers allow three programs of 128 threads per multiprocessor (65,536 registers).
LIMITS = tile_limits(168, "decode.split")
# bfloat16 stays within 168 here too. Float16 would spill two registers there, so two programs run.
LIMITS |= tile_limits(188, "decode.fp8")


def variants() -> Iterator[Variant]:
    """The specialisations that `decode` uses."""
    for (dtype, dim), codes in product(head_dims(), (False, True)):
        data, f32, i32, stored = f"*{dtype}", "*fp32", "*i32", "*u8" if codes else f"*{dtype}"
        pointers = {"q_ptr": data, "k_ptr": stored, "v_ptr": stored, "table_ptr": i32, "lens_ptr": i32}
        shares = Variant(
            kernel="decode.fp8" if codes else "decode.split",
            name=f"{dtype} D{dim}",
            fn=split_kernel,
            pointers=pointers | {"o_ptr": f32, "lse_ptr": f32},
            floats=("scaling",),
            aligned=("stride_q", "stride_k", "stride_v"),
            constants=split_constants(TORCH[dtype], dim) | {"FP8": int(codes)},
            options=OPTIONS,
        )
        yield from [shares] if codes else with_single(shares)
