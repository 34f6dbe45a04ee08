# ruff: noqa: N803, N806
"""Decode attention over the slots selected by an index, and a whole step of sparse attention.

o_h = softmax(scaling * q_h K_sel^T) V_sel, as `decode`, but of a KV head with more than `budget` slots only the chosen
units of `unit` consecutive slots are read. A head within the budget is read completely by the same launch: its i-th
slot is i, otherwise chosen[i // unit] * unit + i % unit. Slot s is row s % PAGE of page table[s // PAGE]. Shares of a
head's slots are merged as in `decode`.

`decode_selected` runs a whole step: scores from the index (`scan`), the best units (`topk`), attention over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lceval.kernels import merge, tiles
from lceval.kernels.bits import Bits
from lceval.kernels.bounds import Bounds
from lceval.kernels.decode import check_cache, choose_splits
from lceval.kernels.launch import BLOCK_G, NEEDS_MORE_WARPS, jit, multiprocessors, runs_kernels, tl, widened
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.scan import scan
from lceval.kernels.select import Selective
from lceval.kernels.softmax import capped, log2_logits
from lceval.kernels.topk import top_indices
from lceval.kernels.variant import TORCH, Variant, head_dims, tile_limits, widths, with_single


def reference(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, chosen: Tensor, unit: int, budget: int,
    scaling: float, cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, in float32. Every test compares against this, never against the kernel.

    Args:
        q: [B', H, D], one query token per row; rows b' of B' / B share sequence b' // (B' / B).
        k, v: [P, PAGE, D] and [P, PAGE, E], the layer's pool of key pages and of value pages.
        table: [B, Hkv, M] int32, page ids of each KV head, in order.
        lens: [B, Hkv] int32, kept slots of each KV head (0 is legal).
        chosen: [B', Hkv, C] int32, units to read of each head above the budget; -1 for none.
        unit: consecutive slots per unit; a head's last unit may be shorter.
        budget: heads with at most this many slots are read completely.
        scaling, cap: as in `Softmax`.

    Returns:
        o [B', H, E] float32 and lse [B', H] float32 (natural log; zeros and -inf over an empty head).
    """
    rows, H, _ = q.shape
    B, Hkv = lens.shape
    G = H // Hkv
    o = torch.zeros(rows, H, v.shape[2], dtype=torch.float32, device=q.device)
    lse = torch.full((rows, H), -math.inf, dtype=torch.float32, device=q.device)
    for row in range(rows):
        b = row // (rows // B)
        for h, n in enumerate(lens[b].tolist()):
            if n == 0:
                continue
            slots = torch.arange(n, device=q.device)
            if n > budget:
                slots = (chosen[row, h].long()[:, None] * unit + torch.arange(unit, device=q.device)).flatten()
                slots = slots[(slots >= 0) & (slots < n)]
            page, row_in_page = table[b, h, slots // PAGE].long(), slots % PAGE
            heads = slice(h * G, (h + 1) * G)
            scores = capped(scaling * (q[row, heads].float() @ k[page, row_in_page].float().T), cap)
            lse[row, heads] = scores.logsumexp(-1)
            o[row, heads] = scores.softmax(-1) @ v[page, row_in_page].float()
    return o, lse


_jit = jit("G", "shared", "kv_heads", "budget", "unit", "count", "stride_tb", "stride_th")


@_jit
def gather_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, table_ptr, lens_ptr, chosen_ptr, o_ptr, lse_ptr, scaling,
    G, shared, kv_heads, budget, unit, count,
    stride_qb, stride_qh, stride_kp, stride_ks, stride_vp, stride_vs, stride_tb, stride_th,
    D: tl.constexpr, D_PAD: tl.constexpr, REST: tl.constexpr, REST_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, SAME: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Attend to one share of the slots read of one KV head. o: [B', H, splits, E], lse: [B', H, splits], contiguous.

    A key has D + REST channels, a value E. SAME: whether K and V have the same strides and channels.
    """
    LN2: tl.constexpr = 0.6931471805599453

    # 64-bit offsets: 2**18 pages of 64 x 128 are 2**31 elements.
    bh = tl.program_id(0).to(tl.int64)
    b = bh // kv_heads
    h = bh % kv_heads
    split = tl.program_id(1)
    splits = tl.num_programs(1)

    sequence = b // shared
    n = tl.load(lens_ptr + sequence * kv_heads + h)
    whole = n <= budget
    listed = tl.where(whole, 0, count * unit)
    reads = tl.where(whole, n, listed)
    tiles = tl.cdiv(reads, BLOCK_S)
    first = split * tiles // splits
    last = (split + 1) * tiles // splits

    offs_g = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, D_PAD)
    offs_e = tl.arange(0, E_PAD)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < D
    mask_e = offs_e < E
    mask_g = (offs_g < G)[:, None]
    q_row = q_ptr + b * stride_qb + (h * G + offs_g) * stride_qh
    q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask_g & mask_d[None, :], other=0.0)
    if REST:
        offs_r = D + tl.arange(0, REST_PAD)
        mask_r = offs_r < D + REST
        q_rest = tl.load(q_row[:, None] + offs_r[None, :], mask=mask_g & mask_r[None, :], other=0.0)

    # A finite floor: a tile without slots (the missing end of a short last unit) gives no NaN and has no weight.
    m = tl.full([BLOCK_G], -3.0e38, tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_G, E_PAD], tl.float32)
    chosen_ptr += bh * count
    page_ptr = table_ptr + sequence * stride_tb + h * stride_th
    for tile in range(first, last):
        i = tile * BLOCK_S + offs_s
        nth = i // unit
        begin = tl.load(chosen_ptr + nth, mask=i < listed, other=0)
        slot = i + tl.where(whole, 0, begin - nth) * unit
        # Unsigned comparison, so that a negative slot is past the end.
        mask_s = (i < reads) & (slot.to(tl.uint32, bitcast=True) < n.to(tl.uint32, bitcast=True))
        page = tl.load(page_ptr + slot // PAGE, mask=mask_s, other=0).to(tl.int64)
        key = (page * stride_kp + slot % PAGE * stride_ks)[:, None]
        at = key + offs_d[None, :]
        mask = mask_s[:, None] & mask_d[None, :]
        k = tl.load(k_ptr + at, mask=mask, other=0.0)
        if SAME:  # saves a set of 64-bit addresses
            v = tl.load(v_ptr + at, mask=mask, other=0.0)
        else:
            value = v_ptr + (page * stride_vp + slot % PAGE * stride_vs)[:, None]
            v = tl.load(value + offs_e[None, :], mask=mask_s[:, None] & mask_e[None, :], other=0.0)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        if REST:
            k_rest = tl.load(k_ptr + key + offs_r[None, :], mask=mask_s[:, None] & mask_r[None, :], other=0.0)
            products = tl.dot(q_rest, tl.trans(k_rest), products, input_precision="ieee")
        scores = tl.where(mask_s[None, :], log2_logits(products, scaling, CAP), float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    # A share without slots writes zeros and -inf, which have weight 0 in the merge.
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)  # noqa: E741
    out = (bh * G + offs_g) * splits + split
    tl.store(lse_ptr + out, tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2), mask=offs_g < G)
    o = (acc / l[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + out[:, None] * E + offs_e[None, :], o, mask=mask_g & mask_e[None, :])


# Unit, page and row of a slot are three dependent loads: with four stages each is one stage ahead of the next, and one
# tile of K and V is in flight.
OPTIONS: dict[str, int | bool] = {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": True}


def gather_options(dtype: torch.dtype, head_dim: int) -> dict[str, int | bool]:
    """The launch options of `gather_kernel`: float32 at head_dim 128 spilled with four warps."""
    more = dtype == torch.float32 or (NEEDS_MORE_WARPS and head_dim > 128)
    return OPTIONS | {"num_warps": 8 if more else 4}


def gather_constants(dtype: torch.dtype, head_dim: int, value_dim: int) -> dict[str, int]:
    """The sizes of `gather_kernel`: `decode`'s, but 16 KiB per tile also at head_dim 64.

    A tile of 64 slots at head_dim 64 spilled on an H100, and put half as many bytes in flight.
    """
    constants = tiles.constants(dtype, head_dim, value_dim)
    return constants | ({"BLOCK_S": 128} if dtype != torch.float32 and constants["D_PAD"] <= 64 else {})


def gather_decode(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, chosen: Tensor, unit: int, budget: int,
    scaling: float, cap: float | None = None, *, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of one query token per row over the chosen units of every KV head above the budget.

    CUDA tensors run the kernels, without waiting for the device; others run `reference`, or the kernels if
    TRITON_INTERPRET=1 was set before the import. No gradient flows through the kernels.

    Args:
        q: [B', H, D] float16, bfloat16 or float32; B' a multiple of B.
        k, v: [P, PAGE, D] and [P, PAGE, E] in q's dtype, rows contiguous; D and E are multiples of 16 up to 256.
        table: [B, Hkv, M] int32; page ids must lie in [0, P) up to each head's last used page.
        lens: [B, Hkv] int32 in [0, M * PAGE], contiguous.
        chosen: [B', Hkv, C] int32, contiguous; -1 and units past a head's end are no slots.
        unit, budget, scaling, cap: as in `reference`.
        splits: number of shares per head; None chooses it from the budget and the device.

    Returns:
        o [B', H, E] in q's dtype and lse [B', H] float32 (natural log; zeros and -inf over an empty head).

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    _check(q, k, v, table, lens, chosen, unit, budget, splits)
    if not runs_kernels(q, "gather_decode"):
        o, lse = reference(q, k, v, table, lens, chosen, unit, budget, scaling, cap)
        return o.to(q.dtype), lse
    if splits is None:
        rows, Hkv, count = chosen.shape
        programs = rows * Hkv * -(-(q.shape[1] // Hkv) // BLOCK_G)
        reads = min(max(count * unit, budget), table.shape[2] * PAGE)
        splits = choose_splits(programs, -(-reads // PAGE), multiprocessors(q))
    dtype = q.dtype
    q, k, v = widened(q, k, v)
    o, lse = _launch(q, k, v, table, lens, chosen, unit, budget, scaling, cap, splits)
    return o.to(dtype), lse


def _launch(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, chosen: Tensor, unit: int, budget: int,
    scaling: float, cap: float | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, H, D = q.shape
    Hkv, count = chosen.shape[1:]
    G = H // Hkv
    part_o, part_lse = merge.outputs(q, v.shape[2], splits)
    strides = [stride for t in (q, k, v, table) for stride in t.stride()[:2]]
    constants = gather_constants(q.dtype, D, v.shape[2]) | kinds(k.stride() == v.stride() and k.shape == v.shape, cap)
    with torch.cuda.device(q.get_device()):
        gather_kernel[(rows * Hkv, splits, -(-G // BLOCK_G))](
            q, k, v, table, lens, chosen, part_o, part_lse, scaling, G, rows // len(lens), Hkv, budget, unit, count,
            *strides, **constants, **gather_options(q.dtype, D),
        )  # fmt: skip
    return (part_o, part_lse) if splits == 1 else merge.launch(part_o, part_lse, None, q.dtype)


def decode_selected(q: Tensor, selective: Selective, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """`Selective.attend` for one query token per row: scan, select, attend, without waiting for the device.

    CUDA tensors run the kernels; others run `Selective.attend`, or the kernels if TRITON_INTERPRET=1 was set
    before the import. Both estimate logits in float32, but sum in another order: near ties may select different units.

    Args:
        q: [B', H, D] float16, bfloat16 or float32; B' = B or, where B = 1, any number of rows.
        selective: over a `PagedKV`, with an index of `Bits` or `Bounds`.
        scaling, cap: as in `Softmax`; estimates are not capped.

    Returns:
        o [B', H, E] in q's dtype and lse [B', H] float32 (natural log, of what was selected; zeros and -inf over an
        empty head).

    Raises:
        TypeError: another KV layout or index.
        ValueError: a shape, dtype, device or layout that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    kv, index = selective.kv, selective.index
    if not isinstance(kv, PagedKV) or not isinstance(index, Bits | Bounds):
        kinds = f"{type(kv).__name__} by {type(index).__name__}"
        raise TypeError(f"decode_selected reads a PagedKV by Bits or Bounds, got {kinds}")
    if not runs_kernels(q, "decoding"):
        o, lse = selective.attend(q[:, :, None], scaling, cap)
        return o[:, :, 0], lse[:, :, 0]
    scores, sizes = scan(q, index, kv.lens, kv.counts, selective.budget, scaling)
    chosen = top_indices(scores.flatten(0, 1), sizes.flatten(), selective.units).view(*sizes.shape, -1)
    return gather_decode(q, kv.k, kv.v, kv.table, kv.lens, chosen, index.unit, selective.budget, scaling, cap)


def _check(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, chosen: Tensor, unit: int, budget: int,
    splits: int | None,
) -> None:  # fmt: skip
    check_cache(q, k, v, splits, table=table, chosen=chosen, lens=lens)
    rows, H, _ = q.shape
    B, Hkv = lens.shape
    if not B * Hkv or rows % B or H % Hkv:
        raise ValueError(f"lens must be [B, Hkv], B a divisor of {rows}, Hkv of {H}, got {tuple(lens.shape)}")
    if table.shape[:2] != lens.shape:
        raise ValueError(f"table must be [{B}, {Hkv}, M] as lens, got {tuple(table.shape)}")
    if chosen.shape[:2] != (rows, Hkv) or not chosen.shape[2]:
        raise ValueError(f"chosen must be [{rows}, {Hkv}, C], C at least 1, got {tuple(chosen.shape)}")
    if not table.dtype == lens.dtype == chosen.dtype == torch.int32:
        raise ValueError(f"table, lens, chosen must be torch.int32, got {table.dtype}, {lens.dtype}, {chosen.dtype}")
    if not (chosen.is_contiguous() and lens.is_contiguous()):
        raise ValueError(f"chosen and lens must be contiguous, got strides {chosen.stride()} and {lens.stride()}")
    if unit < 1 or budget < 0:
        raise ValueError(f"unit must be at least 1 and budget at least 0, got {unit} and {budget}")


def kinds(same: bool, cap: float | None) -> dict[str, float]:
    """The compile-time arguments of `gather_kernel` that say how it reads and weighs."""
    return {"SAME": int(same), "CAP": cap or 0.0}


LIMITS = tile_limits(168, "gather.split")


def variants() -> Iterator[Variant]:
    """The specialisations that `gather_decode` uses; the merge is `decode`'s."""
    for dtype, dim in head_dims():
        yield from with_single(gather_variant(dtype, dim, dim))
    yield gather_variant("bf16", 256, 256, cap=50.0)
    yield gather_variant("bf16", 192, 128)


def gather_variant(dtype: str, dim: int, value_dim: int, *, cap: float | None = None) -> Variant:
    """`gather_kernel` for one dtype and one kind of keys and values."""
    data, f32, i32 = f"*{dtype}", "*fp32", "*i32"
    pointers = {"q_ptr": data, "k_ptr": data, "v_ptr": data, "table_ptr": i32, "lens_ptr": i32}
    return Variant(
        kernel="gather.split",
        name=f"{dtype} {widths(dim, value_dim)}{' cap' if cap else ''}",
        fn=gather_kernel,
        pointers=pointers | {"chosen_ptr": i32, "o_ptr": f32, "lse_ptr": f32},
        floats=("scaling",),
        aligned=("stride_q", "stride_k", "stride_v"),
        constants=gather_constants(TORCH[dtype], dim, value_dim) | kinds(dim == value_dim, cap),
        options=gather_options(TORCH[dtype], dim),
    )
