"""Model properties that the cache depends on: sliding windows by layer, and RoPE."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lceval.core.errors import UserError
from lceval.models.policies import StatsSpec

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Geometry:
    """The attention layers of a decoder.

    Attributes:
        model_type: name of the architecture, for messages.
        windows: per layer the number of tokens a query attends to, itself included; None for full-attention layers.
            Only full-attention layers are compressed, since a sliding-window layer's cache does not grow.
        rotary: cos and sin [n, R] of RoPE in the full-attention layers at positions [n]; None without RoPE, or where it
            is not that of `rotation.unrotate` in all of these layers.
    """

    model_type: str
    windows: tuple[int | None, ...]
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None

    @classmethod
    def of(cls, model: Any) -> Geometry:
        """Geometry of a causal LM of transformers without adapter wrappers.

        Raises:
            UserError: an attention variant that this cache does not support.
        """
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * config.num_hidden_layers
        if reason := _unsupported(model, config, kinds):
            raise unsupported(config.model_type, reason)
        decoder = model.get_decoder()
        rotary_emb = getattr(decoder, "rotary_emb", None) if _rotates_halves(decoder, config, kinds) else None
        typed = isinstance(getattr(rotary_emb, "rope_type", None), dict)
        return cls(
            model_type=config.model_type,
            windows=tuple(window if kind == SLIDING else None for kind in kinds),
            rotary=None if rotary_emb is None else partial(_rotary, rotary_emb, {"layer_type": FULL} if typed else {}),
        )

    def check(self, stats_spec: StatsSpec) -> None:
        """Check that the model has what these prefill statistics require.

        Raises:
            UserError: queries or keys before RoPE, of a model without `rotary`.
        """
        name = "expected_attention" if stats_spec.query_moments else "compactor" if stats_spec.chunk_attention else ""
        if name and self.rotary is None:
            raise UserError(
                f"{name} requires RoPE on channels i and i + R/2 in every full-attention layer, which "
                f"{self.model_type} does not have: use another evictor, such as snapkv"
            )


def _rotates_halves(decoder: Any, config: Any, kinds: Sequence[str]) -> bool:
    """Whether RoPE rotates channels i and i + R/2 as a pair, in every full-attention layer."""
    rotate_half = getattr(sys.modules[type(decoder).__module__], "rotate_half", None)
    if rotate_half is None or rotate_half(torch.arange(4)).tolist() != [-2, -3, 0, 1]:
        return False  # cohere, glm and ernie rotate neighbours
    if config.model_type.startswith(("exaone", "afmoe")) and SLIDING in kinds:
        return False  # only their sliding-window layers rotate
    return all(getattr(config, "no_rope_layers", None) or [True])  # smollm3: 0 for a layer without RoPE


def unsupported(model_type: str, reason: str) -> UserError:
    """The error for a model whose attention this cache cannot reproduce."""
    return UserError(
        f"{model_type} {reason}, which lcft does not support: use --model hf (uncompressed), or a model with full or "
        "sliding-window attention, such as llama, qwen3, mistral or gemma3"
    )


def _unsupported(model: Any, config: Any, kinds: Sequence[str]) -> str | None:
    """What excludes the model; None if it is supported."""
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder model"
    if others := sorted({*kinds} - {FULL, SLIDING}):
        return f"has {', '.join(others)} layers"
    if config.model_type == "bloom" or any(
        getattr(part, "alibi", False) for part in (config, getattr(config, "attn_config", None))
    ):
        return "adds position biases to its attention logits (ALiBi)"
    if getattr(config, "kv_lora_rank", None):
        return "stores keys and values as one latent (MLA)"
    if getattr(config, "attn_logit_softcapping", None):
        return "caps its attention logits"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "learns attention sinks"
    if getattr(config, "num_kv_shared_layers", None):
        return "shares keys between layers"
    return None


def _rotary(rotary_emb: Any, kwargs: dict[str, str], positions: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.empty(0, dtype=torch.float32, device=positions.device)
    cos, sin = rotary_emb(like, positions[None], **kwargs)
    # Under `parallelize=True` the module may be on another device than the layer that asks.
    return cos[0].to(positions.device), sin[0].to(positions.device)
