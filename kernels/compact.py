# ruff: noqa: N803, N806
"""Compaction: gathers the kept slots of a prefill's dense keys and values into pages, quantized in the same pass.

    PagedKV.gather(k, v, keep)                       `gather(k, v, keep, counts)`
    QuantKV.quantize(PagedKV.gather(k, v, keep))     `quantize(k, v, keep, counts, ...)`

with bitwise equal results, by kernels that never synchronize with the host. A first kernel turns the mask into slots,

    index[b, h, i] = the i-th kept token,      lens[b, h] = the number of kept tokens

each tile counting the kept tokens before it. Then one program per page reads the rows of its 64 slots and writes them,
or their codes, scales and zeros in the layout of kernels/quant.py. A token is read once and written once, and a
quantized context is never materialized as full-precision pages.

New tokens are copied into the dense tail of a question (models/question.py) by slicing, which already moves each byte
once, so there is no kernel for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lceval.kernels.launch import DTYPES, HEAD_DIMS, INTERPRETED, jit, runs_kernels, tl
from lceval.kernels.paged import PAGE, PagedKV, is_view
from lceval.kernels.quant import BITS, GROUP, Pool, QuantKV
from lceval.kernels.variant import SHARED, USED_HEAD_DIMS, Limit, Variant, head_dims


def reference(k: Tensor, v: Tensor, keep: Tensor | None) -> PagedKV:
    """The definition, and with `QuantKV.quantize` the CPU path: k, v [B, Hkv, S, D], keep [B, Hkv, S] bool or None."""
    if keep is not None:
        return PagedKV.gather(k, v, keep)
    k_padded, v_padded = (torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % PAGE)).contiguous() for x in (k, v))
    return PagedKV.full(k_padded, v_padded, k.shape[2])


# Tables and indices grow with the context: specialising on their strides would recompile for each length.
_jit = jit("S", "N", "stride_mb", "stride_mh", "kv_heads", "stride_ib", "stride_ih", "stride_tb", "stride_th")


@_jit
def index_kernel(  # type: ignore[no-untyped-def]
    keep_ptr, index_ptr, lens_ptr, S, N, kv_heads, stride_mb, stride_mh, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The kept tokens of one tile of one head. keep: uint8, rows contiguous; index: [B, Hkv, N], lens: [B, Hkv]."""
    tile = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    row = keep_ptr + bh // kv_heads * stride_mb + bh % kv_heads * stride_mh
    offs = tl.arange(0, BLOCK_S)
    # The mask is one byte per token and in the L2 cache: counting it again costs less than another launch.
    before = tl.zeros([BLOCK_S], tl.int32)
    for i in range(tile):
        before += tl.load(row + i * BLOCK_S + offs).to(tl.int32)
    token = tile * BLOCK_S + offs
    kept = tl.load(row + token, mask=token < S, other=0).to(tl.int32)
    slot = tl.sum(before, 0) + tl.cumsum(kept, 0) - kept
    tl.store(index_ptr + bh * N + slot, token, mask=(kept != 0) & (slot < N))
    if tile == tl.num_programs(0) - 1:
        tl.store(lens_ptr + bh, tl.sum(before, 0) + tl.sum(kept, 0))


