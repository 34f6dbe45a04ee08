# ruff: noqa: N803, N806
"""Attention that every key receives from the last T queries: the scores of SnapKV, TOVA and H2O, in two passes over K.

With a_gts = softmax_s(scaling * q_gt k_s), with the model's cap and sinks, where query t attends to the keys up to
S - T + t,

    received_s = 1/G sum_g sum_t a_gts            (`received`: H2O's column sums)
    window_s   = 1/T received_s                   (`window_scores`: SnapKV, TOVA, attention of a question)

for each KV head and its G = H // Hkv query heads. Softmax needs a row's sum before any of its weights, so the first
pass computes only lse_gt (split into shares of the keys if there are few rows; a sink is one more share), and the
second recomputes the logits and sums exp(logit - lse) over the rows. At most one tile of weights is materialized.

Rows are packed token by token, r = t * G + g: K crosses the bus once for all G heads, and the rows of a tile have
nearly the same last key. Pooling, scores of the window itself and budgets belong to the policies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lceval.kernels import dense
from lceval.kernels.decode import choose_splits
from lceval.kernels.launch import (
    DTYPES,
    HEAD_DIMS,
    OPTIONS,
    jit,
    multiprocessors,
    runs_kernels,
    tl,
    widened,
)
from lceval.kernels.paged import PAGE
from lceval.kernels.softmax import Softmax, log2_logits
from lceval.kernels.variant import TORCH, Variant, head_dims, tile_limits


def reference(q: Tensor, k: Tensor, softmax: Softmax) -> Tensor:
    """The definition, in float32, in blocks of queries. Every test compares against this.

    Args:
        q: [B, H, T, D], queries of the last T of S positions, after RoPE.
        k: [B, Hkv, S, D], S >= T.
        softmax: of the logits; its scaling is usually D ** -0.5.

    Returns:
        [B, Hkv, S] float32: summed over the queries, averaged over the G query heads.
    """
    B, H, T, D = q.shape
    Hkv, S = k.shape[1:3]
    sums = torch.zeros(B, Hkv, S, dtype=torch.float32, device=q.device)
    if not T:
        return sums
    q = q.reshape(B, Hkv, -1, T, D).float()
    keys = k[:, :, None].transpose(3, 4).float()
    step = dense.block_rows(B * H * S, q.device)
    for start in range(0, T, step):
        block = q[..., start : start + step, :]
        rows = block.shape[3]
        visible = S - T + start + rows  # no row of this block attends to later keys
        products = torch.matmul(block, keys[..., :visible])
        future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
        products[..., -rows:].masked_fill_(future, -math.inf)
        sums[..., :visible] += softmax.weights(products).sum(3).mean(2)
    return sums


# A new context length must not recompile.
_jit = jit("G", "kv_heads", "T", "S")


@_jit
def lse_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, lse_ptr, scaling, G, kv_heads, T, S,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of a block of rows over one share of the keys. lse: [splits, B, Hkv, T * G], contiguous."""
    LN2: tl.constexpr = 0.6931471805599453
    # The last rows attend to the most keys, so they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // kv_heads
    h = bh % kv_heads
    split = tl.program_id(2)
    splits = tl.num_programs(2)

    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, D_PAD)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < D
    mask_r = offs_r < T * G
    t = offs_r // G
    q_row = q_ptr + b * stride_qb + (h * G + offs_r % G) * stride_qh + t.to(tl.int64) * stride_qt
    q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0)
    newest = S - T + t
    tiles = tl.cdiv(S - T + tl.minimum((block * BLOCK_R + BLOCK_R - 1) // G, T - 1) + 1, BLOCK_S)
    # 64-bit product: 2**17 tiles times 128 shares are 2**24, and a longer context would exceed 2**31.
    first = (split.to(tl.int64) * tiles // splits).to(tl.int32)
    last = ((split + 1).to(tl.int64) * tiles // splits).to(tl.int32)

    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)  # noqa: E741
    k_head = k_ptr + b * stride_kb + h * stride_kh
    for tile in range(first, last):
        slot = tile * BLOCK_S + offs_s
        mask = (slot < S)[:, None] & mask_d[None, :]
        k = tl.load(k_head + slot.to(tl.int64)[:, None] * stride_ks + offs_d[None, :], mask=mask, other=0.0)
        scores = log2_logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scaling, CAP)
        scores = tl.where(slot[None, :] <= newest[:, None], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        # A share can start after a row's last key.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp2(m - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)  # noqa: E741
        m = m_new
    lse = tl.where(l > 0, (m + tl.log2(tl.where(l > 0, l, 1.0))) * LN2, float("-inf"))
    out = lse_ptr + (split * tl.num_programs(1) + bh) * (T.to(tl.int64) * G) + offs_r
    tl.store(out, lse, mask=mask_r)


@_jit
def received_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, lse_ptr, out_ptr, scaling, weight, G, kv_heads, T, S,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Column sums of one tile of keys. lse: [B, Hkv, T * G], out: [B, Hkv, S], contiguous."""
    LOG2E: tl.constexpr = 1.4426950408889634
    start = tl.program_id(0) * BLOCK_S  # the most rows attend to the first keys, so they start first
    bh = tl.program_id(1).to(tl.int64)
    b = bh // kv_heads
    h = bh % kv_heads

    slot = start + tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, D_PAD)
    mask_d = offs_d < D
    mask_s = slot < S
    k_row = k_ptr + b * stride_kb + h * stride_kh + slot.to(tl.int64) * stride_ks
    k = tl.load(k_row[:, None] + offs_d[None, :], mask=mask_s[:, None] & mask_d[None, :], other=0.0)
    rows = T * G
    q_head = q_ptr + b * stride_qb + h * G * stride_qh
    lse_head = lse_ptr + bh * rows
    acc = tl.zeros([BLOCK_S], tl.float32)
    first = tl.maximum(0, start - (S - T)) * G // BLOCK_R
    for block in range(first, tl.cdiv(rows, BLOCK_R)):
        offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < rows
        t = offs_r // G
        q_row = q_head + (offs_r % G) * stride_qh + t.to(tl.int64) * stride_qt
        q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0)
        # Rows past the last have weight exp(-inf).
        lse = tl.load(lse_head + offs_r, mask=mask_r, other=float("inf")) * LOG2E
        scores = log2_logits(tl.dot(k, tl.trans(q), input_precision="ieee"), scaling, CAP) - lse[None, :]
        visible = slot[:, None] <= (S - T + t)[None, :]
        acc += tl.sum(tl.exp2(tl.where(visible, scores, float("-inf"))), 1)
    tl.store(out_ptr + bh * S + slot, acc * weight, mask=mask_s)


def constants(kernel: str, dtype: torch.dtype, head_dim: int, cap: float | None = None) -> dict[str, Any]:
    """The compile-time arguments of `lse` or `received`; with `OPTIONS` they define the AOT variants.

    The stationary operand has 64 rows, one warp group's HGMMA tile; with two or three tiles of the streamed operand it
    takes 25 to 80 KiB. Float32 runs on FMAs, as in decode.
    """
    D_PAD = 1 << (head_dim - 1).bit_length()
    stays, streams = (16, 16) if dtype == torch.float32 else (64, 64 if D_PAD <= 128 else 32)
    BLOCK_R, BLOCK_S = (stays, streams) if kernel == "lse" else (streams, stays)
    return {"D": head_dim, "D_PAD": D_PAD, "BLOCK_R": BLOCK_R, "BLOCK_S": BLOCK_S, "CAP": cap or 0.0}


def fits(k: Tensor) -> bool:
    """Whether the kernels have keys of this number of channels."""
    return k.shape[-1] in HEAD_DIMS


def received(q: Tensor, k: Tensor, softmax: Softmax, *, splits: int | None = None) -> Tensor:
    """Causal attention that every key receives from the last T queries: sum over queries, mean over G query heads.

    CUDA tensors run the kernels, without waiting for the device; others run `reference`, or the kernels if
    TRITON_INTERPRET=1 was set before the import. No gradient flows through the kernels.

    Args:
        q: [B, H, T, D] float16, bfloat16 or float32, D a multiple of 16 up to 256, any G = H // Hkv.
        k: [B, Hkv, S, D] in q's dtype, S >= T; the last query sees the last key.
        softmax: of the logits.
        splits: shares of the keys in the first pass; None chooses them from the shapes and the device.

    Returns:
        [B, Hkv, S] float32.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    _check(q, k, splits)
    return _received(q, k, softmax, 1, splits)


def window_scores(q: Tensor, k: Tensor, softmax: Softmax, *, splits: int | None = None) -> Tensor:
    """As `received`, averaged over the T queries too: [B, Hkv, S] float32, each at most 1. Zeros where T == 0."""
    _check(q, k, splits)
    return _received(q, k, softmax, max(1, q.shape[2]), splits)


def reference_scores(q: Tensor, k: Tensor, softmax: Softmax) -> Tensor:
    """`window_scores` by `reference`, wherever the tensors are."""
    return reference(q, k, softmax) / max(1, q.shape[2])


def _received(q: Tensor, k: Tensor, softmax: Softmax, divisor: int, splits: int | None) -> Tensor:
    if not runs_kernels(q, "scoring"):
        return reference(q, k, softmax) / divisor
    if splits is None:
        R = q.shape[2] * (q.shape[1] // k.shape[1])
        blocks = -(-R // constants("lse", q.dtype, q.shape[3])["BLOCK_R"])
        splits = choose_splits(max(1, k.shape[0] * k.shape[1] * blocks), -(-k.shape[2] // PAGE), multiprocessors(q))
    q, k = widened(q, k)
    return _launch(q, k, softmax, divisor, splits)


def _launch(q: Tensor, k: Tensor, softmax: Softmax, divisor: int, splits: int) -> Tensor:
    B, H, T, D = q.shape
    Hkv, S = k.shape[1:3]
    G = H // Hkv
    if not (B and T):
        return torch.zeros((B, Hkv, S), dtype=torch.float32, device=q.device)
    out = torch.empty((B, Hkv, S), dtype=torch.float32, device=q.device)
    part = torch.empty((splits, B, Hkv, T * G), dtype=torch.float32, device=q.device)
    shapes = (G, Hkv, T, S, *q.stride()[:3], *k.stride()[:3])
    with torch.cuda.device(q.get_device()):
        sizes = constants("lse", q.dtype, D, softmax.cap)
        grid = (-(-T * G // sizes["BLOCK_R"]), B * Hkv, splits)
        lse_kernel[grid](q, k, part, softmax.scaling, *shapes, **sizes, **OPTIONS)
        lse = part[0] if splits == 1 else part.logsumexp(0)
        if softmax.sink is not None:
            sink = softmax.sink.to(lse.device, torch.float32).view(Hkv, 1, G)
            lse = torch.logaddexp(lse.view(B, Hkv, T, G), sink).view_as(lse)
        sizes = constants("received", q.dtype, D, softmax.cap)
        received_kernel[(-(-S // sizes["BLOCK_S"]), B * Hkv)](
            q, k, lse, out, softmax.scaling, 1 / (G * divisor), *shapes, **sizes, **OPTIONS
        )
    return out


def _check(q: Tensor, k: Tensor, splits: int | None) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have 4 axes, got shape {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {tensor.device}")
        if tensor.stride(3) != 1:
            raise ValueError(f"the last axis of {name} must be contiguous, got strides {tensor.stride()}")
    B, H, T, D = q.shape
    if D not in HEAD_DIMS:
        raise ValueError(f"q must be [B, H, T, D] with D a multiple of 16 up to 256, got {tuple(q.shape)}")
    if q.dtype not in DTYPES or q.dtype != k.dtype:
        raise ValueError(f"q and k must share one of {DTYPES}, got {q.dtype} and {k.dtype}")
    if k.shape[0] != B or k.shape[3] != D or not k.shape[1] or H % k.shape[1] or k.shape[2] < T:
        raise ValueError(f"k must be [{B}, Hkv, S, {D}], Hkv a divisor of {H} and S >= {T}, got {tuple(k.shape)}")
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")


# 168 registers allow three programs of 128 threads per multiprocessor (65,536 registers).
LIMITS = tile_limits(168, "window.lse", "window.received")


def variants() -> Iterator[Variant]:
    """The specialisations that `received` and `window_scores` use."""
    for (dtype, dim), cap in [*product(head_dims(), (None,)), (("bf16", 256), 50.0)]:
        for kernel, fn in (("lse", lse_kernel), ("received", received_kernel)):
            pointers = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "lse_ptr": "*fp32"}
            yield Variant(
                kernel=f"window.{kernel}",
                name=f"{dtype} D{dim}{' cap' if cap else ''}",
                fn=fn,
                pointers=pointers if kernel == "lse" else pointers | {"out_ptr": "*fp32"},
                floats=("scaling",) if kernel == "lse" else ("scaling", "weight"),
                aligned=("stride_q", "stride_k"),
                constants=constants(kernel, TORCH[dtype], dim, cap),
                options=OPTIONS,
            )
