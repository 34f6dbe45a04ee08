"""The attention function registered with transformers: passes the queries to the cache layer that stores the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface

from lceval.core.errors import UserError
from lceval.kernels import launch
from lceval.kernels.dense import attend_in_blocks
from lceval.kernels.softmax import Softmax
from lceval.models import latent
from lceval.models.geometry import Geometry, unsupported

NAME = "lceval"
CHOICES = ("auto", "torch", "triton")
# Enough tokens to saturate a GPU, without buffers for a whole context.
CUDA_CHUNK = 8192


def lceval_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of one layer. q: [B, H, T, D]; k, v: [B, Hkv, S, D]. Returns ([B, T, H, D], None).

    Registered without a mask function, so transformers builds no mask and passes none. A `packing` argument
    (`lceval.training.packing`) defines its own attention pattern. Keys that come from none of our caches (a plain
    forward pass over unpadded or right-padded rows) get ordinary causal attention.
    """
    assert attention_mask is None, "transformers built a mask for an attention function that has none registered"
    layer, packing = getattr(k, "lceval_layer", None), kwargs.get("packing")
    if latent.is_latent(module) and (layer := latent.WAITING.pop(module.layer_idx, None)) is not None:
        q = latent.absorbed_query(module, q)
    softmax = Softmax(scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
    if packing is not None:
        o = packing.attend(module.layer_idx, q, k, v, scaling)
    elif layer is not None:
        # Layers that share another layer's keys and values get its tensors, and only read them.
        if not hasattr(k, "lceval_observed"):
            k.lceval_observed = True  # type: ignore[attr-defined]
            layer.observe(q, softmax)
        o = layer.attend(q, softmax)
        if latent.is_latent(module):
            o = latent.expanded_output(module, o)
    elif softmax.is_special:
        assert q.shape[2] == k.shape[2], "this attention function cannot continue another cache class"
        o = attend_in_blocks(q, k, v, softmax, kwargs.get("sliding_window"))
    else:
        assert q.shape[2] == k.shape[2], "this attention function cannot continue another cache class"
        window, tokens = kwargs.get("sliding_window"), q.shape[2]
        chunk = getattr(module.config, "attention_chunk_size", None)
        assert chunk is None or tokens <= chunk, "a plain forward pass does not know chunks"
        if window is None or window >= tokens:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        else:
            band = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril_().triu_(1 - window)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=band, scale=scaling, enable_gqa=True)
    return o.transpose(1, 2).contiguous(), None


def register() -> str:
    """Register the function with transformers; returns the name for `attn_implementation`."""
    AttentionInterface.register(NAME, lceval_attention)
    return NAME


def install(model: Any) -> None:
    """Let a model of transformers attend through this function.

    Raises:
        UserError: its attention is fixed.
    """
    model.set_attn_implementation(register())
    # cuDNN's plan is made anew, in up to a second, for every length of a context.
    torch.backends.cuda.enable_cudnn_sdp(False)
    config = model.config.get_text_config()
    if config._attn_implementation != NAME:
        raise unsupported(config.model_type, "has an attention of its own, outside transformers' attention interface")


def prefill_chunk(chunk: int | str, device: torch.device) -> int:
    """Tokens per forward pass during prefill, 0 for a single pass, of the argument `prefill_chunk`."""
    if isinstance(chunk, int):
        return chunk
    return CUDA_CHUNK if device.type == "cuda" else 0


def describe(geometry: Geometry, q: Tensor, *, kernels: bool) -> str:
    """By what a model attends: PyTorch's backend for prefills with queries such as q [1, 1, 1, D], and what answers
    questions."""
    if geometry.caps or geometry.sinks:
        backend = "blocks"
    else:
        backend = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name.lower().removesuffix("_attention")
    return f"prefill by PyTorch ({backend}), questions and decoding by {'Triton kernels' if kernels else 'PyTorch'}"


def use_kernels(attn: str, device: torch.device) -> bool:
    """Whether decoding uses the Triton kernels.

    Raises:
        UserError: attn=triton where they cannot run on `device`.
    """
    available = launch.AVAILABLE and (device.type == "cuda" or launch.INTERPRETED)
    if attn == "triton" and not available:
        raise UserError(f"attn=triton requires triton and a CUDA device, got {device}: use attn=auto")
    return available and (attn == "triton" or (attn == "auto" and device.type == "cuda"))
