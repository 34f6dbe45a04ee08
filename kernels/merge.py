# ruff: noqa: N803, N806
"""Merge of several softmaxes over disjoint slots in one launch: a decode kernel's shares and another result.

    lse = log(sum_i exp(lse_i)),   o = sum_i exp(lse_i - lse) o_i

The shares are contiguous float32; `rest` is the result of another kernel over other slots, in the queries' dtype.
`dense.merge` merges two results of any shape in several launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from lceval.kernels.launch import HEAD_DIMS, INTERPRETED, LATENT_DIMS, MAX_SPLITS, OPTIONS, jit, runs_kernels, tl
from lceval.kernels.variant import SHARED, USED_HEAD_DIMS, Limit, Variant


def reference(part_o: Tensor, part_lse: Tensor, rest: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The definition, in float32. Arguments and results as for `merge`."""
    if rest is not None:
        part_o = torch.cat([part_o, rest[0].float()[:, :, None]], 2)
        part_lse = torch.cat([part_lse, rest[1][..., None]], 2)
    lse = part_lse.logsumexp(-1)
    weights = (part_lse - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp()
    return (weights[..., None] * part_o).sum(2), lse


@jit("splits")
def merge_kernel(  # type: ignore[no-untyped-def]
    part_o_ptr, part_lse_ptr, rest_o_ptr, rest_lse_ptr, o_ptr, lse_ptr, splits,
    D: tl.constexpr, D_PAD: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_I: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Merge the shares of one query head and its part of `rest`. part_o: [B, H, splits, D], rest_o: [B, H, D]."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, D_PAD)
    mask_d = offs_d < D
    offs = tl.arange(0, MAX_SPLITS)
    part_lse = tl.load(part_lse_ptr + row * splits + offs, mask=offs < splits, other=float("-inf"))
    m = tl.max(part_lse, 0)
    if REST:
        rest_lse = tl.load(rest_lse_ptr + row)
        rest_o = tl.load(rest_o_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        m = tl.maximum(m, rest_lse)
    empty = m == float("-inf")
    m = tl.where(empty, 0.0, m)
    l = tl.sum(tl.exp(part_lse - m), 0)  # noqa: E741
    acc = tl.zeros([BLOCK_I, D_PAD], tl.float32)
    for start in range(0, splits, BLOCK_I):
        offs_i = start + tl.arange(0, BLOCK_I)
        mask_i = offs_i < splits
        part = row * splits + offs_i
        weight = tl.exp(tl.load(part_lse_ptr + part, mask=mask_i, other=float("-inf")) - m)
        mask = mask_i[:, None] & mask_d[None, :]
        acc += weight[:, None] * tl.load(part_o_ptr + part[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    o = tl.sum(acc, 0)
    if REST:
        weight = tl.exp(rest_lse - m)
        l += weight  # noqa: E741
        o += weight * rest_o
    l = tl.where(empty, 1.0, l)  # noqa: E741
    tl.store(o_ptr + row * D + offs_d, (o / l).to(o_ptr.dtype.element_ty), mask=mask_d)
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), m + tl.log(l)))


def constants(head_dim: int, rest: bool) -> dict[str, int]:
    """The compile-time arguments of `merge_kernel`: 16 shares per step, 16 to 32 accumulators per thread."""
    D_PAD = 1 << (head_dim - 1).bit_length()
    return {"D": head_dim, "D_PAD": D_PAD, "MAX_SPLITS": MAX_SPLITS, "BLOCK_I": 16, "REST": int(rest)}


def merge(
    part_o: Tensor, part_lse: Tensor, rest: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Merge the shares of every query head with `rest`.

    CUDA tensors run the kernel, others `reference`, or the kernel if TRITON_INTERPRET=1 was set before the import.

    Args:
        part_o: [B, H, shares, D] float32, at most 128 shares.
        part_lse: [B, H, shares] float32, -inf for shares without slots.
        rest: o [B, H, D] and lse [B, H] float32 over other slots.
        dtype: dtype of the result.

    Returns:
        o [B, H, D] in `dtype` and lse [B, H] float32 (natural log; zeros and -inf over no slot).

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    B, H, shares, D = part_o.shape if part_o.ndim == 4 else (0, 0, 0, 0)
    if (
        D not in HEAD_DIMS
        or not 1 <= shares <= MAX_SPLITS
        or part_o.dtype != torch.float32
        or not part_o.is_contiguous()
    ):
        raise ValueError(
            f"part_o must be contiguous [B, H, shares, D] float32, got {tuple(part_o.shape)} {part_o.dtype}"
        )
    if part_lse.shape != (B, H, shares) or part_lse.dtype != torch.float32 or not part_lse.is_contiguous():
        raise ValueError(f"part_lse must be {(B, H, shares)} float32, got {tuple(part_lse.shape)} {part_lse.dtype}")
    others = [part_lse, *(rest or ())]
    if rest is not None and (rest[0].shape != (B, H, D) or rest[1].shape != (B, H) or rest[1].dtype != torch.float32):
        shapes = [(tuple(x.shape), x.dtype) for x in rest]
        raise ValueError(f"rest must be o {(B, H, D)} and lse {(B, H)} float32, got {shapes}")
    if any(x.device != part_o.device for x in others):
        raise ValueError(f"all must be on part_o's device, {part_o.device}, got {[str(x.device) for x in others]}")
    if not runs_kernels(part_o, "merge"):
        o, lse = reference(part_o, part_lse, rest)
        return o.to(dtype), lse
    if INTERPRETED and dtype == torch.bfloat16:
        # The interpreter represents bf16 as raw 16-bit integers.
        o, lse = merge(part_o, part_lse, rest and (rest[0].float(), rest[1]), torch.float32)
        return o.to(dtype), lse
    return launch(part_o, part_lse, rest, dtype)


def launch(
    part_o: Tensor, part_lse: Tensor, rest: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`merge` by the kernel without checks, for launchers whose shares are valid by construction."""
    B, H, shares, D = part_o.shape
    o = torch.empty((B, H, D), dtype=dtype, device=part_o.device)
    lse = torch.empty((B, H), dtype=torch.float32, device=part_o.device)
    rest_o, rest_lse = (o, lse) if rest is None else (rest[0].to(dtype).contiguous(), rest[1].contiguous())
    with torch.cuda.device(part_o.get_device()):
        sizes = constants(D, rest is not None)
        merge_kernel[(B * H,)](part_o, part_lse, rest_o, rest_lse, o, lse, shares, **sizes, **OPTIONS)
    return o, lse


def outputs(q: Tensor, value_dim: int, splits: int) -> tuple[Tensor, Tensor]:
    """What a decode kernel writes for q [B, H, D]: float32 shares o [B, H, splits, E] and lse [B, H, splits] to merge,
    or, of a single share, the result itself: o [B, H, E] in q's dtype and lse [B, H] float32. E: value_dim."""
    shape, dtype = (q.shape[:2], q.dtype) if splits == 1 else ((*q.shape[:2], splits), torch.float32)
    o = torch.empty((*shape, value_dim), dtype=dtype, device=q.device)
    return o, torch.empty(shape, dtype=torch.float32, device=q.device)


LIMITS = {("merge", "bf16"): Limit(168, SHARED)}


def variants() -> Iterator[Variant]:
    """The specialisations that `merge` uses; the dtype only changes the first load and the last store."""
    pointers = dict.fromkeys(("part_o_ptr", "part_lse_ptr", "rest_lse_ptr", "lse_ptr"), "*fp32")
    pointers |= {"rest_o_ptr": "*bf16", "o_ptr": "*bf16"}
    # Latents are never merged with a rest here.
    for dim, rest in [*product(USED_HEAD_DIMS["bf16"], (False, True)), (LATENT_DIMS[-1], False)]:
        name = f"bf16 D{dim}{' with the rest' if rest else ''}"
        yield Variant("merge", name, merge_kernel, pointers, (), (), constants(dim, rest), OPTIONS)
