# ruff: noqa: N803, N806
"""Decode attention over a quantized context (`quant.QuantKV`), read from memory in 8, 4 or 2 bits.

The key of slot s is k_sd = scale_gd c_sd + zero_gd, with g the group of 32 slots of s; the value is
v_sd = scale_sh c_sd + zero_sh, with h the group of 32 channels of d. Both are dequantized tile by tile in registers, on
the way from words to tensor cores; dequantized numbers are never written to memory:

    q . k_s = q . z + sum_d q_d (scale_gd c_sd + zero_gd - z_d),    z the centre of the share's first group

The common part of a channel's keys (large in outlier channels) stays in float32 outside the loop, so the product's 16
bits represent only the differences between keys. Scale and zero are applied to the codes in one multiply-add, which
also converts them to floats. Folding the scale into q and p would keep that step and add one product for each of a
tensor-core tile's 16 rows, of which G are used: for int4 at head_dim 128 on sm_90, 1019 instructions per loop of 32
slots and 187 registers, against 591 and 125 here (1022 and 168 with 64 slots per loop).

Otherwise as kernels/decode.py: one program processes one share of one KV head's pages for all its query heads, and
partial results are merged by log-sum-exp, together with the result over the newest slots, which are in full precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lceval.kernels import decode, merge, tiles
from lceval.kernels.launch import (
    BLOCK_G,
    DTYPES,
    MAX_SPLITS,
    NEEDS_MORE_WARPS,
    jit,
    multiprocessors,
    runs_kernels,
    tl,
    widened,
)
from lceval.kernels.paged import PAGE
from lceval.kernels.quant import BITS, GROUP, Pool, QuantKV
from lceval.kernels.quant_tiles import attend_codes
from lceval.kernels.softmax import capped
from lceval.kernels.variant import TORCH, Variant, head_dims, tile_limits, widths


def reference(
    q: Tensor, k: Pool, v: Pool, table: Tensor, lens: Tensor, newest: Tensor, scaling: float, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, in float32: attention over the dequantized slots. Every test compares against this.

    Arguments and results as for `decode_pages`, but o is float32.
    """
    B, H, _ = q.shape
    G, E = H // table.shape[1], channels(v)
    o = torch.zeros(B, H, E, dtype=torch.float32, device=q.device)
    lse = torch.full((B, H), -math.inf, dtype=torch.float32, device=q.device)
    for b, counts in enumerate(((lens - newest) // PAGE).tolist()):
        for h, n in enumerate(counts):
            if n > 0:
                page = table[b, h, :n].long().repeat_interleave(PAGE)
                slot = torch.arange(PAGE, device=q.device).repeat(n)
                heads = slice(h * G, (h + 1) * G)
                scores = capped(scaling * (q[b, heads].float() @ k.take_keys(page, slot).float().T), cap)
                lse[b, heads] = scores.logsumexp(-1)
                o[b, heads] = scores.softmax(-1) @ v.take_values(page, slot, E).float()
    return o, lse


def channels(v: Pool) -> int:
    """E, the channels of the values of a pool; a multiple of 16, hence of the codes in a word."""
    return v.words.shape[2] * (1 if v.bits == 16 else 32 // v.bits)


# As in decode.py: one binary for every G and every table length.
_jit = jit("G", "kv_heads", "stride_tb", "stride_th")


@_jit
def quant_split_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, k_scale_ptr, k_zero_ptr, v_ptr, v_scale_ptr, v_zero_ptr, table_ptr, lens_ptr, newest_ptr,
    o_ptr, lse_ptr, scaling, G, kv_heads, stride_qb, stride_qh, stride_tb, stride_th,
    D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Attend to one share of one KV head's pages. o: [B, H, splits, E], lse: [B, H, splits], contiguous."""
    LN2: tl.constexpr = 0.6931471805599453
    TILES: tl.constexpr = PAGE // BLOCK_S

    # 64-bit offsets: 2**18 pages of 64 x 128 are 2**31 elements.
    bh = tl.program_id(0).to(tl.int64)
    b = bh // kv_heads
    h = bh % kv_heads
    split = tl.program_id(1)
    splits = tl.num_programs(1)

    pages = (tl.load(lens_ptr + bh) - tl.load(newest_ptr + bh)) // PAGE
    first = split * pages // splits * TILES
    last = (split + 1) * pages // splits * TILES

    offs_g = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, D_PAD)
    offs_e = tl.arange(0, E_PAD)
    mask_d = offs_d < D
    mask_e = offs_e < E
    mask_g = offs_g < G
    q_row = q_ptr + b * stride_qb + (h * G + offs_g) * stride_qh
    q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask_g[:, None] & mask_d[None, :], other=0.0)

    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_G, E_PAD], tl.float32)
    page_ptr = table_ptr + b * stride_tb + h * stride_th
    m, l, acc = attend_codes(  # noqa: E741
        q, m, l, acc, k_ptr, k_scale_ptr, k_zero_ptr, v_ptr, v_scale_ptr, v_zero_ptr, page_ptr, first, last, scaling,
        D, D_PAD, E, E_PAD, PAGE, GROUP, K_BITS, V_BITS, BLOCK_S, CAP,
    )  # fmt: skip

    # A share without pages writes zeros and -inf, which have weight 0 in the merge.
    empty = last <= first
    l = tl.where(empty, 1.0, l)  # noqa: E741
    lse = (m + tl.log2(l)) * LN2
    out = (bh * G + offs_g) * splits + split
    tl.store(lse_ptr + out, tl.where(empty, float("-inf"), lse), mask=mask_g)
    tl.store(o_ptr + out[:, None] * E + offs_e[None, :], acc / l[:, None], mask=mask_g[:, None] & mask_e[None, :])


