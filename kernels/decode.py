# ruff: noqa: N803, N806
"""Decode attention over a paged cache whose KV heads keep different counts (split-KV flash-decoding).

o_h = softmax(scaling * q_h K^T) V over the kept slots of query head h's KV head, with capped logits if the model has
them. The slots of a KV head are in the pages listed in its row of `table`; the first `lens[b, h]` of them are valid.
One program processes one share of one KV head's pages for all its G = H // Hkv query heads, so K and V cross the memory
bus once, and writes a partial o_i with its log-sum-exp lse_i. Shares are merged by

    lse = log(sum_i exp(lse_i)),   o = sum_i exp(lse_i - lse) o_i.

The device computes the shares from each head's page count, so a launch never waits for `lens`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from lceval.kernels import fp8, merge, tiles
from lceval.kernels.launch import (
    BLOCK_G,
    DTYPES,
    HEAD_DIMS,
    LATENT_DIMS,
    MAX_SPLITS,
    ROTATED_DIMS,
    jit,
    multiprocessors,
    runs_kernels,
    tl,
    widened,
)
from lceval.kernels.paged import PAGE, is_view
from lceval.kernels.softmax import capped
from lceval.kernels.variant import TORCH, Variant, head_dims, tile_limits, widths, with_single


def reference(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, scaling: float, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, in float32. Every test compares against this, never against the kernel.

    Args:
        q: [B, H, D], one query token per sequence, after RoPE.
        k, v: [P, PAGE, D] and [P, PAGE, E], the layer's pool of key pages and of value pages; uint8 are codes of
            kernels/fp8.py.
        table: [B, Hkv, M] int32, page ids of each KV head, in order.
        lens: [B, Hkv] int32, kept slots of each KV head (0 is legal).
        scaling, cap: as in `Softmax`.

    Returns:
        o [B, H, E] float32 and lse [B, H] float32 (natural log; zeros and -inf where lens == 0).
    """
    B, H, _ = q.shape
    G = H // table.shape[1]
    k, v = (fp8.decode(x) if x.dtype == torch.uint8 else x for x in (k, v))
    o = torch.zeros(B, H, v.shape[2], dtype=torch.float32, device=q.device)
    lse = torch.full((B, H), -math.inf, dtype=torch.float32, device=q.device)
    # A loop, because heads keep different counts: a batch padded to the longest head took 0.9 times as long on two
    # CPU cores if three heads keep 600 slots each, but 5 times as long if they keep 6000, 600 and 100.
    for b, counts in enumerate(lens.tolist()):
        for h, n in enumerate(counts):
            if n > 0:
                pages = table[b, h, : -(-n // PAGE)]
                heads = slice(h * G, (h + 1) * G)
                scores = capped(scaling * (q[b, heads].float() @ k[pages].flatten(0, 1)[:n].float().T), cap)
                lse[b, heads] = scores.logsumexp(-1)
                o[b, heads] = scores.softmax(-1) @ v[pages].flatten(0, 1)[:n].float()
    return o, lse


# G is an argument, so that one binary serves every G. The table grows with a sequence: specialising on its strides
# would recompile during a generation.
_jit = jit("G", "kv_heads", "stride_tb", "stride_th", "stride_lb", "stride_lh", "splits")


@_jit
def split_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, table_ptr, lens_ptr, o_ptr, lse_ptr, scaling, G, kv_heads,
    stride_qb, stride_qh, stride_kp, stride_ks, stride_vp, stride_vs,
    stride_tb, stride_th, stride_lb, stride_lh,
    D: tl.constexpr, D_PAD: tl.constexpr, REST: tl.constexpr, REST_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, FP8: tl.constexpr,
    LATENT: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Attend to one share of one KV head's pages. o: [B, H, splits, E], lse: [B, H, splits], contiguous.

    A key has D + REST channels, a value E: the first of the key if LATENT.
    """
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
    offs_e = tl.arange(0, E_PAD)
    mask_d = offs_d < D
    mask_e = offs_e < E
    mask_g = (offs_g < G)[:, None]
    q_row = q_ptr + b * stride_qb + (h * G + offs_g) * stride_qh
    q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask_g & mask_d[None, :], other=0.0)
    if REST:
        offs_r = D + tl.arange(0, REST_PAD)
        mask_r = offs_r < D + REST
        q_rest = tl.load(q_row[:, None] + offs_r[None, :], mask=mask_g & mask_r[None, :], other=0.0)
    else:
        q_rest = q

    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_G, E_PAD], tl.float32)
    page_ptr = table_ptr + b * stride_tb + h * stride_th
    m, l, acc = tiles.attend_tiles(  # noqa: E741
        q, q_rest, m, l, acc, k_ptr, v_ptr, page_ptr, first, last, 0, n, scaling,
        stride_kp, stride_ks, stride_vp, stride_vs,
        D, D_PAD, REST, REST_PAD, E, E_PAD, PAGE, BLOCK_S, FP8, LATENT, CAP,
    )  # fmt: skip

    # A share without slots writes zeros and -inf, which have weight 0 in the merge.
    empty = last <= first
    l = tl.where(empty, 1.0, l)  # noqa: E741
    out = (bh * G + offs_g) * splits + split
    tl.store(lse_ptr + out, tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2), mask=offs_g < G)
    o = (acc / l[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + out[:, None] * E + offs_e[None, :], o, mask=mask_g & mask_e[None, :])


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lens: Tensor,
    scaling: float,
    cap: float | None = None,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token per sequence over the kept slots of a paged, ragged cache.

    CUDA tensors run the kernels, without waiting for the device; others run `reference`, or the kernels if
    TRITON_INTERPRET=1 was set before the import. No gradient flows through the kernels.

    Args:
        q: [B, H, D] float16, bfloat16 or float32, any G = H // Hkv.
        k, v: [P, PAGE, D] and [P, PAGE, E] in q's dtype, or uint8 (codes of kernels/fp8.py, without their scales), rows
            contiguous. D and E are multiples of 16 up to 256; up to 576 and 512 if v is a view of k.
        table: [B, Hkv, M] int32; page ids must lie in [0, P) up to each head's last used page.
        lens: [B, Hkv] int32 in [0, M * PAGE]; checked if lens is on the host.
        scaling, cap: as in `Softmax`.
        splits: number of shares per KV head; None chooses it from M and the device.

    Returns:
        o [B, H, E] in q's dtype and lse [B, H] float32 (natural log; zeros and -inf where lens == 0).

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    _check(q, k, v, table, lens, splits)
    if not runs_kernels(q, "decode"):
        o, lse = reference(q, k, v, table, lens, scaling, cap)
        return o.to(q.dtype), lse
    if splits is None:
        B, Hkv, M = table.shape
        splits = choose_splits(B * Hkv * -(-(q.shape[1] // Hkv) // BLOCK_G), M, multiprocessors(q))
    dtype, latent = q.dtype, is_view(k, v)
    q, k, v = widened(q, k, v)
    o, lse = _launch(q, k, v, table, lens, scaling, cap, latent, splits)
    return o.to(dtype), lse


def _launch(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, scaling: float, cap: float | None, latent: bool,
    splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, Hkv = table.shape[:2]
    G = q.shape[1] // Hkv
    part_o, part_lse = merge.outputs(q, v.shape[2], splits)
    strides = [stride for t in (q, k, v, table, lens) for stride in t.stride()[:2]]
    constants = tiles.constants(q.dtype, q.shape[2], v.shape[2]) | tiles.kinds(cap, latent, k.dtype == torch.uint8)
    chosen = tiles.options(q.dtype, constants)
    with torch.cuda.device(q.get_device()):
        split_kernel[(B * Hkv, splits, -(-G // BLOCK_G))](
            q, k, v, table, lens, part_o, part_lse, scaling, G, Hkv, *strides, **constants, **chosen
        )  # fmt: skip
    return (part_o, part_lse) if splits == 1 else merge.launch(part_o, part_lse, None, q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, splits: int | None) -> None:
    check_cache(q, k, v, splits, pools=(torch.uint8,), latents=True, table=table, lens=lens)
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    splits: int | None,
    pools: tuple[torch.dtype, ...] = (),
    latents: bool = False,
    **indices: Tensor,
) -> None:
    """Check queries, pools of pages, the number of splits, and the axes and device of the other arguments.

    Args:
        pools: dtypes of k and v other than q's.
        latents: whether values can be a view of wide keys.
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
    D, E = q.shape[2], v.shape[2]
    if not fits(D, E, latent=latents and is_view(k, v)):
        raise ValueError(
            f"q must be [B, H, D] with D a multiple of 16 up to 256, got {tuple(q.shape)} and values of {E}"
        )
    if q.dtype not in DTYPES or k.dtype != v.dtype or k.dtype not in (q.dtype, *pools):
        raise ValueError(f"q, k, v must share one of {DTYPES}, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[1:] != (PAGE, D) or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"k and v must be [P, {PAGE}, {D}] and [P, {PAGE}, E], got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits must be 1 to {MAX_SPLITS}, got {splits}")


def fits(head_dim: int, value_dim: int, *, latent: bool = False) -> bool:
    """Whether the kernels have keys and values of these numbers of channels."""
    if latent:
        return value_dim in LATENT_DIMS and head_dim - value_dim in ROTATED_DIMS
    return head_dim in HEAD_DIMS and value_dim in HEAD_DIMS


# 168 registers allow three programs of 128 threads per multiprocessor (65,536 registers).
LIMITS = tile_limits(168, "decode.split")
# bfloat16 stays within 168 here too. Float16 would spill two registers there, so two programs run, up to 255 each.
LIMITS |= tile_limits(192, "decode.fp8")
LIMITS |= tile_limits(255, "decode.latent")


def variants() -> Iterator[Variant]:
    """The specialisations that `decode` uses."""
    for (dtype, dim), codes in product(head_dims(), (False, True)):
        shares = split_variant(dtype, dim, dim, codes=codes)
        yield from [shares] if codes else with_single(shares)
    # Gemma 2; MiMo-V2; DeepSeek-V3.
    yield split_variant("bf16", 128, 128, cap=50.0)
    yield split_variant("bf16", 256, 256, cap=50.0)
    yield split_variant("bf16", 192, 128)
    yield split_variant("bf16", 576, 512, latent=True)
    yield split_variant("bf16", 576, 512, latent=True, codes=True)
    yield split_variant("fp32", 576, 512, latent=True)


def split_variant(
    dtype: str, dim: int, value_dim: int, *, cap: float | None = None, latent: bool = False, codes: bool = False
) -> Variant:
    """`split_kernel` for one dtype and one kind of keys and values."""
    data, f32, i32, stored = f"*{dtype}", "*fp32", "*i32", "*u8" if codes else f"*{dtype}"
    pointers = {"q_ptr": data, "k_ptr": stored, "v_ptr": stored, "table_ptr": i32, "lens_ptr": i32}
    constants = tiles.constants(TORCH[dtype], dim, value_dim) | tiles.kinds(cap, latent, codes)
    return Variant(
        kernel="decode.latent" if latent else "decode.fp8" if codes else "decode.split",
        name=f"{dtype} {widths(dim, value_dim)}{' cap' if cap else ''}{' fp8' if latent and codes else ''}",
        fn=split_kernel,
        pointers=pointers | {"o_ptr": f32, "lse_ptr": f32},
        floats=("scaling",),
        aligned=("stride_q", "stride_k", "stride_v"),
        constants=constants,
        options=tiles.options(TORCH[dtype], constants),
    )
