"""Model properties that the cache depends on: what each layer remembers, and RoPE."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import get_layer_types_and_kwargs

from lceval.core.errors import UserError
from lceval.models.policies import StatsSpec

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# Layers of transformers with a state of fixed size instead of keys and values, and those without any cache.
RECURRENT, NO_CACHE = ("linear_attention", "conv"), "dummy"
# Differences that are too small for `selfcheck` in 16 bits, or for its few tokens.
_CONTINUED = "is continued by transformers itself otherwise than it is computed in one pass"
KNOWN = {
    "bamba": _CONTINUED,
    "dory": "computes its attention in a way of its own",
    "jamba": _CONTINUED,
    "recurrent_gemma": _CONTINUED,
}


@dataclass(frozen=True)
class LayerKind:
    """What a layer of a decoder remembers of the tokens before.

    Attributes:
        attends: whether it has keys and values of its own.
        window: the number of tokens a query attends to, itself included; None: all.
        chunked: `window` is a chunk of the sequence instead, of which a query attends to the tokens up to itself.
        states: number of recurrent or convolution states.
    """

    attends: bool = True
    window: int | None = None
    chunked: bool = False
    states: int = 0

    @property
    def is_full(self) -> bool:
        """Whether its keys and values grow with the context: only those are compressed."""
        return self.attends and self.window is None


@dataclass(frozen=True)
class Geometry:
    """The layers of a decoder.

    Attributes:
        model_type: name of the architecture, for messages.
        layers: what each layer remembers.
        shares: whether layers read the keys and values of another layer.
        caps: whether attention logits are capped.
        sinks: whether attention layers have learned sinks.
        latent: whether the cache has latents instead of keys and values (`models.latent`).
        counts_positions: whether the model takes positions from the length of the cache, so that rows must agree.
        rotary: cos and sin [n, R] of RoPE in the full-attention layers at positions [n]; None without RoPE, or where it
            is not that of `rotation.unrotate` in all of these layers.
    """

    model_type: str
    layers: tuple[LayerKind, ...]
    shares: bool
    caps: bool
    sinks: bool
    latent: bool
    counts_positions: bool
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None

    @classmethod
    def of(cls, model: Any) -> Geometry:
        """Geometry of a causal LM of transformers without adapter wrappers.

        Raises:
            UserError: an attention variant that this cache does not support.
        """
        config = model.config.get_text_config()
        if model.config.is_encoder_decoder:
            raise unsupported(config.model_type, "is an encoder-decoder model")
        names, settings = get_layer_types_and_kwargs(config)
        if reason := _unsupported(model, config, names):
            raise unsupported(config.model_type, reason)
        decoder = model.get_decoder()
        rotary_emb = getattr(decoder, "rotary_emb", None) if _rotates_halves(decoder, config, names) else None
        types: Any = getattr(rotary_emb, "rope_type", None)
        typed = isinstance(types, dict)
        if typed and FULL not in types:
            rotary_emb = None  # only other layers rotate
        return cls(
            model_type=config.model_type,
            layers=tuple(_kind(name, own) for name, own in zip(names, settings, strict=True)),
            shares="reuse" in (getattr(config, "kv_sharing_modes", None) or ()),
            caps=bool(getattr(config, "attn_logit_softcapping", None)),
            sinks=any(name.endswith("sinks") for name, _ in model.named_parameters()),
            latent=bool(getattr(config, "kv_lora_rank", None)),
            counts_positions=bool(getattr(config, "attn_temperature_tuning", None)),
            rotary=None if rotary_emb is None else partial(_rotary, rotary_emb, {"layer_type": FULL} if typed else {}),
        )

    @property
    def full(self) -> list[int]:
        """The full-attention layers, by their index in the model."""
        return [index for index, layer in enumerate(self.layers) if layer.is_full]

    @property
    def is_plain(self) -> bool:
        """Whether all layers are of full attention, by a softmax of scaled products: what training supports."""
        return len(self.full) == len(self.layers) and not (self.caps or self.sinks or self.latent)

    @property
    def has_states(self) -> bool:
        """Whether a layer has a recurrent or convolution state."""
        return any(layer.states for layer in self.layers)

    def check(self, stats_spec: StatsSpec) -> None:
        """Check that the model has what these prefill statistics require.

        Raises:
            UserError: queries or keys before RoPE, of a model without `rotary`; moments of queries, of one that `caps`.
        """
        if stats_spec.query_moments and self.caps:
            raise UserError(
                f"expected_attention has no form for capped logits, which {self.model_type} has: use another evictor, "
                "such as snapkv"
            )
        name = "expected_attention" if stats_spec.query_moments else "compactor" if stats_spec.chunk_attention else ""
        if name and self.rotary is None:
            raise UserError(
                f"{name} requires RoPE on channels i and i + R/2 in every full-attention layer, which "
                f"{self.model_type} does not have: use another evictor, such as snapkv"
            )


def _rotates_halves(decoder: Any, config: Any, kinds: Sequence[str]) -> bool:
    """Whether RoPE rotates channels i and i + R/2 as a pair, in every full-attention layer."""
    if getattr(config, "kv_lora_rank", None):
        return False  # only the last channels of a key rotate
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


def _kind(name: str, settings: Mapping[str, Any]) -> LayerKind:
    """A layer of transformers' cache, by the name of its kind and the arguments of its class."""
    return LayerKind(
        attends=name not in (*RECURRENT, NO_CACHE),
        window=settings.get("sliding_window"),
        chunked=name == CHUNKED,
        states=settings.get("number_of_states", 0),
    )


def _unsupported(model: Any, config: Any, kinds: Sequence[str]) -> str | None:
    """What excludes the model; None if it is supported."""
    if others := sorted({*kinds} - {FULL, SLIDING, CHUNKED, NO_CACHE, "hybrid", *RECURRENT}):
        return f"has {', '.join(others)} layers"
    if not {*kinds} & {FULL, SLIDING, CHUNKED, "hybrid"}:
        return "has no attention layer"
    if config.model_type == "bloom" or any(
        getattr(part, "alibi", False) for part in (config, getattr(config, "attn_config", None))
    ):
        return "adds position biases to its attention logits (ALiBi)"
    if config.model_type in KNOWN:
        return KNOWN[config.model_type]
    return None


def _rotary(rotary_emb: Any, kwargs: dict[str, str], positions: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.empty(0, dtype=torch.float32, device=positions.device)
    cos, sin = rotary_emb(like, positions[None], **kwargs)
    # Under `parallelize=True` the module may be on another device than the layer that asks.
    return cos[0].to(positions.device), sin[0].to(positions.device)