def options(dtype: torch.dtype, head_dim: int, k_bits: int) -> dict[str, int | bool]:
    """The launch options of `quant_split_kernel`.

    In 16 bits every thread loads 64 codes of K and of V, and two scales of V: enough for an asynchronous copy.
    """
    small = head_dim <= 64
    few = NEEDS_MORE_WARPS and k_bits == 2 and not small
    chosen: dict[str, int | bool] = {"num_stages": 3, "enable_fp_fusion": True}
    if dtype == torch.float32:
        return chosen | {"num_warps": 4 if small else 8}
    if head_dim in (64, 128):
        # 168 registers allow twelve warps per multiprocessor. Without a limit ptxas uses up to 204; limited to 168 it
        # spills two for 8-bit keys, but reaches 168 if a few more are allowed. A padded head_dim needs more.
        chosen["maxnreg"] = 184 if k_bits == 8 else 168
    return chosen | {"num_warps": 2 if small else 8 if few else 4}


def split_constants(
    dtype: torch.dtype, head_dim: int, value_dim: int, k_bits: int, v_bits: int, cap: float | None = None
) -> dict[str, float]:
    """The compile-time arguments of `quant_split_kernel`.

    A page per iteration where registers suffice: half as many reductions, and every load wide enough for an
    asynchronous copy. Float32 uses no tensor cores here and unrolls into multiply-adds, as in decode.py.
    """
    D_PAD, E_PAD = (max(GROUP, tiles.padded(dim)) for dim in (head_dim, value_dim))
    BLOCK_S = 16 if dtype == torch.float32 else 64 if max(D_PAD, E_PAD) <= 128 else 32
    sizes = {"D": head_dim, "D_PAD": D_PAD, "E": value_dim, "E_PAD": E_PAD, "BLOCK_G": BLOCK_G, "BLOCK_S": BLOCK_S}
    return sizes | {"PAGE": PAGE, "GROUP": GROUP, "K_BITS": k_bits, "V_BITS": v_bits, "CAP": cap or 0.0}


