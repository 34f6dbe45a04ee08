"""What the cache must know of a model: which layers slide, and where RoPE turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lceval.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Geometry:
    """The attention layers of a decoder.

    Attributes:
        windows: per layer, how many tokens a query sees, itself included; None sees all. Only layers that see all
            are compressed: a sliding layer's cache does not grow.
        rotary: cos and sin [n, R] of RoPE in the layers that see all, at positions [n]; None for a model without.
    """

    windows: tuple[int | None, ...]
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None

    @classmethod
    def of(cls, model: Any) -> Geometry:
        """Of a causal LM of transformers, adapters unwrapped.

        Raises:
            UserError: attention that this cache does not compute.
        """
        config = model.config.get_text_config()
        layers = config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * layers
        if strange := sorted({*kinds} - {FULL, SLIDING}):
            raise UserError(f"{config.model_type} has {', '.join(strange)} layers; lcft serves full and sliding ones")
        if getattr(config, "attn_logit_softcapping", None):
            raise UserError(f"{config.model_type} caps its attention logits, which lcft does not compute")
        if any(name.endswith("sinks") for name, _ in model.named_parameters()):
            raise UserError(f"{config.model_type} learns attention sinks, which lcft does not compute")
        if getattr(config, "num_kv_shared_layers", None):
            raise UserError(f"{config.model_type} shares keys between layers, which lcft does not compute")
        question = getattr(model.get_decoder(), "rotary_emb", None)
        typed = isinstance(getattr(question, "rope_type", None), dict)
        return cls(
            windows=tuple(window if kind == SLIDING else None for kind in kinds),
            rotary=None if question is None else partial(_rotary, question, {"layer_type": FULL} if typed else {}),
        )


def _rotary(question: Any, kwargs: dict[str, str], positions: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.empty(0, dtype=torch.float32, device=positions.device)
    cos, sin = question(like, positions[None], **kwargs)
    return cos[0], sin[0]
