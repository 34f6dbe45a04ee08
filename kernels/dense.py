"""Attention over dense keys in PyTorch, with the log-sum-exp by which results over disjoint keys are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from lceval.kernels.softmax import Softmax, capped

# Scores of many queries over a long context are computed in row blocks of at most this many elements: small enough for
# a CPU cache; larger blocks took twice as long.
MAX_SCORES = 1 << 21
# Times as many on CUDA, 512 MiB of float32: there a block costs launches, not cache.
CUDA_BLOCK = 64


def block_rows(elements: int, device: torch.device) -> int:
    """Rows of a block whose rows have so many elements, at least 1."""
    return max(1, MAX_SCORES * (CUDA_BLOCK if device.type == "cuda" else 1) // elements)


def attention_logits(q: Tensor, k: Tensor, scaling: float, cap: float | None = None) -> Tensor:
    """scaling * q k^T, never rounded to 16 bits: key biases of hundreds (Qwen2.5) leave a 16-bit logit no decimals.

    q: [R, M, D]; k: [R, N, D] in q's dtype; cap: as in `Softmax`. Returns [R, M, N] float32, or float64 of float64.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        # Only CUDA multiplies 16-bit matrices into a 32-bit result.
        logits = torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32).mul_(scaling)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = torch.bmm(q.to(wide) * scaling, k.to(wide).transpose(1, 2))
    return capped(logits, cap)


def folded(x: Tensor, sequences: int, kv_heads: int) -> Tensor:
    """[B', H, T, C] to [sequences * Hkv, rows, C]: rows with the same keys are adjacent."""
    batch, heads, tokens, last = x.shape
    x = x.reshape(sequences, batch // sequences, kv_heads, heads // kv_heads, tokens, last)
    return x.transpose(1, 2).reshape(sequences * kv_heads, -1, last)


def unfolded(x: Tensor, shape: torch.Size, kv_heads: int) -> Tensor:
    """The inverse of `folded`: [sequences * Hkv, rows, C] to [B', H, T, C], where `shape` is that of q."""
    x = x.reshape(x.shape[0] // kv_heads, kv_heads, -1, shape[1] // kv_heads, shape[2], x.shape[-1])
    return x.transpose(1, 2).reshape(*shape[:3], x.shape[-1])


def attend_rows(q: Tensor, k: Tensor, v: Tensor, scaling: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """q [R, M, D] over k [R, N, D] and v [R, N, E]: o [R, M, E] and lse [R, M] float32, in blocks of M."""
    shape = q.shape[:2]
    if k.shape[1] == 0:
        return q.new_zeros(*shape, v.shape[2]), torch.full(shape, -torch.inf, device=q.device)
    if _is_fused(q, k, v, cap):
        return _fused(q, k, v, scaling)
    o, lse = q.new_empty(*shape, v.shape[2]), torch.empty(shape, dtype=torch.float32, device=q.device)
    step = block_rows(q.shape[0] * k.shape[1], q.device)
    for start in range(0, q.shape[1], step):
        block = slice(start, start + step)
        o[:, block], lse[:, block] = _weigh(attention_logits(q[:, block], k, scaling, cap), v)
    return o, lse


def _is_fused(q: Tensor, k: Tensor, v: Tensor, cap: float | None) -> bool:
    # Under autocast, queries and keys can have two dtypes.
    same = q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]
    return same and q.device.type == "cpu" and cap is None


def _fused(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """q [R, M, D] over k, v [R, N, D] on a CPU: o [R, M, D] and lse [R, M] float32.

    It is what F.scaled_dot_product_attention runs there, which does not return the log-sum-exp. Logits are float32 in
    16 bits too. Over 600 slots of 3 x 64, a step's attention to context and tail takes half the time of `_weigh`.
    """
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], scale=scaling)
    return o[0], lse[0].float()


def _weigh(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scores) v and the log-sum-exp in float32, in one pass over scores [..., M, N], overwritten."""
    maximum = scores.amax(-1, keepdim=True)
    weights = scores.sub_(maximum).exp_()
    total = weights.sum(-1, keepdim=True)
    o = torch.matmul(weights.to(v.dtype), v).div_(total)
    return o, total.log_().add_(maximum).squeeze(-1).float()


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, pads: Tensor | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of a question over its own tokens; the last query attends to the last key. Without the sink.

    q: [B, H, T, D]; k, v: [B, Hkv, L, D], L >= T; pads: [B] int64, padding keys at the start of each row, attended to
    only by themselves; window: keys that a query attends to, its own included. Returns as `attend`.
    """
    batch, heads, tokens, dim = q.shape
    kv_heads, length = k.shape[1:3]
    grouped = q.reshape(batch * kv_heads, -1, dim)
    shape = batch, heads, tokens
    if tokens == 1 and pads is None and window is None and _is_fused(q, k, v, softmax.cap):
        o, lse = _fused(grouped, k.flatten(0, 1), v.flatten(0, 1), softmax.scaling)
        return o.reshape(*shape, -1), lse.reshape(shape)
    scores = attention_logits(grouped, k.flatten(0, 1), softmax.scaling, softmax.cap).view(batch, kv_heads, -1, length)
    if tokens > 1 or pads is not None or window is not None:
        scores = scores.view(batch, heads, tokens, length)
        key = torch.arange(length, device=q.device)
        query = torch.arange(length - tokens, length, device=q.device)[:, None]
        hidden = key > query
        if window is not None:
            hidden = hidden | (key <= query - window)
        if pads is not None:
            hidden = hidden | ((key < pads[:, None, None, None]) & (key != query))
        scores = scores.masked_fill_(hidden, -torch.inf).view(batch, kv_heads, -1, length)
    o, lse = _weigh(scores, v)
    return o.view(*shape, -1), lse.view(shape)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, window: int | None = None) -> Tensor:
    """`attend_causal` with the sink, in blocks of queries. Returns [B, H, T, D]."""
    past, o = k.shape[2] - q.shape[2], q.new_empty(*q.shape[:3], v.shape[3])
    step = block_rows(q.shape[0] * q.shape[1] * k.shape[2], q.device)
    for start in range(0, q.shape[2], step):
        block = q[:, :, start : start + step]
        stop = past + start + block.shape[2]
        first = 0 if window is None else max(0, past + start + 1 - window)
        own, lse = attend_causal(block, k[:, :, first:stop], v[:, :, first:stop], softmax, window=window)
        o[:, :, start : start + step] = softmax.with_sink(own, lse)
    return o


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> Tensor:
    """Merge two softmaxes over disjoint keys: o = sum_i exp(lse_i - lse) o_i, lse = log sum_i exp(lse_i).

    o: [B, H, T, D]; lse: [B, H, T] float32, at least one of the two finite.
    """
    weight = torch.sigmoid(lse1 - lse2)[..., None]
    return torch.lerp(o2.float(), o1.float(), weight).to(o1.dtype)
