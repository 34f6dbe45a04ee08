# ruff: noqa: N803, N806
"""Top-k: the highest scores of every row as ascending unit indices, equal to `select.top`, without sorting.

The bits of a float map to an unsigned number in the same order. With t the count-th highest of them,
a unit is chosen if it is above t, or equal to t and among the first `count - #above` such units; its index in the
output is the number of chosen units before it.

Rows of at most `SMALL` scores: one program keeps the row in registers and determines t bit by bit. Longer rows: four
passes determine t byte by byte from histograms over many programs; the last one also counts, for every block and last
byte, the scores above and equal, so that the writing pass has the output offset of each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lceval.kernels.launch import jit, runs_kernels, tl
from lceval.kernels.select import top
from lceval.kernels.variant import SHARED, Limit, Variant

# A context of 128k tokens in pages of 16, in the registers of 16 warps.
SMALL = 8192
BLOCK = 4096


def reference(scores: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The definition, by `select.top`.

    Args:
        scores: [R, U] float32 without NaN.
        sizes: [R] int32, number of valid scores per row.
        count: scores to choose per row.

    Returns:
        [R, count] int32: the chosen indices in ascending order, padded with -1 for rows with fewer than `count` scores.
    """
    out = torch.full((len(scores), count), -1, dtype=torch.int32, device=scores.device)
    for row, size in enumerate(sizes.tolist()):
        chosen = top(scores[row, :size], count).nonzero().squeeze(-1)
        out[row, : len(chosen)] = chosen.int()
    return out


_jit = jit("count", "blocks")


@_jit
def ordered(x):  # type: ignore[no-untyped-def]
    """uint32 keys in the order of the floats; both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    flip = tl.where(bits < 0, -1, -2147483648)
    return (bits ^ flip).to(tl.uint32, bitcast=True)


@_jit
def fill(out_ptr, size, count, BLOCK_I: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write -1 to the unused output of a row with fewer than `count` scores."""
    for start in range(size, count, BLOCK_I):
        offs = start + tl.arange(0, BLOCK_I)
        tl.store(out_ptr + offs, -1, mask=offs < count)


