# ruff: noqa: N803, N806
"""Scores of every unit of a compressed context for one query token per sequence, from an index of its keys.

    score[u] = mean_g softmax_u(l_g)        l_g[u] = scaling * (estimate of q_g k^T from the index)

over the G = H // Hkv query heads of a KV head (`select.mean_softmax`). Two indexes:

    Bits    l_g = scaling * (q_g . zero +- q_g . scale): the 32 slots of a group differ only in signs. The bit flips the
            sign of the stored scale, so every product is one of two stored 16-bit numbers, exact in float32. Bits i
            and i + 16 of a word turn into the signs of two 16-bit numbers in one shift and one xor.
    Bounds  l_g = scaling * (relu(q_g) . max - relu(-q_g) . min)

Two passes. The first writes logits (times log2 e) and the maximum and sum of each block; the second merges the sums and
writes the scores. Heads with at most `budget` slots have no index: size 0, no scores. The query heads of all rows that
share a context are processed together.

    logits  [B', H, SUB, width]    SUB = 32 for Bits (slot u is row u % 32, column u // 32), 1 for Bounds
    scores  [B', Hkv, SUB * width]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, product

import torch
from torch import Tensor

from lceval.kernels.bits import GROUP, Bits
from lceval.kernels.bounds import Bounds
from lceval.kernels.launch import DTYPES, HEAD_DIMS, INTERPRETED, NEEDS_MORE_WARPS, jit, runs_kernels, tl
from lceval.kernels.variant import SHARED, TENSOR_CORES, TORCH, Limit, Variant, head_dims, tile_limits


def reference(q: Tensor, index: Bits | Bounds, lens: Tensor, budget: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The definition, in float32, by `scores` of the index.

    Args:
        q: [B', H, D], one query token per row; B' / B rows share a sequence.
        index: of the heads with more than `budget` slots.
        lens: [B, Hkv] int32, slots of each head.
        budget: heads with at most this many are not scored.
        scaling: factor on q K^T.

    Returns:
        scores [B', Hkv, U] float32, 0 past a head's last unit, and sizes [B', Hkv] int32, units of each head, 0
        if it is not scored. U is the number of units of the longest head.
    """
    rows, H, D = q.shape
    B, Hkv = lens.shape
    if isinstance(index, Bounds):
        index = Bounds(index.bounds.float(), index.starts, index.unit)
    shared, large = rows // B, torch.where(lens > budget, lens, 0)
    sizes = (large + index.unit - 1) // index.unit
    scores = torch.zeros(B, shared, Hkv, -(-int(lens.max()) // index.unit), device=q.device)
    grouped = q.view(B, shared, Hkv, H // Hkv, D).float()
    for b, counts in enumerate(large.tolist()):
        for h, n in enumerate(counts):
            if n:
                head_scores = index.scores(b * Hkv + h, n, grouped[None, b, :, h], scaling)[0]
                scores[b, :, h, : head_scores.shape[-1]] = head_scores
    return scores.flatten(0, 1), sizes.int().repeat_interleave(shared, 0)


# Everything that differs between contexts, layers and models of one head_dim is an argument of one binary.
_jit = jit("G", "shared", "kv_heads", "budget", "unit", "blocks")


@_jit
def first_unit(lens_ptr, row, budget, unit):  # type: ignore[no-untyped-def]
    """First unit of head `row` in the index, which concatenates the heads above the budget."""
    before = tl.zeros([64], tl.int32)
    for start in range(0, row, 64):
        offs = start + tl.arange(0, 64)
        n = tl.load(lens_ptr + offs, mask=offs < row, other=0)
        before += tl.where(n > budget, tl.cdiv(n, unit), 0)
    return tl.sum(before, 0).to(tl.int64)


@_jit
def load_queries(  # type: ignore[no-untyped-def]
    q_ptr, row, G, shared, kv_heads, stride_qb, stride_qh, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M query heads of all rows over KV head `row`: [D_PAD, BLOCK_M], their indices in [B', H], a mask."""
    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D_PAD)
    mask_m = offs_m < shared * G
    b = row // kv_heads * shared + offs_m // G
    head = row % kv_heads * G + offs_m % G
    q_row = q_ptr + b * stride_qb + head * stride_qh
    q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)
    return tl.trans(q), b * (kv_heads * G) + head, mask_m


@_jit
def store_sums(m, l, m_ptr, l_ptr, part, mask):  # type: ignore[no-untyped-def] # noqa: E741
    """Reduce the maxima and sums of a block's rows to one of each."""
    m_block = tl.max(m, 0)
    tl.store(m_ptr + part, m_block, mask=mask)
    tl.store(l_ptr + part, tl.sum(l * tl.exp2(m - m_block[None, :]), 0), mask=mask)


@_jit
def bits_kernel(  # type: ignore[no-untyped-def]
    q_ptr, words_ptr, zero_ptr, scale_ptr, lens_ptr, logits_ptr, m_ptr, l_ptr, scaling,
    G, shared, kv_heads, budget, blocks, stride_qb, stride_qh, width,
    D: tl.constexpr, D_PAD: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_U groups of one KV head; m, l: [B', H, blocks] float32, of each block of groups."""
    LOG2E: tl.constexpr = 1.4426950408889634
    SIGNS: tl.constexpr = -2147450880  # 0x80008000, the signs of two 16-bit numbers
    HALF: tl.constexpr = GROUP // 2

    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    n = tl.load(lens_ptr + row)
    if (n <= budget) | (block * BLOCK_U * GROUP >= n):
        return
    groups = tl.cdiv(n, GROUP)
    start = first_unit(lens_ptr, row, budget, GROUP)

    q, heads, mask_m = load_queries(q_ptr, row, G, shared, kv_heads, stride_qb, stride_qh, D, D_PAD, BLOCK_M)
    offs_d = tl.arange(0, D_PAD)
    mask_d = offs_d < D

    offs_u = block * BLOCK_U + tl.arange(0, BLOCK_U)
    mask_u = offs_u < groups
    at = (start + offs_u)[:, None] * D + offs_d[None, :]
    mask = mask_u[:, None] & mask_d[None, :]
    words = ~tl.load(words_ptr + at, mask=mask, other=0)
    scale = tl.load(scale_ptr + at, mask=mask, other=0.0)
    zero = tl.load(zero_ptr + at, mask=mask, other=0.0)
    base = tl.dot(zero.to(q.dtype), q, input_precision="ieee")
    pair = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    pair = pair | (pair << 16)

    out = logits_ptr + (heads * GROUP * width)[None, :] + offs_u[:, None]
    mask_out = mask_u[:, None] & mask_m[None, :]
    # A finite floor: before the first slot, exp2(-inf - m) is 0 and not NaN.
    m = tl.full([BLOCK_U, BLOCK_M], -3.0e38, tl.float32)
    l = tl.zeros([BLOCK_U, BLOCK_M], tl.float32)  # noqa: E741
    for i in range(HALF):
        both = ((words << (HALF - 1 - i)) & SIGNS) ^ pair
        low = both.to(tl.int16).to(scale.dtype, bitcast=True).to(q.dtype)
        high = (both >> 16).to(tl.int16).to(scale.dtype, bitcast=True).to(q.dtype)
        low = tl.dot(low, q, base, input_precision="ieee") * (scaling * LOG2E)
        high = tl.dot(high, q, base, input_precision="ieee") * (scaling * LOG2E)
        tl.store(out + i * width, low, mask=mask_out)
        tl.store(out + (i + HALF) * width, high, mask=mask_out)
        slot = offs_u[:, None] * GROUP + i
        low = tl.where(slot < n, low, float("-inf"))
        high = tl.where(slot + HALF < n, high, float("-inf"))
        m_new = tl.maximum(m, tl.maximum(low, high))
        l = l * tl.exp2(m - m_new) + tl.exp2(low - m_new) + tl.exp2(high - m_new)  # noqa: E741
        m = m_new

    store_sums(m, l, m_ptr, l_ptr, heads * blocks + block, mask_m)


@_jit
def bounds_kernel(  # type: ignore[no-untyped-def]
    q_ptr, bounds_ptr, lens_ptr, logits_ptr, m_ptr, l_ptr, scaling,
    G, shared, kv_heads, budget, unit, blocks, stride_qb, stride_qh, width,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Logits of TILES tiles of BLOCK_U pages of one KV head; m, l as in `bits_kernel`."""
    LOG2E: tl.constexpr = 1.4426950408889634

    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    n = tl.load(lens_ptr + row)
    units = tl.cdiv(n, unit)
    if (n <= budget) | (block * BLOCK_U * TILES >= units):
        return
    start = first_unit(lens_ptr, row, budget, unit)

    q, heads, mask_m = load_queries(q_ptr, row, G, shared, kv_heads, stride_qb, stride_qh, D, D_PAD, BLOCK_M)
    offs_d = tl.arange(0, D_PAD)
    mask_d = offs_d < D
    positive = tl.where(q > 0, q, 0.0).to(q.dtype)
    negative = tl.where(q < 0, q, 0.0).to(q.dtype)

    out = logits_ptr + (heads * width)[None, :]
    m = tl.full([BLOCK_U, BLOCK_M], -3.0e38, tl.float32)
    l = tl.zeros([BLOCK_U, BLOCK_M], tl.float32)  # noqa: E741
    first = block * TILES
    for tile in range(first, tl.minimum(first + TILES, tl.cdiv(units, BLOCK_U))):
        offs_u = tile * BLOCK_U + tl.arange(0, BLOCK_U)
        mask_u = (offs_u < units)[:, None]
        at = bounds_ptr + (start + offs_u)[:, None] * (2 * D) + offs_d[None, :]
        most = tl.load(at, mask=mask_u & mask_d[None, :], other=0.0)
        least = tl.load(at + D, mask=mask_u & mask_d[None, :], other=0.0)
        logits = tl.dot(most, positive, input_precision="ieee")
        logits = tl.dot(least, negative, logits, input_precision="ieee") * (scaling * LOG2E)
        tl.store(out + offs_u[:, None], logits, mask=mask_u & mask_m[None, :])
        logits = tl.where(mask_u, logits, float("-inf"))
        m_new = tl.maximum(m, logits)
        l = l * tl.exp2(m - m_new) + tl.exp2(logits - m_new)  # noqa: E741
        m = m_new

    store_sums(m, l, m_ptr, l_ptr, heads * blocks + block, mask_m)


@_jit
def score_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, m_ptr, l_ptr, lens_ptr, scores_ptr, sizes_ptr,
    G, shared, kv_heads, budget, unit, blocks, width,
    SUB: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Scores of COLUMNS columns for one row and KV head, and its size. SPAN: columns per block of sums."""
    row = tl.program_id(0).to(tl.int64)  # of [B', Hkv]
    n = tl.load(lens_ptr + row // kv_heads // shared * kv_heads + row % kv_heads)
    units = tl.where(n > budget, tl.cdiv(n, unit), 0)
    if tl.program_id(1) == 0:
        tl.store(sizes_ptr + row, units)
    if tl.program_id(1) * COLUMNS * SUB >= units:
        return
    used = tl.cdiv(units, SUB * SPAN)

    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sub = tl.arange(0, SUB)
    own = columns[None, :] * SUB + sub[:, None]
    mask = own < units
    total = tl.zeros([SUB, COLUMNS], tl.float32)
    for g in range(G):
        head = row * G + g
        m_own = tl.full([BLOCK_I], -3.0e38, tl.float32)
        l_own = tl.zeros([BLOCK_I], tl.float32)
        for start in range(0, used, BLOCK_I):
            offs = start + tl.arange(0, BLOCK_I)
            m_i = tl.load(m_ptr + head * blocks + offs, mask=offs < used, other=float("-inf"))
            l_i = tl.load(l_ptr + head * blocks + offs, mask=offs < used, other=0.0)
            m_new = tl.maximum(m_own, m_i)
            l_own = l_own * tl.exp2(m_own - m_new) + l_i * tl.exp2(m_i - m_new)
            m_own = m_new
        m = tl.max(m_own, 0)
        l = tl.sum(l_own * tl.exp2(m_own - m), 0)  # noqa: E741
        at = logits_ptr + head * SUB * width + sub[:, None] * width + columns[None, :]
        total += tl.exp2(tl.load(at, mask=mask, other=float("-inf")) - m) / l
    tl.store(scores_ptr + row * SUB * width + own, total / G, mask=mask)


# Two stages of `bounds_kernel` are two tiles of max and of min: 64 KiB at head_dim 128.
OPTIONS: dict[str, int | bool] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def bits_options(constants: dict[str, int]) -> dict[str, int | bool]:
    """The launch options of `bits_kernel`: wide tiles use 8 warps, since 4 ran out of registers."""
    wide = constants["BLOCK_U"] * constants["D_PAD"] * constants["BLOCK_M"] > 64 * 128 * 8
    wide = wide or constants["D_PAD"] == 256 or (NEEDS_MORE_WARPS and constants["BLOCK_M"] > 8)
    return OPTIONS | {"num_warps": 8 if wide else 4}


def scan_constants(dtype: torch.dtype, head_dim: int, queries: int, *, bits: bool) -> dict[str, int]:
    """The compile-time arguments of `bits_kernel` and `bounds_kernel`.

    The index is the larger side of the product (64 rows are 4 warps of 16), 8 or 16 query heads the other. Float32 uses
    no tensor cores here and unrolls into FMAs.
    """
    D_PAD = 1 << (head_dim - 1).bit_length()
    BLOCK_U = 16 if dtype == torch.float32 else 64 if D_PAD <= 128 else 32
    constants = {"D": head_dim, "D_PAD": D_PAD, "BLOCK_M": 8 if queries <= 8 else 16, "BLOCK_U": BLOCK_U}
    return constants | ({"GROUP": GROUP} if bits else {"TILES": 256 // BLOCK_U})


def score_constants(span: int, *, bits: bool) -> dict[str, int]:
    """The compile-time arguments of `score_kernel`: 1024 units per program."""
    return {"SUB": GROUP if bits else 1, "COLUMNS": 1024 // (GROUP if bits else 1), "SPAN": span, "BLOCK_I": 128}


def scan(
    q: Tensor, index: Bits | Bounds, lens: Tensor, counts: Sequence[int], budget: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Scores of every unit of the heads above `budget`, for one query token per row.

    CUDA tensors run the kernels, without waiting for the device; others run `reference`, or the kernels if
    TRITON_INTERPRET=1 was set before the import.

    Args:
        q: [B', H, D] float16, bfloat16 or float32, D a multiple of 16 up to 256; B' a multiple of B.
        index: of the heads with more than `budget` slots, built from keys of q's dtype.
        lens: [B, Hkv] int32, contiguous: slots of each head.
        counts: lens on the host, row by row; at least one above the budget.
        budget, scaling: as in `reference`.

    Returns:
        As `reference`, but scores past a head's last unit are undefined.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    _check(q, index, lens, counts, budget)
    if not runs_kernels(q, "scan"):
        return reference(q, index, lens, budget, scaling)
    if INTERPRETED and q.dtype == torch.bfloat16:
        # The interpreter represents bf16 as raw 16-bit integers and multiplies those silently.
        q = q.float()
        if isinstance(index, Bits):
            index = Bits(index.words, index.zero.half(), index.scale.half(), index.starts)
        else:
            index = Bounds(index.bounds.float(), index.starts, index.unit)
    return _launch(q, index, lens, max(counts), budget, scaling)


def _launch(
    q: Tensor, index: Bits | Bounds, lens: Tensor, most: int, budget: int, scaling: float
) -> tuple[Tensor, Tensor]:
    rows, H, D = q.shape
    B, Hkv = lens.shape
    bits, shared, G = isinstance(index, Bits), rows // B, H // Hkv
    constants = scan_constants(q.dtype, D, shared * G, bits=bits)
    unit, sub = index.unit, GROUP if bits else 1
    span = constants["BLOCK_U"] * constants.get("TILES", 1)
    columns = -(-most // (unit * sub))
    width, blocks = -(-columns // 32) * 32, -(-columns // span)
    shapes = (rows, H, sub, width), (rows, H, blocks), (rows, H, blocks), (rows, Hkv, sub * width)
    logits, m, l, scores = (torch.empty(x, dtype=torch.float32, device=q.device) for x in shapes)  # noqa: E741
    sizes = torch.empty((rows, Hkv), dtype=torch.int32, device=q.device)
    kernel, units, options = (bits_kernel, (), bits_options(constants)) if bits else (bounds_kernel, (unit,), OPTIONS)
    with torch.cuda.device(q.get_device()):
        kernel[(B * Hkv, blocks, -(-shared * G // constants["BLOCK_M"]))](
            q, *_tensors(index), lens, logits, m, l, scaling,
            G, shared, Hkv, budget, *units, blocks, *q.stride()[:2], width, **constants, **options,
        )  # fmt: skip
        constants = score_constants(span, bits=bits)
        score_kernel[(rows * Hkv, -(-columns // constants["COLUMNS"]))](
            logits, m, l, lens, scores, sizes, G, shared, Hkv, budget, unit, blocks, width, **constants, **OPTIONS
        )
    return scores[..., : -(-most // unit)], sizes


def _tensors(index: Bits | Bounds) -> tuple[Tensor, ...]:
    return (index.words, index.zero, index.scale) if isinstance(index, Bits) else (index.bounds,)


def _check(q: Tensor, index: Bits | Bounds, lens: Tensor, counts: Sequence[int], budget: int) -> None:
    if q.ndim != 3 or q.shape[-1] not in HEAD_DIMS or (q.stride(2) != 1 and q.numel()):
        raise ValueError(f"q must be [B, H, D], D contiguous, a multiple of 16 up to 256, got {tuple(q.shape)}")
    if lens.ndim != 2 or lens.dtype != torch.int32 or not lens.is_contiguous():
        raise ValueError(f"lens must be [B, Hkv] torch.int32, contiguous, got {tuple(lens.shape)} {lens.dtype}")
    rows, H, D = q.shape
    B, Hkv = lens.shape
    if not B * Hkv or rows % B or H % Hkv:
        raise ValueError(f"q {tuple(q.shape)} must hold whole groups of lens {tuple(lens.shape)}")
    step = GROUP if isinstance(index, Bits) else index.unit
    parts = [-(-n // step) if n > budget else 0 for n in counts]
    if len(parts) != B * Hkv or not any(parts):
        raise ValueError(f"counts must be {B * Hkv}, one above the budget of {budget}, got {tuple(counts)}")
    if index.starts != tuple(accumulate(parts[:-1], initial=0)):
        raise ValueError(f"the index must cover the heads above {budget} of {tuple(counts)}, got {index.starts}")
    tensors = _tensors(index)
    stored = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float16
    dtypes = [torch.int32, stored, stored] if isinstance(index, Bits) else [q.dtype]
    if q.dtype not in DTYPES or [t.dtype for t in tensors] != dtypes:
        raise ValueError(f"an index for {q.dtype} queries must be {dtypes}, got {[t.dtype for t in tensors]}")
    shape = (sum(parts), D) if isinstance(index, Bits) else (sum(parts), 2, D)
    if any(t.shape != shape or not t.is_contiguous() for t in tensors):
        raise ValueError(f"the index must be {shape}, contiguous, got {[tuple(t.shape) for t in tensors]}")
    if any(t.device != q.device for t in (*tensors, lens)):
        raise ValueError(f"index and lens must be on q's device, {q.device}, got {tensors[0].device}, {lens.device}")


# The 1-bit scan keeps 64 words and 64 pairs of scales per thread in registers and reads each once.
LIMITS = {
    **{("scan.bits", dtype): Limit(255, SHARED, TENSOR_CORES[1:]) for dtype in ("fp16", "bf16")},
    ("scan.bits", "fp32"): Limit(255, SHARED),
    **tile_limits(168, "scan.bounds"),
    ("scan.score", "fp32"): Limit(168, SHARED),
}


def variants() -> Iterator[Variant]:
    """The specialisations that `scan` uses."""
    for (dtype, dim), queries, bits in product(head_dims(), (8, 16), (True, False)):
        yield _variant(dtype, dim, queries, bits=bits)
    for bits, span in ((True, 16), (True, 32), (True, 64), (False, 256)):
        yield Variant(
            kernel="scan.score",
            name=f"fp32 {'bits' if bits else 'bounds'} {span}",
            fn=score_kernel,
            pointers={"lens_ptr": "*i32", "sizes_ptr": "*i32"}
            | dict.fromkeys(("logits_ptr", "m_ptr", "l_ptr", "scores_ptr"), "*fp32"),
            floats=(),
            aligned=("width",),
            constants=score_constants(span, bits=bits),
            options=OPTIONS,
        )


def _variant(dtype: str, dim: int, queries: int, *, bits: bool) -> Variant:
    constants = scan_constants(TORCH[dtype], dim, queries, bits=bits)
    stored = "*bf16" if dtype == "bf16" else "*fp16"
    index = {"words_ptr": "*i32", "zero_ptr": stored, "scale_ptr": stored} if bits else {"bounds_ptr": f"*{dtype}"}
    return Variant(
        kernel="scan.bits" if bits else "scan.bounds",
        name=f"{dtype} D{dim} M{queries}",
        fn=bits_kernel if bits else bounds_kernel,
        pointers={"q_ptr": f"*{dtype}", "lens_ptr": "*i32", "logits_ptr": "*fp32", "m_ptr": "*fp32", "l_ptr": "*fp32"}
        | index,
        floats=("scaling",),
        aligned=("stride_q", "width"),
        constants=constants,
        options=bits_options(constants) if bits else OPTIONS,
    )
