# ruff: noqa: N806
"""Shifted sparse attention (LongLoRA, Chen et al. 2024, arXiv 2309.12307) as an attention function of transformers.

In training mode, half of the heads attend causally within groups of a quarter of the sequence, the other half within
groups shifted by half a group, without wrap-around (defined in `lceval.kernels.shifted`). In `eval()` mode it is SDPA
with full attention, bit for bit. No L x L mask is built in training: the mask function stores the request of
transformers, which only evaluation turns into SDPA's mask.

On CUDA the Triton kernels run. Elsewhere it is SDPA with the groups as rows of a batch; `kernels.shifted.reference`
materializes the scores of a whole group, which is slower than full attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lceval.core.errors import UserError
from lceval.kernels import launch
from lceval.kernels.shifted import HEAD_DIMS, shifted

Segments = list[tuple[int, int, int]]
"""Sequences of a batch: row, first token, one past the last token."""


class MaskRequest:
    """The arguments of transformers' mask function, in place of a mask; shared by the layers of a forward pass."""

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._segments: list[Segments | None] = []

    @cached_property
    def dense(self) -> Tensor | None:
        """SDPA's mask; None where it equals plain causal attention."""
        mask: Tensor | None = sdpa_mask(**self._arguments)
        return mask

    def segments(self, positions: Tensor | None) -> Segments | None:
        """The sequences by padding mask and positions (a packed sequence starts where positions are not consecutive).

        Returns None if every row is one sequence without padding.

        Raises:
            UserError: a mask that is neither padding nor packing.
        """
        if not self._segments:
            self._segments.append(self._find_segments(positions))
        return self._segments[0]

    def _find_segments(self, positions: Tensor | None) -> Segments | None:
        mask: Tensor | None = self._arguments["attention_mask"]
        shape = (self._arguments["batch_size"], self._arguments["q_length"])
        breaks = torch.zeros(shape, dtype=torch.bool, device=None if mask is None else mask.device)
        if positions is not None and positions.ndim == 2:
            breaks = breaks.to(positions.device)
            breaks[:, 1:] = (positions.diff(dim=1) != 1).expand(shape[0], -1)
        packed = bool(breaks.any()) if mask is None else bool((breaks & mask).any())
        if self._arguments["mask_function"] is not causal_mask_function and not packed:
            raise UserError("shifted attention supports padding and packed positions only; this batch has another mask")
        if not packed and (mask is None or bool(mask.all())):
            return None
        real = torch.ones_like(breaks) if mask is None else mask
        before = F.pad(real, (1, 0))[:, :-1]
        starts = (real & (breaks | ~before)).nonzero()
        after = F.pad(real & ~breaks, (0, 1))[:, 1:]
        stops = (real & ~after).nonzero()
        return [(row, start, stop + 1) for (row, start), (_, stop) in zip(starts.tolist(), stops.tolist(), strict=True)]


def even_group(tokens: int, share: float) -> int:
    """The share of a sequence, rounded to an even number of tokens, at least 2."""
    return max(2, 2 * round(share * tokens / 2))


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, group: int, scaling: float) -> Tensor:
    """Shifted sparse attention within every sequence, with gradients.

    Args:
        q: [B, H, T, D], RoPE applied.
        k, v: [B, Hkv, T, D].
        segments: the sequences; None if each row is one.
        group: tokens per group, even.
        scaling: factor on q K^T.

    Returns:
        o [B, H, T, D] in q's dtype; zeros at padding.
    """
    if q.is_cuda and launch.AVAILABLE and q.shape[3] in HEAD_DIMS:
        return by_lengths(q, k, v, segments, group, scaling)
    k, v = (_repeated(x, q.shape[1]) for x in (k, v))
    if segments is None:
        return _grouped(q, k, v, group, scaling)
    rows = []
    for row in range(q.shape[0]):
        parts, at = [], 0
        for _, start, stop in (s for s in segments if s[0] == row):
            parts += [torch.zeros_like(q[row : row + 1, :, at:start])]
            own = (slice(row, row + 1), slice(None), slice(start, stop))
            parts += [_grouped(q[own], k[own], v[own], group, scaling)]
            at = stop
        rows.append(torch.cat([*parts, torch.zeros_like(q[row : row + 1, :, at:])], 2))
    return torch.cat(rows)


