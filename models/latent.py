"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over a cache of latents.

transformers caches one latent of `kv_lora_rank` channels and one rotated key of `qk_rope_head_dim` channels a token,
and expands them into keys and values of all heads at every step. Here the expansion is absorbed into queries and
outputs (section 2.1.2 of the paper), so that a token has one key, latent and rotated part, and its latent as value:

    q_h = [W_UK,h^T q_h^nope, q_h^rope]      k = [c, k^rope]      o_h = W_UV,h sum_s p_s c_s

The layers see one KV head of which all heads are query heads, so a token is kept or evicted for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lceval.models.reconstruction import is_linear, output_weight

# Layers that have stored tokens and wait for the queries of the same pass, by their index in the model: the expanded
# keys that transformers passes to its attention function do not say where they come from.
WAITING: dict[int, Any] = {}


def is_latent(module: Any) -> bool:
    """Whether an attention module of transformers caches latents."""
    return bool(getattr(module, "kv_lora_rank", None))


def joined(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, 1, T, rank + R] and values [B, 1, T, rank], a view of them, of latents and rotated keys."""
    keys = torch.cat([latent, rotated], -1)
    return keys, keys[..., : latent.shape[-1]]


def absorbed_query(module: Any, q: Tensor) -> Tensor:
    """Queries [B, H, T, rank + R] of queries [B, H, T, nope + R]."""
    nope, (up, _) = module.qk_nope_head_dim, _projections(module, q)
    return torch.cat([torch.matmul(q[..., :nope], up), q[..., nope:]], -1)


def expanded_output(module: Any, o: Tensor) -> Tensor:
    """Outputs [B, H, T, v_head_dim] of outputs over latents [B, H, T, rank]."""
    return torch.matmul(o, _projections(module, o)[1].transpose(1, 2))


def _projections(module: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """W_UK [H, nope, rank] and W_UV [H, v_head_dim, rank], in the dtype of `like`."""
    projection = module.kv_b_proj
    if is_linear(projection):
        weight = projection.weight
    else:
        # Quantized, or with an adapter: the same in every pass.
        if not hasattr(projection, "lceval_weight"):
            projection.lceval_weight = output_weight(projection, like).T.to(like.dtype)
        weight = projection.lceval_weight
    weight = weight.to(like.dtype).view(-1, module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank)
    return weight[:, : module.qk_nope_head_dim], weight[:, module.qk_nope_head_dim :]