def decode_quantised(q: Tensor, kv: QuantKV, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """As `QuantKV.attend` for one token: attention over the quantized pages and the newest slots together.

    On CUDA three launches (four if the residual is long), without waiting for the device.

    Args:
        q: [B, H, D] in the model's dtype, any G = H // Hkv.
        kv: the quantized slots of B sequences.
        scaling, cap: as in `Softmax`.

    Returns:
        o [B, H, E] in q's dtype and lse [B, H] float32 (natural log; zeros and -inf for empty heads).

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    sequences, kv_heads = kv.lens.shape
    if q.ndim != 3 or q.shape[0] != sequences or q.shape[1] % max(1, kv_heads):
        raise ValueError(f"q must be [{sequences}, H, D], H a multiple of {kv_heads}, got {tuple(q.shape)}")
    if not runs_kernels(q, "decoding"):
        o, lse = kv.attend(q[:, :, None], scaling, cap)
        return o[:, :, 0], lse[:, :, 0]
    new = kv.residual
    rest = decode.decode(q, new.k, new.v, new.table, new.lens, scaling, cap)
    if not any(kv.pages):
        return rest
    return decode_pages(q, kv.k, kv.v, kv.table, kv.lens, new.lens, scaling, cap, rest=rest)


def decode_pages(
    q: Tensor, k: Pool, v: Pool, table: Tensor, lens: Tensor, newest: Tensor, scaling: float, cap: float | None = None,
    *, rest: tuple[Tensor, Tensor] | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of one query token per sequence over each KV head's quantized pages.

    CUDA tensors run the kernels, without waiting for the device; others run `reference`, or the kernels if
    TRITON_INTERPRET=1 was set before the import. No gradient flows through the kernels.

    Args:
        q: [B, H, D] float16, bfloat16 or float32, any G = H // Hkv.
        k, v: pools of P pages in the layout of kernels/quant.py, contiguous. Keys have D channels, values E; both are
            multiples of 16 up to 256.
        table: [B, Hkv, M] int32; page ids must lie in [0, P) up to each head's last page.
        lens, newest: [B, Hkv] int32, contiguous: kept slots of each head, and the number of them outside its quantized
            pages. Pages are full: a head has (lens - newest) // PAGE of them (0 is legal). Checked only if on the host.
        scaling, cap: as in `Softmax`.
        rest: o [B, H, E] and lse [B, H] over other slots, merged into the result.
        splits: number of shares per KV head; None chooses it from M and the device.

    Returns:
        o [B, H, E] in q's dtype and lse [B, H] float32 (natural log; zeros and -inf for empty heads).

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    _check(q, k, v, table, lens, newest, splits)
    if not runs_kernels(q, "decode_pages"):
        o, lse = reference(q, k, v, table, lens, newest, scaling, cap)
        return merge.merge(o[:, :, None], lse[..., None], rest, q.dtype)
    if splits is None:
        B, Hkv, M = table.shape
        # Half the pages: shares of at least four pages, which have half the bytes or fewer, for the same overhead.
        splits = decode.choose_splits(B * Hkv * -(-(q.shape[1] // Hkv) // BLOCK_G), M // 2, multiprocessors(q))
    k, v = (Pool(x.bits, *widened(*x.tensors)) for x in (k, v))
    o, lse = _launch(widened(q)[0], k, v, table, lens, newest, scaling, cap, rest, splits)
    return o.to(q.dtype), lse


def _launch(
    q: Tensor, k: Pool, v: Pool, table: Tensor, lens: Tensor, newest: Tensor, scaling: float, cap: float | None,
    rest: tuple[Tensor, Tensor] | None, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, D = q.shape
    Hkv, E = table.shape[1], channels(v)
    G = H // Hkv
    part_o = torch.empty((B, H, splits, E), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((B, H, splits), dtype=torch.float32, device=q.device)
    # With 16 bits the pointers to scale and zero are not read.
    pools = [t for x in (k, v) for t in (x.tensors if x.bits < 16 else [x.words] * 3)]
    strides = [stride for t in (q, table) for stride in t.stride()[:2]]
    with torch.cuda.device(q.get_device()):
        quant_split_kernel[(B * Hkv, splits, -(-G // BLOCK_G))](
            q, *pools, table, lens, newest, part_o, part_lse, scaling, G, Hkv, *strides,
            **split_constants(q.dtype, D, E, k.bits, v.bits, cap), **options(q.dtype, D, k.bits),
        )  # fmt: skip
    return merge.merge(part_o, part_lse, rest, q.dtype)


def _check(q: Tensor, k: Pool, v: Pool, table: Tensor, lens: Tensor, newest: Tensor, splits: int | None) -> None:
    tensors = {"q": (q, 3), "table": (table, 3), "lens": (lens, 2), "newest": (newest, 2)}
    tensors |= {f"{name} of k": (t, 3) for name, t in zip(("words", "scale", "zero"), k.tensors, strict=False)}
    tensors |= {f"{name} of v": (t, 3) for name, t in zip(("words", "scale", "zero"), v.tensors, strict=False)}
    for name, (tensor, axes) in tensors.items():
        if tensor.ndim != axes:
            raise ValueError(f"{name} must have {axes} axes, got shape {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {tensor.device}")
        if " of " in name and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    B, H, D = q.shape
    Hkv, M = table.shape[1:]
    E = channels(v)
    if not decode.fits(D, E) or q.stride(2) != 1:
        raise ValueError(
            f"q must be [B, H, D], contiguous in D, a multiple of 16 up to 256, got {tuple(q.shape)} in {q.stride()} "
            f"and values of {E}"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be one of {DTYPES}, got {q.dtype}")
    stored = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float16
    for name, pool in (("k", k), ("v", v)):
        P, bits = pool.words.shape[0], pool.bits
        shape = (P, PAGE * bits // 32, D) if name == "k" else (P, PAGE, -(-E * bits // 32))
        group = (P, PAGE // GROUP, D) if name == "k" else (P, PAGE, -(-E // GROUP))
        whole = (P, PAGE, D if name == "k" else E)
        expected = [(shape, torch.int32), (group, stored), (group, stored)] if bits < 16 else [(whole, q.dtype)]
        actual = [(tuple(t.shape), t.dtype) for t in pool.tensors]
        if bits not in BITS or actual != expected:
            raise ValueError(f"{name} of {bits} bits must be {expected} for q {tuple(q.shape)} {q.dtype}, got {actual}")
    if k.words.shape[0] != v.words.shape[0]:
        raise ValueError(f"k and v must have as many pages, got {tuple(k.words.shape)} and {tuple(v.words.shape)}")
    if not table.dtype == lens.dtype == newest.dtype == torch.int32:
        raise ValueError(f"table, lens, newest must be torch.int32, got {table.dtype}, {lens.dtype}, {newest.dtype}")
    if table.shape[0] != B or not Hkv or H % Hkv or (table.stride(2) != 1 and M > 1):
        raise ValueError(f"table must be [{B}, Hkv, M] with Hkv a divisor of {H}, got {tuple(table.shape)}")
    for name, tensor in (("lens", lens), ("newest", newest)):
        if tensor.shape != table.shape[:2] or not tensor.is_contiguous():
            raise ValueError(f"{name} must be {tuple(table.shape[:2])} as table, got {tuple(tensor.shape)}")
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits must be 1 to {MAX_SPLITS}, got {splits}")
    if lens.device.type == "cpu" and lens.numel():
        quantized = lens - newest
        if quantized.min() < 0 or quantized.max() > M * PAGE or (quantized % PAGE).any():
            raise ValueError(
                f"lens - newest must be 0 to {M} whole pages, got {quantized.tolist()} for {tuple(table.shape)}"
            )


LIMITS = tile_limits(255, "quant_decode.split")
# Not every pair: the cost of keys or values depends on their own bits (least at 16), and float16 compiles as bfloat16.
GATED_BITS = {"fp16": ((4, 4),), "bf16": ((8, 8), (4, 4), (2, 2), (8, 4)), "fp32": ((4, 4),)}


def variants() -> Iterator[Variant]:
    """The specialisations that `decode_pages` uses, for the pairs of `GATED_BITS`."""
    for dtype, dim in head_dims():
        yield from (split_variant(dtype, dim, dim, *bits) for bits in GATED_BITS[dtype])
    yield split_variant("bf16", 256, 256, 4, 4, cap=50.0)
    yield split_variant("bf16", 192, 128, 4, 4)


def split_variant(
    dtype: str, dim: int, value_dim: int, k_bits: int, v_bits: int, *, cap: float | None = None
) -> Variant:
    """`quant_split_kernel` for one dtype, numbers of channels and pair of bits."""
    pointers = {"q_ptr": f"*{dtype}", "o_ptr": "*fp32", "lse_ptr": "*fp32"}
    pointers |= dict.fromkeys(("table_ptr", "lens_ptr", "newest_ptr"), "*i32")
    stored = "*bf16" if dtype == "bf16" else "*fp16"
    for name, bits in (("k", k_bits), ("v", v_bits)):
        words, group = ("*i32", stored) if bits < 16 else (f"*{dtype}", f"*{dtype}")
        pointers |= {f"{name}_ptr": words, f"{name}_scale_ptr": group, f"{name}_zero_ptr": group}
    return Variant(
        kernel="quant_decode.split",
        name=f"{dtype} {widths(dim, value_dim)} kv{k_bits}v{v_bits}{' cap' if cap else ''}",
        fn=quant_split_kernel,
        pointers=pointers,
        floats=("scaling",),
        aligned=("stride_q",),
        constants=split_constants(TORCH[dtype], dim, value_dim, k_bits, v_bits, cap),
        options=options(TORCH[dtype], dim, k_bits),
    )