def by_lengths(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, group: int, scaling: float) -> Tensor:
    """As `attend`, in one kernel call with one right-padded row per sequence."""
    if segments is None:
        return shifted(q, k, v, None, group, scaling)
    B, H, T, D = q.shape
    device = q.device
    tokens = [torch.arange(row * T + start, row * T + stop) for row, start, stop in segments]
    lens = torch.tensor([len(x) for x in tokens], dtype=torch.int32)
    places = pad_sequence(tokens, batch_first=True).to(device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2) for x in (q, k, v))
    o = shifted(q, k, v, lens.to(device), group, scaling).transpose(1, 2)
    real = (torch.arange(o.shape[1]) < lens[:, None]).to(device)
    flat = q.new_zeros(B * T, H, D).index_put((places[real],), o[real])
    return flat.view(B, T, H, D).transpose(1, 2)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """KV heads repeated per query head; the half of the heads can end within a group of query heads."""
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def _grouped(q: Tensor, k: Tensor, v: Tensor, group: int, scaling: float) -> Tensor:
    """SDPA with whole groups as rows of a batch; partial groups at both ends are computed separately."""
    B, H, T, D = q.shape
    halves = []
    # split, not slices: the gradient of a slice is as large as the whole tensor.
    by_half = zip(*(torch.split(x, [H // 2, H - H // 2], 1) for x in (q, k, v)), strict=True)
    for shift, half in zip((0, group // 2), by_half, strict=True):
        head = min(shift, T)
        whole = (T - head) // group
        sizes = [head, whole * group, T - head - whole * group]
        own = zip(*(torch.split(x, sizes, 2) for x in half), strict=True)
        parts = []
        for part, (q_part, k_part, v_part) in enumerate(own):
            if not sizes[part]:
                continue
            if part == 1:
                q_part, k_part, v_part = (
                    x.reshape(B, x.shape[1], whole, group, D).transpose(1, 2).flatten(0, 1)
                    for x in (q_part, k_part, v_part)
                )
            o = F.scaled_dot_product_attention(q_part, k_part, v_part, is_causal=True, scale=scaling)
            parts.append(o.view(B, whole, -1, group, D).transpose(1, 2).flatten(2, 3) if part == 1 else o)
        halves.append(torch.cat(parts, 2))
    return torch.cat(halves, 1)


def _function(group_of: Callable[[int], int]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function; `group_of` maps the length of the longest sequence to tokens per group."""

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: MaskRequest | Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not module.training:
            dense = mask.dense if isinstance(mask, MaskRequest) else mask
            o, weights = sdpa_attention_forward(module, q, k, v, dense, scaling=scaling, **kwargs)
            return o, weights
        if not isinstance(mask, MaskRequest):
            raise UserError("shifted attention supports padding and packed positions only; this batch has its own mask")
        if q.shape[2] != k.shape[2] or kwargs.get("dropout") or kwargs.get("sliding_window"):
            raise UserError("shifted attention requires whole sequences, no dropout and full-attention layers")
        segments = mask.segments(kwargs.get("position_ids"))
        longest = q.shape[2] if segments is None else max((z - a for _, a, z in segments), default=0)
        return attend(q, k, v, segments, group_of(longest), scaling).transpose(1, 2).contiguous(), None

    return attention


def register(share: float = 0.25, tokens: int | None = None) -> str:
    """Register the function with transformers; returns its name for `attn_implementation`.

    Args:
        share: group size as a share of the longest sequence of a batch.
        tokens: group size in tokens, even, instead of a share.
    """
    name = f"lceval_shifted_{share:g}" if tokens is None else f"lceval_shifted_{tokens}_tokens"
    rule = (lambda longest: even_group(longest, share)) if tokens is None else (lambda _: tokens)
    AttentionInterface.register(name, _function(rule))
    AttentionMaskInterface.register(name, MaskRequest)
    return name


@contextmanager
def full_attention(model: Any) -> Iterator[None]:
    """Context manager: full attention in training too, for a transformers model without a PEFT wrapper."""
    name = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(name)