@_jit
def gather_kernel(  # type: ignore[no-untyped-def]
    x_ptr, index_ptr, lens_ptr, skip_ptr, table_ptr, out_ptr, positions_ptr, kv_heads,
    stride_xb, stride_xh, stride_xs, stride_ib, stride_ih, stride_tb, stride_th,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Copy one page of a head, zeros in its slack. x, out: integers of the width of the data; out: [P, PAGE, D].

    skip: [B, Hkv], slots of each head that precede these and are stored elsewhere.
    """
    page = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // kv_heads
    h = bh % kv_heads
    skip = tl.load(skip_ptr + bh)
    n = tl.load(lens_ptr + bh) - skip
    if page * PAGE >= n:
        return
    at = tl.load(table_ptr + b * stride_tb + h * stride_th + page).to(tl.int64) * PAGE
    offs_s = tl.arange(0, PAGE)
    offs_d = tl.arange(0, D_PAD)
    slot = page * PAGE + offs_s
    token = tl.load(index_ptr + b * stride_ib + h * stride_ih + skip + slot, mask=slot < n, other=0)
    tl.store(positions_ptr + at + offs_s, token)
    source = x_ptr + b * stride_xb + h * stride_xh + token.to(tl.int64) * stride_xs
    mask_d = (offs_d < D)[None, :]
    x = tl.load(source[:, None] + offs_d[None, :], mask=(slot < n)[:, None] & mask_d, other=0)
    tl.store(out_ptr + (at + offs_s)[:, None] * D + offs_d[None, :], x, mask=mask_d)


@_jit
def ceil16(x, BFLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """As quant.ceil16: the lowest 16-bit float not below x float32, and its bits as an int32."""
    if BFLOAT:
        # bfloat16 is the upper half of float32. Truncation rounds towards zero, which is upwards for negative numbers.
        top = 3.3895313892515355e38
        bits = tl.minimum(tl.maximum(x, -top), top).to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits, bits + 0xFFFF) >> 16
        return (bits << 16).to(tl.float32, bitcast=True), bits
    x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    y = x.to(tl.float16)
    bits = y.to(tl.int16, bitcast=True).to(tl.int32)
    # Adding 1 to the bits gives the next larger magnitude, so negative numbers need -1.
    bits += tl.where(y.to(tl.float32) < x, tl.where(bits < 0, -1, 1), 0)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), bits


@_jit
def encode(x, zero, scale, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes int32 of x float32: round((x - zero) / scale), halves to even."""
    TOP: tl.constexpr = 2**BITS - 1
    # Division, not multiplication by the inverse, so that the codes equal the reference's.
    code = tl.math.div_rn(x - zero, tl.where(scale > 0, scale, 1.0))
    # Adding 1.5 * 2**23 rounds to an integer.
    return (tl.minimum(tl.maximum(code, 0.0), TOP * 1.0) + 12582912.0 - 12582912.0).to(tl.int32)


@_jit
def keys_kernel(  # type: ignore[no-untyped-def]
    x_ptr, index_ptr, pages_ptr, table_ptr, words_ptr, scale_ptr, zero_ptr, positions_ptr, kv_heads,
    stride_xb, stride_xh, stride_xs, stride_ib, stride_ih, stride_tb, stride_th,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
):  # fmt: skip
    """Quantize one group of a page of keys. words: [P, PAGE * BITS / 32, D]; scale, zero: [P, PAGE / GROUP, D]."""
    GROUPS: tl.constexpr = PAGE // GROUP
    PER_WORD: tl.constexpr = 32 // BITS
    page = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    bh = tl.program_id(1).to(tl.int64)
    b = bh // kv_heads
    h = bh % kv_heads
    if page >= tl.load(pages_ptr + bh):
        return
    at = tl.load(table_ptr + b * stride_tb + h * stride_th + page).to(tl.int64) * GROUPS + group
    word = tl.arange(0, BITS)
    part = tl.arange(0, PER_WORD)
    offs_d = tl.arange(0, D_PAD)
    mask_d = offs_d < D
    offs_s = word[:, None] * PER_WORD + part[None, :]
    index = index_ptr + b * stride_ib + h * stride_ih + page * PAGE + group * GROUP
    token = tl.load(index + offs_s)
    tl.store(positions_ptr + at * GROUP + offs_s, token)
    source = x_ptr + b * stride_xb + h * stride_xh + token.to(tl.int64) * stride_xs
    x = tl.load(source[:, :, None] + offs_d[None, None, :], mask=mask_d[None, None, :], other=0.0).to(tl.float32)
    low = -tl.max(tl.max(-x, 1), 0)
    high = tl.max(tl.max(x, 1), 0)
    zero, zero_bits = ceil16(-low, BFLOAT)
    zero = -zero
    scale, scale_bits = ceil16(tl.math.div_rn(high - zero, tl.full([D_PAD], 2**BITS - 1, tl.float32)), BFLOAT)
    codes = encode(x, zero[None, None, :], scale[None, None, :], BITS)
    words = tl.sum(codes << (part * BITS)[None, :, None], 1)
    tl.store(words_ptr + (at * BITS + word)[:, None] * D + offs_d[None, :], words, mask=mask_d[None, :])
    tl.store(scale_ptr + at * D + offs_d, scale_bits.to(tl.int16), mask=mask_d)
    tl.store(zero_ptr + at * D + offs_d, (zero_bits ^ 0x8000).to(tl.int16), mask=mask_d)


@_jit
def values_kernel(  # type: ignore[no-untyped-def]
    x_ptr, index_ptr, pages_ptr, table_ptr, words_ptr, scale_ptr, zero_ptr, positions_ptr, kv_heads,
    stride_xb, stride_xh, stride_xs, stride_ib, stride_ih, stride_tb, stride_th,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    BFLOAT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Quantize some slots of a page of values. words: [P, PAGE, D * BITS / 32]; scale, zero: [P, PAGE, D / GROUP]."""
    TILES: tl.constexpr = PAGE // BLOCK_S
    PER_WORD: tl.constexpr = 32 // BITS
    GROUPS: tl.constexpr = D_PAD // GROUP
    page = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    bh = tl.program_id(1).to(tl.int64)
    b = bh // kv_heads
    h = bh % kv_heads
    if page >= tl.load(pages_ptr + bh):
        return
    at = tl.load(table_ptr + b * stride_tb + h * stride_th + page).to(tl.int64) * PAGE + tile * BLOCK_S
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, D_PAD)
    token = tl.load(index_ptr + b * stride_ib + h * stride_ih + page * PAGE + tile * BLOCK_S + offs_s)
    tl.store(positions_ptr + at + offs_s, token)
    source = x_ptr + b * stride_xb + h * stride_xh + token.to(tl.int64) * stride_xs
    # A short last group repeats its last channel, which leaves minimum and maximum unchanged.
    channel = tl.minimum(offs_d, D - 1)
    x = tl.load(source[:, None] + channel[None, :]).to(tl.float32)
    x = tl.reshape(x, [BLOCK_S, GROUPS, GROUP])
    low = -tl.max(-x, 2)
    high = tl.max(x, 2)
    zero, zero_bits = ceil16(-low, BFLOAT)
    zero = -zero
    scale, scale_bits = ceil16(tl.math.div_rn(high - zero, tl.full([BLOCK_S, GROUPS], 2**BITS - 1, tl.float32)), BFLOAT)
    codes = encode(x, zero[:, :, None], scale[:, :, None], BITS)
    codes = tl.reshape(codes, [BLOCK_S, GROUPS * BITS, PER_WORD])
    words = tl.sum(codes << (tl.arange(0, PER_WORD) * BITS)[None, None, :], 2)
    row = (at + offs_s)[:, None]
    # HEAD_DIMS are multiples of 16, hence of the codes per word.
    offs_w = tl.arange(0, GROUPS * BITS)[None, :]
    tl.store(words_ptr + row * (D // PER_WORD) + offs_w, words, mask=offs_w < D // PER_WORD)
    offs_g = tl.arange(0, GROUPS)[None, :]
    out = row * tl.cdiv(D, GROUP) + offs_g
    tl.store(scale_ptr + out, scale_bits.to(tl.int16), mask=offs_g < tl.cdiv(D, GROUP))
    tl.store(zero_ptr + out, (zero_bits ^ 0x8000).to(tl.int16), mask=offs_g < tl.cdiv(D, GROUP))


# The codes must equal the reference's, so multiply-adds must not be fused.
OPTIONS: dict[str, int | bool] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
INDEX_BLOCK = 4096


def constants(kernel: str, head_dim: int, bits: int = 0, bfloat: bool = False) -> dict[str, int]:
    """The compile-time arguments of `gather`, `keys` or `values`: 2048 to 16384 elements per program."""
    sizes = {"D": head_dim, "D_PAD": 1 << (head_dim - 1).bit_length(), "PAGE": PAGE}
    if kernel != "gather":
        # Groups of values must not be padded away where head_dim is 16.
        sizes |= {"D_PAD": max(GROUP, sizes["D_PAD"]), "GROUP": GROUP, "BITS": bits, "BFLOAT": bfloat}
    return sizes | ({"BLOCK_S": 32 if head_dim <= 128 else 16} if kernel == "values" else {})


def fits(k: Tensor, v: Tensor) -> bool:
    """Whether the kernels compact these keys and values: not a view of one as the other, and D and E in HEAD_DIMS."""
    return k.shape[-1] in HEAD_DIMS and v.shape[-1] in HEAD_DIMS and not is_view(k, v)


def gather(k: Tensor, v: Tensor, keep: Tensor, counts: Sequence[int]) -> PagedKV:
    """The kept slots of a dense cache, as `PagedKV.gather`.

    CUDA tensors run the kernels, without waiting for the device; others run `reference`, or the kernels if
    TRITON_INTERPRET=1 was set before the import.

    Args:
        k, v: [B, Hkv, S, D] and [B, Hkv, S, E] for which `fits`, rows contiguous.
        keep: [B, Hkv, S] bool.
        counts: kept tokens of each head, row by row, on the host: they size the pages and must equal the mask's. A
            policy with one budget for all heads knows them; `keep.sum(-1).flatten().tolist()` synchronizes.

    Raises:
        ValueError: a shape, dtype, device, layout or count that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    _check(k, v, keep, counts, 16, 16, 0)
    if not runs_kernels(k, "compacting"):
        return reference(k, v, keep)
    index, lens = _index(keep, counts)
    return _pages(k, v, index, lens, torch.zeros_like(lens), tuple(counts), positions=True)


def quantize(
    k: Tensor, v: Tensor, keep: Tensor | None, counts: Sequence[int], k_bits: int, v_bits: int, residual: int = 128
) -> QuantKV:
    """As `QuantKV.quantize(PagedKV.gather(k, v, keep), ...)`, in one pass. Arguments as `gather`.

    Args:
        keep: None keeps every token and stores no positions.
        k_bits, v_bits: 16, 8, 4 or 2.
        residual: minimum number of newest slots per head that stay in full precision.
    """
    _check(k, v, keep, counts, k_bits, v_bits, residual)
    if not runs_kernels(k, "compacting"):
        return QuantKV.quantize(reference(k, v, keep), k_bits, v_bits, residual)
    B, Hkv, S = k.shape[:3]
    if keep is None:
        index = torch.arange(S, dtype=torch.int32, device=k.device).expand(B, Hkv, S)
        lens = torch.full((B, Hkv), S, dtype=torch.int32, device=k.device)
    else:
        index, lens = _index(keep, counts)
    pages = [max(0, n - residual) // PAGE for n in counts]
    old = torch.clamp(lens - residual, min=0) // PAGE
    positions = torch.empty((sum(pages), PAGE), dtype=torch.int32, device=k.device)
    args = index, old, (table := _table(old, max(pages, default=0))), positions
    left = tuple(n - PAGE * p for n, p in zip(counts, pages, strict=True))
    return QuantKV(
        k=_pool("keys", k, *args, k_bits),
        v=_pool("values", v, *args, v_bits),
        table=table,
        pages=tuple(pages),
        positions=None if keep is None else positions,
        residual=_pages(k, v, index, lens, old * PAGE, left, positions=keep is not None),
        lens=lens,
        counts=tuple(counts),
    )


def _index(keep: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[B, Hkv, N] int32, the kept tokens in order, N the maximum over heads, and lens [B, Hkv] int32."""
    B, Hkv, S = keep.shape
    N = max(counts, default=0)
    index = torch.empty((B, Hkv, N), dtype=torch.int32, device=keep.device)
    lens = torch.zeros((B, Hkv), dtype=torch.int32, device=keep.device)
    if S and B:
        with torch.cuda.device(keep.get_device()):
            index_kernel[(-(-S // INDEX_BLOCK), B * Hkv)](
                keep.view(torch.uint8), index, lens, S, N, Hkv, *keep.stride()[:2], BLOCK_S=INDEX_BLOCK, **OPTIONS
            )
    return index, lens


def _table(pages: Tensor, width: int) -> Tensor:
    """[B, Hkv, width] int32: `pages` [B, Hkv] page ids per head, heads concatenated."""
    count = pages.flatten()[:, None]
    at = torch.arange(width, dtype=torch.int32, device=pages.device)
    ids = count.cumsum(0, dtype=torch.int32) - count + at
    return torch.where(at < count, ids, 0).view(*pages.shape, width)


def _pages(
    k: Tensor, v: Tensor, index: Tensor, lens: Tensor, skip: Tensor, counts: tuple[int, ...], *, positions: bool
) -> PagedKV:
    """Each head's slots from `skip` [B, Hkv] on, `counts` of them, in full precision."""
    left = lens - skip
    used = [-(-n // PAGE) for n in counts]
    table = _table((left + PAGE - 1) // PAGE, max(used, default=0))
    at = torch.empty((sum(used), PAGE), dtype=torch.int32, device=k.device)
    pool_k, pool_v = (torch.empty((sum(used), PAGE, x.shape[3]), dtype=x.dtype, device=x.device) for x in (k, v))
    _copy(k, index, lens, skip, table, pool_k, at)
    _copy(v, index, lens, skip, table, pool_v, at)
    return PagedKV(pool_k, pool_v, table, left, at if positions else None, counts)


def _copy(x: Tensor, index: Tensor, lens: Tensor, skip: Tensor, table: Tensor, pool: Tensor, at: Tensor) -> None:
    if not len(pool):
        return
    bits = torch.int16 if x.element_size() == 2 else torch.int32
    strides = *x.stride()[:3], *index.stride()[:2], *table.stride()[:2]
    args = x.view(bits), index, lens, skip, table, pool.view(bits), at, x.shape[1], *strides
    with torch.cuda.device(x.get_device()):
        gather_kernel[(table.shape[2], lens.numel())](*args, **constants("gather", x.shape[3]), **OPTIONS)


def _pool(kind: str, x: Tensor, index: Tensor, pages: Tensor, table: Tensor, positions: Tensor, bits: int) -> Pool:
    """The quantized pages of all keys or of all values; full-precision pages if bits is 16."""
    Hkv, D, P = x.shape[1], x.shape[3], len(positions)
    if bits == 16:
        words = torch.empty((P, PAGE, D), dtype=x.dtype, device=x.device)
        _copy(x, index, pages * PAGE, torch.zeros_like(pages), table, words, positions)
        return Pool(16, words)
    bfloat = x.dtype == torch.bfloat16
    shape = (P, PAGE * bits // 32, D) if kind == "keys" else (P, PAGE, -(-D * bits // 32))
    groups = (P, PAGE // GROUP, D) if kind == "keys" else (P, PAGE, -(-D // GROUP))
    words = torch.empty(shape, dtype=torch.int32, device=x.device)
    scale, zero = (torch.empty(groups, dtype=torch.int16, device=x.device) for _ in range(2))
    if P:
        fn = keys_kernel if kind == "keys" else values_kernel
        sizes = constants(kind, D, bits, bfloat)
        programs = PAGE // (GROUP if kind == "keys" else sizes["BLOCK_S"])
        strides = *x.stride()[:3], *index.stride()[:2], *table.stride()[:2]
        if INTERPRETED and bfloat:
            x = x.float()  # the interpreter represents bf16 as raw 16-bit integers
            strides = *x.stride()[:3], *strides[3:]
        with torch.cuda.device(x.get_device()):
            fn[(table.shape[2] * programs, pages.numel())](
                x, index, pages, table, words, scale, zero, positions, Hkv, *strides, **sizes, **OPTIONS
            )
    stored = torch.bfloat16 if bfloat else torch.float16
    return Pool(bits, words, scale.view(stored), zero.view(stored))


def _check(
    k: Tensor, v: Tensor, keep: Tensor | None, counts: Sequence[int], k_bits: int, v_bits: int, residual: int
) -> None:
    for name, tensor in (("k", k), ("v", v)):
        if tensor.ndim != 4 or tensor.shape[:3] != k.shape[:3] or tensor.shape[3] not in HEAD_DIMS:
            raise ValueError(f"{name} must be k's [B, Hkv, S, D], D a multiple of 16 up to 256, {tuple(tensor.shape)}")
        if tensor.device != k.device or tensor.dtype != k.dtype or k.dtype not in DTYPES:
            raise ValueError(f"{name} must be on {k.device} in one of {DTYPES}, got {tensor.device}, {tensor.dtype}")
        if tensor.stride(3) != 1:
            raise ValueError(f"the last axis of {name} must be contiguous, got strides {tensor.stride()}")
    S = k.shape[2]
    if keep is not None:
        if keep.shape != k.shape[:3] or keep.dtype != torch.bool or keep.device != k.device:
            got = tuple(keep.shape), keep.dtype, keep.device
            raise ValueError(f"keep must be {tuple(k.shape[:3])} torch.bool on {k.device}, got {got}")
        if S > 1 and keep.stride(2) != 1:
            raise ValueError(f"the last axis of keep must be contiguous, got strides {keep.stride()}")
    if len(counts) != k.shape[0] * k.shape[1] or not all((n == S) if keep is None else 0 <= n <= S for n in counts):
        raise ValueError(f"counts must be one for each of {tuple(k.shape[:2])} heads, at most {S}, got {list(counts)}")
    if k_bits not in BITS or v_bits not in BITS or residual < 0:
        raise ValueError(f"bits are one of {BITS} and residual at least 0, got {k_bits}, {v_bits}, {residual}")


LIMITS = {("compact.index", "i32"): Limit(168, SHARED)}
LIMITS |= {
    (f"compact.{x}", dtype): Limit(168, SHARED) for x in ("gather", "keys", "values") for dtype in USED_HEAD_DIMS
}


def variants() -> Iterator[Variant]:
    """The specialisations that `gather` and `quantize` use."""
    slots = {"index_ptr": "*i32", "lens_ptr": "*i32"}
    pointers = slots | {"keep_ptr": "*u8"}
    yield Variant("compact.index", "i32", index_kernel, pointers, (), (), {"BLOCK_S": INDEX_BLOCK}, OPTIONS)
    pages = dict.fromkeys(("index_ptr", "table_ptr", "positions_ptr"), "*i32")
    for dtype, dim in head_dims():
        name, copied = f"{dtype} D{dim}", "*i32" if dtype == "fp32" else "*i16"
        if dtype != "fp16":  # data is copied as integers, so bf16 equals fp16
            pointers = pages | slots | {"skip_ptr": "*i32", "x_ptr": copied, "out_ptr": copied}
            sizes = constants("gather", dim)
            yield Variant("compact.gather", name, gather_kernel, pointers, (), ("stride_x",), sizes, OPTIONS)
        pointers = pages | dict.fromkeys(("pages_ptr", "words_ptr"), "*i32") | {"x_ptr": f"*{dtype}"}
        pointers |= {"scale_ptr": "*i16", "zero_ptr": "*i16"}
        for kernel, fn in (("keys", keys_kernel), ("values", values_kernel)):
            for bits in BITS[1:] if dtype == "bf16" else (4,):
                sizes, called = constants(kernel, dim, bits, dtype == "bf16"), f"{name} {bits}-bit"
                yield Variant(f"compact.{kernel}", called, fn, pointers, (), ("stride_x",), sizes, OPTIONS)
