# ruff: noqa: N803, N806
"""Shifted sparse attention (LongLoRA, Chen et al. 2024, arXiv 2309.12307, section 3.2), forward and backward.

The sequence is split into groups of `group` tokens with causal attention inside each. For the second half of the query
heads the groups are shifted by half a group, so that information crosses group borders in the next layer:

    shift_h = 0 for h < H // 2, else group / 2
    start_h(t) = max(0, (t + shift_h) // group * group - shift_h)
    o_ht = softmax(scaling * q_ht K[start_h(t) .. t]^T) V[start_h(t) .. t]

LongLoRA rolls the shifted heads: the last half group and the first form one group, in which the first tokens of a text
attend to its last ones. Here nothing wraps: the first and the last half group are separate groups, so no token attends
to a later one, and at the edges half of the heads lose half a group of past tokens.

Sequences differ in length: rows from lens[b] on are padding and get zeros. With s = scaling q k^T,
p = exp(s - lse) and delta = sum_d o do, the gradients are dv = p^T do, ds = p (do v^T - delta), dq = scaling ds k and
dk = scaling ds^T q. A program owns a tile of dk and dv and sums over the G query heads: no atomics, so a training
step is bitwise reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lceval.kernels.launch import DTYPES, NEEDS_MORE_WARPS, jit, runs_kernels, tl, widened
from lceval.kernels.variant import TORCH, Variant, tile_limits

HEAD_DIMS = (64, 128)


def reference(
    q: Tensor, k: Tensor, v: Tensor, lens: Tensor | None, group: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """The definition, in float32 (float64 for float64 inputs), group by group, differentiable by autograd.

    Args:
        q: [B, H, T, D], after RoPE.
        k, v: [B, Hkv, T, D].
        lens: [B] int32, tokens of each sequence; None if all have T.
        group: tokens per group, even.
        scaling: factor on q K^T, usually D ** -0.5.

    Returns:
        o [B, H, T, D] and lse [B, H, T] (natural log); zeros and -inf at padding.
    """
    H, T = q.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    halves = []
    for heads, shift in ((slice(0, H // 2), 0), (slice(H // 2, H), group // 2)):
        parts = [(q[:, heads, :0], q[:, heads, :0, 0])]
        for first in range(-shift, T, group):
            span = slice(max(0, first), min(T, first + group))
            scores = scaling * (q[:, heads, span] @ k[:, heads, span].transpose(2, 3))
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
            scores = scores.masked_fill(future, -math.inf)
            parts.append((scores.softmax(-1) @ v[:, heads, span], scores.logsumexp(-1)))
        halves.append([torch.cat(x, 2) for x in zip(*parts, strict=True)])
    o, lse = (torch.cat(x, 1) for x in zip(*halves, strict=True))
    if lens is None:
        return o, lse
    padding = (torch.arange(T, device=q.device) >= lens[:, None])[:, None]
    return o.masked_fill(padding[..., None], 0.0), lse.masked_fill(padding, -math.inf)


# Every batch of a training run has a different length.
_jit = jit("G", "heads", "kv_heads", "T", "group")


@_jit
def forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, lens_ptr, o_ptr, lse_ptr, scaling, G, heads, T, group,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head. o: [B, H, T, D], lse: [B, H, T], contiguous."""
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    start = tl.program_id(0) * BLOCK_M
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    n = tl.load(lens_ptr + b)
    shift = tl.where(h >= heads // 2, group // 2, 0).to(tl.int32)

    offs_m = start + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    mask_m = offs_m < n
    oldest = (offs_m + shift) // group * group - shift
    q_row = q_ptr + b * stride_qb + h * stride_qh + offs_m.to(tl.int64) * stride_qt
    q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask_m[:, None], other=0.0)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    k_head = k_ptr + b * stride_kb + h // G * stride_kh
    v_head = v_ptr + b * stride_vb + h // G * stride_vh
    first = tl.maximum(0, (start + shift) // group * group - shift)
    for at in range(first, tl.minimum(start + BLOCK_M, n), BLOCK_N):
        key = at + offs_n
        row = key.to(tl.int64)[:, None]
        mask_n = (key < n)[:, None]
        k = tl.load(k_head + row * stride_kt + offs_d[None, :], mask=mask_n, other=0.0)
        v = tl.load(v_head + row * stride_vt + offs_d[None, :], mask=mask_n, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scaling * LOG2E)
        visible = (key[None, :] <= offs_m[:, None]) & (key[None, :] >= oldest[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        # A tile of queries can span two groups.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - base)
        p = tl.exp2(scores - base[:, None])
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    real = mask_m & (l > 0)
    l = tl.where(real, l, 1.0)  # noqa: E741
    out = bh * T + offs_m
    tl.store(lse_ptr + out, tl.where(real, (m + tl.log2(l)) * LN2, float("-inf")), mask=offs_m < T)
    o = tl.where(real[:, None], acc / l[:, None], 0.0).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + out[:, None] * D + offs_d[None, :], o, mask=(offs_m < T)[:, None])


@_jit
def query_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, lens_ptr, o_ptr, lse_ptr, do_ptr, delta_ptr, dq_ptr, scaling, G, heads, T, group,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta and dq of a tile of queries. o, do, dq: [B, H, T, D], lse, delta: [B, H, T], contiguous."""
    LOG2E: tl.constexpr = 1.4426950408889634
    start = tl.program_id(0) * BLOCK_M
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    n = tl.load(lens_ptr + b)
    shift = tl.where(h >= heads // 2, group // 2, 0).to(tl.int32)

    offs_m = start + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    mask_m = offs_m < n
    oldest = (offs_m + shift) // group * group - shift
    out = bh * T + offs_m
    at_o = out[:, None] * D + offs_d[None, :]
    do = tl.load(do_ptr + at_o, mask=mask_m[:, None], other=0.0)
    o = tl.load(o_ptr + at_o, mask=mask_m[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + out, delta, mask=offs_m < T)
    lse = tl.load(lse_ptr + out, mask=mask_m, other=float("inf")) * LOG2E
    q_row = q_ptr + b * stride_qb + h * stride_qh + offs_m.to(tl.int64) * stride_qt
    q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask_m[:, None], other=0.0)

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    k_head = k_ptr + b * stride_kb + h // G * stride_kh
    v_head = v_ptr + b * stride_vb + h // G * stride_vh
    first = tl.maximum(0, (start + shift) // group * group - shift)
    for at in range(first, tl.minimum(start + BLOCK_M, n), BLOCK_N):
        key = at + offs_n
        row = key.to(tl.int64)[:, None]
        mask_n = (key < n)[:, None]
        k = tl.load(k_head + row * stride_kt + offs_d[None, :], mask=mask_n, other=0.0)
        v = tl.load(v_head + row * stride_vt + offs_d[None, :], mask=mask_n, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scaling * LOG2E) - lse[:, None]
        visible = (key[None, :] <= offs_m[:, None]) & (key[None, :] >= oldest[:, None])
        p = tl.exp2(tl.where(visible, scores, float("-inf")))
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        acc = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, acc, input_precision="ieee")
    tl.store(dq_ptr + at_o, (acc * scaling).to(dq_ptr.dtype.element_ty), mask=(offs_m < T)[:, None])


@_jit
def key_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, lens_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, scaling, G, kv_heads, T, group,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, over the G query heads. do: [B, H, T, D]; dk, dv: [B, Hkv, T, D], contiguous."""
    LOG2E: tl.constexpr = 1.4426950408889634
    start = tl.program_id(0) * BLOCK_N
    bh = tl.program_id(1).to(tl.int64)
    b = bh // kv_heads
    h_kv = bh % kv_heads
    heads = kv_heads * G
    n = tl.load(lens_ptr + b)

    key = start + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    mask_n = (key < n)[:, None]
    k_row = k_ptr + b * stride_kb + h_kv * stride_kh + key.to(tl.int64) * stride_kt
    v_row = v_ptr + b * stride_vb + h_kv * stride_vh + key.to(tl.int64) * stride_vt
    k = tl.load(k_row[:, None] + offs_d[None, :], mask=mask_n, other=0.0)
    v = tl.load(v_row[:, None] + offs_d[None, :], mask=mask_n, other=0.0)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    for g in range(G):
        h = h_kv * G + g
        shift = tl.where(h >= heads // 2, group // 2, 0).to(tl.int32)
        newest = ((key + shift) // group + 1) * group - shift  # one past the group's last query
        past = tl.minimum(((start + BLOCK_N - 1 + shift) // group + 1) * group - shift, n)
        q_head = q_ptr + b * stride_qb + h * stride_qh
        out = (b * heads + h) * T
        for at in range(start, past, BLOCK_M):
            t = at + offs_m
            mask_m = t < n
            q = tl.load(q_head + t.to(tl.int64)[:, None] * stride_qt + offs_d[None, :], mask=mask_m[:, None], other=0.0)
            do = tl.load(do_ptr + (out + t)[:, None] * D + offs_d[None, :], mask=mask_m[:, None], other=0.0)
            lse = tl.load(lse_ptr + out + t, mask=mask_m, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + out + t, mask=mask_m, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scaling * LOG2E) - lse[None, :]
            visible = (key[:, None] <= t[None, :]) & (newest[:, None] > t[None, :])
            p = tl.exp2(tl.where(visible, scores, float("-inf")))
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision="ieee")
    at_k = (bh * T + key)[:, None] * D + offs_d[None, :]
    tl.store(dk_ptr + at_k, (dk * scaling).to(dk_ptr.dtype.element_ty), mask=(key < T)[:, None])
    tl.store(dv_ptr + at_k, dv.to(dv_ptr.dtype.element_ty), mask=(key < T)[:, None])


def settings(kernel: str, dtype: torch.dtype, head_dim: int) -> tuple[dict[str, int], dict[str, int | bool]]:
    """The compile-time arguments and options of `forward`, `query` or `key`: they define the AOT variants.

    `key` has two operands and two accumulators: at head_dim 128 only 32 keys fit, which use HMMA on Hopper; 64 keys and
    8 warps use HGMMA there, but took 202 registers on sm_80. Float32 runs on FMAs, as in decode.
    """
    options: dict[str, int | bool] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    if kernel == "key" and NEEDS_MORE_WARPS and head_dim == (64 if dtype == torch.float32 else 128):
        options["num_warps"] = 8
    if dtype == torch.float32:
        stays, streams = 16, 16
    elif kernel == "key":
        stays, streams = (64 if head_dim == 64 else 32), 16
    else:
        stays, streams = 64, (64 if kernel == "forward" else 32)
        options["num_warps"] = 4 if head_dim == 64 else 8
    BLOCK_M, BLOCK_N = (streams, stays) if kernel == "key" else (stays, streams)
    return {"D": head_dim, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}, options


def shifted(q: Tensor, k: Tensor, v: Tensor, lens: Tensor | None, group: int, scaling: float) -> Tensor:
    """Shifted sparse attention with gradients to q, k and v.

    CUDA tensors run the kernels, without waiting for the device; others run `reference`, or the kernels if
    TRITON_INTERPRET=1 was set before the import.

    Args:
        q: [B, H, T, D] float16, bfloat16 or float32; the kernels support D 64 and 128, any H.
        k, v: [B, Hkv, T, D] in q's dtype, rows contiguous, Hkv a divisor of H.
        lens: [B] int32, at most T: rows from there on are padding. None if every sequence has T tokens.
        group: tokens per group, even.
        scaling: factor on q K^T, usually D ** -0.5.

    Returns:
        o [B, H, T, D] in q's dtype; zeros at padding.

    Raises:
        ValueError: a shape, dtype, device, layout or group that does not fit.
        RuntimeError: CUDA tensors without triton installed.
    """
    kernels = runs_kernels(q, "shifted attention")
    _check(q, k, v, lens, group, kernels)
    if not kernels:
        return reference(q, k, v, lens, group, scaling)[0].to(q.dtype)
    if lens is None:
        lens = torch.full(q.shape[:1], q.shape[2], dtype=torch.int32, device=q.device)
    o: Tensor = _Shifted.apply(*widened(q, k, v), lens, group, scaling)  # type: ignore[no-untyped-call]
    return o.to(q.dtype)


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lens: Tensor, group: int, scaling: float) -> Tensor:
        o, lse = _forward(q, k, v, lens, group, scaling)
        ctx.save_for_backward(q, k, v, lens, o, lse)
        ctx.group, ctx.scaling = group, scaling
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lens, o, lse = ctx.saved_tensors
        return *_backward(q, k, v, lens, o, lse, do.contiguous(), ctx.group, ctx.scaling), None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, group: int, scaling: float) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    o = torch.empty((B, H, T, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    sizes, options = settings("forward", q.dtype, D)
    if o.numel():
        with torch.cuda.device(q.get_device()):
            forward_kernel[(-(-T // sizes["BLOCK_M"]), B * H)](
                q, k, v, lens, o, lse, scaling, H // k.shape[1], H, T, group, *strides, **sizes, **options
            )
    return o, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, lens: Tensor, o: Tensor, lse: Tensor, do: Tensor, group: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    Hkv = k.shape[1]
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    if o.numel():
        with torch.cuda.device(q.get_device()):
            sizes, options = settings("query", q.dtype, D)
            query_kernel[(-(-T // sizes["BLOCK_M"]), B * H)](
                q, k, v, lens, o, lse, do, delta, dq, scaling, H // Hkv, H, T, group, *strides, **sizes, **options
            )
            sizes, options = settings("key", q.dtype, D)
            key_kernel[(-(-T // sizes["BLOCK_N"]), B * Hkv)](
                q, k, v, lens, lse, do, delta, dk, dv, scaling, H // Hkv, Hkv, T, group, *strides, **sizes, **options
            )
    return dq, dk, dv


def _check(q: Tensor, k: Tensor, v: Tensor, lens: Tensor | None, group: int, kernels: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.stride(3) != 1:
            raise ValueError(
                f"{name} must have 4 axes, the last contiguous, got {tuple(x.shape)}, strides {x.stride()}"
            )
        if x.device != q.device or x.dtype != q.dtype or q.dtype not in DTYPES:
            raise ValueError(f"{name} must be on {q.device} in one of {DTYPES}, got {x.device}, {x.dtype}")
    B, H, T, D = q.shape
    if kernels and D not in HEAD_DIMS:
        raise ValueError(f"q must be [B, H, T, D] with D one of {HEAD_DIMS}, got {tuple(q.shape)}")
    if k.shape != v.shape or k.shape != (B, k.shape[1], T, D) or not k.shape[1] or H % k.shape[1]:
        raise ValueError(
            f"k and v must be [{B}, Hkv, {T}, {D}] with Hkv a divisor of {H}, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if lens is not None and (lens.shape != (B,) or lens.dtype != torch.int32 or lens.device != q.device):
        raise ValueError(
            f"lens must be [{B}] int32 on {q.device}, got {tuple(lens.shape)} {lens.dtype} on {lens.device}"
        )
    if group < 2 or group % 2:
        raise ValueError(f"group must be an even number of tokens, got {group}")


# 168 registers allow three programs of 128 threads per multiprocessor (65,536 registers).
LIMITS = tile_limits(168, "shifted.forward", "shifted.query", "shifted.key")


def variants() -> Iterator[Variant]:
    """The specialisations that `shifted` uses."""
    for dtype in TORCH:
        for dim in HEAD_DIMS:
            for kernel, fn, written in (
                ("forward", forward_kernel, ("o",)),
                ("query", query_kernel, ("o", "do", "dq")),
                ("key", key_kernel, ("do", "dk", "dv")),
            ):
                pointers = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "v", *written)}
                pointers |= {"lens_ptr": "*i32", "lse_ptr": "*fp32"}
                if kernel != "forward":
                    pointers["delta_ptr"] = "*fp32"
                sizes, options = settings(kernel, TORCH[dtype], dim)
                yield Variant(
                    f"shifted.{kernel}", f"{dtype} D{dim}", fn, pointers, ("scaling",), ("stride_",), sizes, options
                )
