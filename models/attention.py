"""The attention function that transformers calls: it hands the queries to the cache layer that holds the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface

from lceval.errors import UserError
from lceval.kernels import launch

NAME = "lceval"
CHOICES = ("auto", "torch", "triton")


def lceval_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of one layer. q: [B, H, T, D]; k, v: [B, Hkv, S, D]. Returns ([B, T, H, D], None).

    Registered without a mask function, so transformers builds no mask and passes none. A `packing` given to the model
    (`lceval.training.packing`) says by itself who sees whom. Keys that no cache of ours
    has seen (a plain forward pass over unpadded or right-padded rows) get ordinary causal attention.
    """
    assert mask is None, "transformers built a mask for an attention function that has none registered"
    layer, packing = getattr(k, "lceval_layer", None), kwargs.get("packing")
    if packing is not None:
        o = packing.attend(module.layer_idx, q, k, v, scaling)
    elif layer is not None:
        o = layer.attend(q, scaling)
    else:
        assert q.shape[2] == k.shape[2], "a foreign cache cannot be continued by this attention function"
        window, tokens = kwargs.get("sliding_window"), q.shape[2]
        if window is None or window >= tokens:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        else:
            band = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril_().triu_(1 - window)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=band, scale=scaling, enable_gqa=True)
    return o.transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the function known to transformers; returns the name for `attn_implementation`."""
    AttentionInterface.register(NAME, lceval_attention)
    return NAME


def use_kernels(attn: str, device: torch.device) -> bool:
    """Whether decoding goes through the Triton kernels.

    Raises:
        UserError: they are asked for and cannot run on `device`.
    """
    able = launch.AVAILABLE and (device.type == "cuda" or launch.INTERPRETED)
    if attn == "triton" and not able:
        raise UserError(f"attn=triton needs triton and a CUDA device, and this is {device}: use attn=auto")
    return able and (attn == "triton" or (attn == "auto" and device.type == "cuda"))
