"""Model properties that the cache depends on: sliding windows by layer, and RoPE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lceval.core.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Geometry:
    """The attention layers of a decoder.

    Attributes:
        windows: per layer the number of tokens a query attends to, itself included; None for full-attention layers.
            Only full-attention layers are compressed, since a sliding-window layer's cache does not grow.
        rotary: cos and sin [n, R] of RoPE in the full-attention layers at positions [n]; None without RoPE.
    """

    windows: tuple[int | None, ...]
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None

    @classmethod
    def of(cls, model: Any) -> Geometry:
        """Geometry of a causal LM of transformers without adapter wrappers.

        Raises:
            UserError: an attention variant that this cache does not support.
        """
        config = model.config.get_text_config()
        layers = config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * layers
        if unsupported := sorted({*kinds} - {FULL, SLIDING}):
            raise UserError(
                f"{config.model_type} has {', '.join(unsupported)} layers; "
                "lcft supports full and sliding-window attention"
            )
        if getattr(config, "attn_logit_softcapping", None):
            raise UserError(f"{config.model_type} caps its attention logits, which lcft does not support")
        if any(name.endswith("sinks") for name, _ in model.named_parameters()):
            raise UserError(f"{config.model_type} learns attention sinks, which lcft does not support")
        if getattr(config, "num_kv_shared_layers", None):
            raise UserError(f"{config.model_type} shares keys between layers, which lcft does not support")
        rotary_emb = getattr(model.get_decoder(), "rotary_emb", None)
        typed = isinstance(getattr(rotary_emb, "rope_type", None), dict)
        return cls(
            windows=tuple(window if kind == SLIDING else None for kind in kinds),
            rotary=None if rotary_emb is None else partial(_rotary, rotary_emb, {"layer_type": FULL} if typed else {}),
        )


def _rotary(rotary_emb: Any, kwargs: dict[str, str], positions: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.empty(0, dtype=torch.float32, device=positions.device)
    cos, sin = rotary_emb(like, positions[None], **kwargs)
    # Under `parallelize=True` the module may be on another device than the layer that asks.
    return cos[0].to(positions.device), sin[0].to(positions.device)