@_jit
def small_kernel(  # type: ignore[no-untyped-def]
    scores_ptr, sizes_ptr, out_ptr, count, stride, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """One row of at most BLOCK_U scores. out: [R, count] int32."""
    row = tl.program_id(0).to(tl.int64)
    size = tl.load(sizes_ptr + row)
    out_ptr += row * count
    fill(out_ptr, size, count, 256)
    offs = tl.arange(0, BLOCK_U)
    mask = offs < size
    key = ordered(tl.load(scores_ptr + row * stride + offs, mask=mask, other=0.0))

    need = tl.minimum(count, size)
    t = tl.zeros([], tl.uint32)
    for i in range(32):
        higher = t | (tl.full([], 1, tl.uint32) << (31 - i))
        t = tl.where(tl.sum((mask & (key >= higher)).to(tl.int32), 0) >= need, higher, t)
    above = (mask & (key > t)).to(tl.int32)
    equal = (mask & (key == t)).to(tl.int32)
    # Both counts in one scan: neither exceeds 2**15.
    before = tl.cumsum(above | (equal << 16), 0) - (above | (equal << 16))
    room = need - tl.sum(above, 0)
    ties = before >> 16
    place = (before & 0xFFFF) + tl.minimum(ties, room)
    tl.store(out_ptr + place, offs, mask=(above > 0) | ((equal > 0) & (ties < room)))


@_jit
def threshold(counts_ptr, need, passes):  # type: ignore[no-untyped-def]
    """The first `passes` bytes of t, and how many scores with this prefix are still needed."""
    offs = tl.arange(0, 256)
    prefix = tl.zeros([], tl.uint32)
    for i in range(passes):
        counts = tl.load(counts_ptr + i * 256 + offs)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        # `above` decreases with the byte: the threshold's byte is the first with fewer than `need` above it.
        byte = tl.sum((above >= need).to(tl.int32), 0)
        need -= tl.sum(tl.where(offs == byte, above, 0), 0)
        prefix = (prefix << 8) | byte.to(tl.uint32)
    return prefix, need


@_jit
def count_kernel(  # type: ignore[no-untyped-def]
    scores_ptr, sizes_ptr, counts_ptr, parts_ptr, count, blocks, stride, PASS: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Histogram of byte PASS over the scores of one block of a row whose preceding bytes equal the threshold's.

    counts: [R, 4, 256] int32, initially zeros, the histograms of the rows. parts: [R, blocks, 2, 256] int32, written
    in the last pass: for each last byte, the number of scores of a block above and equal to it.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    size = tl.load(sizes_ptr + row)
    if block * BLOCK_U >= size:
        return
    counts_ptr += row * 1024
    prefix, _ = threshold(counts_ptr, tl.minimum(count, size), PASS)
    offs = block * BLOCK_U + tl.arange(0, BLOCK_U)
    mask = offs < size
    key = ordered(tl.load(scores_ptr + row * stride + offs, mask=mask, other=0.0))
    byte = ((key >> (24 - 8 * PASS)) & 255).to(tl.int32)
    # Two shifts, since a shift by 32 bits is undefined.
    start = (key >> (24 - 8 * PASS)) >> 8
    histogram = tl.histogram(byte, 256, mask=mask & (start == prefix))
    bins = tl.arange(0, 256)
    tl.atomic_add(counts_ptr + PASS * 256 + bins, histogram, mask=histogram > 0, sem="relaxed")
    if PASS == 3:
        above = tl.sum((mask & (start > prefix)).to(tl.int32), 0) + tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        part = parts_ptr + (row * blocks + block) * 512 + bins
        tl.store(part, above)
        tl.store(part + 256, histogram)


@_jit
def write_kernel(  # type: ignore[no-untyped-def]
    scores_ptr, sizes_ptr, counts_ptr, parts_ptr, out_ptr, count, blocks, stride,
    BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The chosen indices of one block of a row. out: [R, count] int32."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    size = tl.load(sizes_ptr + row)
    out_ptr += row * count
    if block == 0:
        fill(out_ptr, size, count, 256)
    if block * BLOCK_U >= size:
        return
    t, room = threshold(counts_ptr + row * 1024, tl.minimum(count, size), 4)
    part = parts_ptr + row * blocks * 512 + (t & 255).to(tl.int32)
    above_before = tl.zeros([BLOCK_I], tl.int32)
    ties_before = tl.zeros([BLOCK_I], tl.int32)
    for start in range(0, block, BLOCK_I):
        offs_i = start + tl.arange(0, BLOCK_I)
        above_before += tl.load(part + offs_i * 512, mask=offs_i < block, other=0)
        ties_before += tl.load(part + offs_i * 512 + 256, mask=offs_i < block, other=0)

    offs = block * BLOCK_U + tl.arange(0, BLOCK_U)
    mask = offs < size
    key = ordered(tl.load(scores_ptr + row * stride + offs, mask=mask, other=0.0))
    above = (mask & (key > t)).to(tl.int32)
    equal = (mask & (key == t)).to(tl.int32)
    before = tl.cumsum(above | (equal << 16), 0) - (above | (equal << 16))
    ties = tl.sum(ties_before, 0) + (before >> 16)
    place = tl.sum(above_before, 0) + (before & 0xFFFF) + tl.minimum(ties, room)
    tl.store(out_ptr + place, offs, mask=(above > 0) | ((equal > 0) & (ties < room)))


OPTIONS: dict[str, int | bool] = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}


def small_launch(width: int) -> tuple[dict[str, int], dict[str, int | bool]]:
    """Constants and options of `small_kernel` for rows of at most `width` scores: up to 16 scores per thread."""
    BLOCK_U = max(1024, 1 << (width - 1).bit_length())
    return {"BLOCK_U": BLOCK_U}, OPTIONS | {"num_warps": 16 if BLOCK_U > 4096 else 8}


def top_indices(scores: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The `count` highest scores of each row; ties keep the earlier.

    CUDA tensors run the kernels, without waiting for the device; others run `reference`, or the kernels if
    TRITON_INTERPRET=1 was set before the import.

    Args:
        scores: [R, U] float32 without NaN, rows contiguous; scores past a row's size are not read.
        sizes: [R] int32 in [0, U].
        count: scores to choose per row, at least 1.

    Returns:
        As `reference`.

    Raises:
        ValueError: a shape, dtype, device, layout or count that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    shape = tuple(scores.shape)
    if scores.ndim != 2 or scores.dtype != torch.float32 or (shape[1] > 1 and scores.stride(1) != 1):
        raise ValueError(f"scores must be [R, U] torch.float32, rows contiguous, got {shape} {scores.dtype}")
    if sizes.shape != shape[:1] or sizes.dtype != torch.int32 or not sizes.is_contiguous():
        raise ValueError(f"sizes must be [{shape[0]}] torch.int32, got {tuple(sizes.shape)} {sizes.dtype}")
    if sizes.device != scores.device:
        raise ValueError(f"sizes must be on scores' device, {scores.device}, got {sizes.device}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not runs_kernels(scores, "top_indices"):
        return reference(scores, sizes, count)
    return _launch(scores, sizes, count)


def _launch(scores: Tensor, sizes: Tensor, count: int) -> Tensor:
    rows, width = scores.shape
    stride = scores.stride(0)
    out = torch.empty((rows, count), dtype=torch.int32, device=scores.device)
    with torch.cuda.device(scores.get_device()):
        if width <= SMALL:
            constants, options = small_launch(width)
            small_kernel[(rows,)](scores, sizes, out, count, stride, **constants, **options)
            return out
        blocks = -(-width // BLOCK)
        counts = torch.zeros((rows, 4, 256), dtype=torch.int32, device=scores.device)
        parts = torch.empty((rows, blocks, 2, 256), dtype=torch.int32, device=scores.device)
        grid = (rows, blocks)
        for i in range(4):
            count_kernel[grid](
                scores, sizes, counts, parts, count, blocks, stride, PASS=i, BLOCK_U=BLOCK, **OPTIONS
            )  # fmt: skip
        write_kernel[grid](
            scores, sizes, counts, parts, out, count, blocks, stride, BLOCK_U=BLOCK, BLOCK_I=64, **OPTIONS
        )  # fmt: skip
    return out


LIMITS = {(f"topk.{name}", "fp32"): Limit(168, SHARED) for name in ("small", "count", "write")}


def variants() -> Iterator[Variant]:
    """The specialisations that `top_indices` uses."""
    f32, i32 = "*fp32", "*i32"
    rows = {"scores_ptr": f32, "sizes_ptr": i32, "counts_ptr": i32, "parts_ptr": i32, "out_ptr": i32}
    kinds: list[tuple[str, Any, dict[str, int], dict[str, int | bool]]] = []
    kinds += [("small", small_kernel, *small_launch(width)) for width in (1024, 2048, 4096, SMALL)]
    kinds += [("count", count_kernel, {"PASS": i, "BLOCK_U": BLOCK}, OPTIONS) for i in range(4)]
    kinds += [("write", write_kernel, {"BLOCK_U": BLOCK, "BLOCK_I": 64}, OPTIONS)]
    for name, fn, constants, options in kinds:
        yield Variant(
            kernel=f"topk.{name}",
            name=" ".join(["fp32", *map(str, constants.values())]),
            fn=fn,
            pointers={key: kind for key, kind in rows.items() if key in fn.arg_names},
            floats=(),
            aligned=("stride",),
            constants=constants,
            options=options,
        )
