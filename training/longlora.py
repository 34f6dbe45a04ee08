"""LongLoRA (Chen et al. 2024, arXiv 2309.12307): context window extension by parameter-efficient training.

Shifted sparse attention in training (`lceval.training.shifted_attention`), LoRA on the attention projections, full
training of embeddings and norms, and RoPE scaling, so that longer positions are interpolated.

In two cases the output is a model folder instead of an adapter. First, an adapter cannot specify RoPE scaling of its
base: on the unscaled base it would silently give wrong outputs. Second, if the output layer is tied to fully trained
embeddings, lm-eval ties the weights again after loading an adapter, which breaks PEFT's modules.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from lceval.core.errors import UserError
from lceval.models.geometry import Geometry
from lceval.training import shifted_attention

FULLY_TRAINED = {"embeddings": "embed", "norms": "norm"}
"""The modules of an option: those with weights of their own and this substring in their name."""


class LongLora(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """The section `longlora` of a recipe.

    Attributes:
        group: group size as a share of the longest sequence in a batch (a quarter in the paper).
        group_tokens: group size in tokens, even, instead of a share.
        r, alpha, targets: LoRA settings.
        embeddings, norms: fully train these (including the output layer if it is tied to the embeddings).
        window_tokens: context window to extend to; None keeps the model's own.
        rope: RoPE scaling: `linear` scales all frequencies, `yarn` (Peng et al. 2023) low frequencies only.
    """

    group: float = Field(default=0.25, gt=0, le=1)
    group_tokens: int | None = Field(default=None, ge=2, multiple_of=2)
    r: int = Field(default=8, gt=0)
    alpha: int = Field(default=16, gt=0)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    embeddings: bool = True
    norms: bool = True
    window_tokens: int | None = Field(default=None, gt=0)
    rope: Literal["linear", "yarn"] = "linear"

    @model_validator(mode="after")
    def _one_group(self) -> LongLora:
        if self.group_tokens is not None and "group" in self.model_fields_set:
            raise ValueError("group and group_tokens are mutually exclusive")
        return self


def prepare(model: Any, config: LongLora) -> Any:
    """A PEFT model with extended window, shifted attention and the trainable parameters of `config`.

    Args:
        model: a causal LM of transformers, changed in place.

    Raises:
        UserError: the model does not support shifted attention or the window.
    """
    from peft import LoraConfig, get_peft_model  # heavy

    if not Geometry.of(model).is_plain:
        raise UserError(f"{model.config.model_type} has layers without plain full attention, which LongLoRA requires")
    if getattr(model.config, "attention_dropout", 0.0):
        raise UserError(f"attention_dropout={model.config.attention_dropout}: shifted attention requires 0")
    if config.window_tokens is not None:
        extend(model, config.window_tokens, config.rope)
    model.set_attn_implementation(shifted_attention.register(config.group, config.group_tokens))
    full = fully_trained(model, config)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        modules_to_save=full or None,
        # Otherwise PEFT unties the trained embeddings from the output layer.
        ensure_weight_tying=_tied(model, config),
    )
    return get_peft_model(model, lora)


def fully_trained(model: Any, config: LongLora) -> list[str]:
    """Last components of the names of the fully trained modules.

    Raises:
        UserError: the model has no module of an enabled option.
    """
    named = {
        n.rpartition(".")[2] for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None
    }
    names: list[str] = []
    for option, part in FULLY_TRAINED.items():
        if getattr(config, option):
            own = sorted(name for name in named if part in name.lower())
            if not own:
                raise UserError(
                    f"{option}=true, but {model.config.model_type} has no module named *{part}*: set it to false"
                )
            names += own
    return names


def extend(model: Any, window_tokens: int, rope: str = "linear") -> None:
    """Scale the RoPE of a loaded model to a window of `window_tokens` tokens, also in its config.

    Raises:
        UserError: the window is not longer than the model's own, or its RoPE is already scaled or not supported.
    """
    text = model.config.get_text_config()
    decoder = model.get_decoder()
    known, own = getattr(text, "rope_parameters", None), text.max_position_embeddings
    if not isinstance(known, dict) or "rope_type" not in known or not hasattr(decoder, "rotary_emb"):
        raise UserError(
            f"{text.model_type} does not have the same RoPE in all layers: extending its window is not supported"
        )
    if known["rope_type"] != "default":
        raise UserError(f"the model's RoPE is already scaled ({known['rope_type']}): extend the original model")
    if window_tokens <= own:
        raise UserError(f"window_tokens={window_tokens} is not longer than the model's window of {own}: remove it")
    scaled = {**known, "rope_type": rope, "factor": window_tokens / own}
    if rope == "yarn":
        scaled["original_max_position_embeddings"] = own
    text.rope_parameters = scaled
    text.max_position_embeddings = window_tokens
    rotary = decoder.rotary_emb
    decoder.rotary_emb = type(rotary)(config=text).to(rotary.inv_freq.device)


def needs_model_folder(model: Any, config: LongLora) -> bool:
    """Whether lcft and hf could not load the trained model from an adapter (see the module docstring)."""
    return config.window_tokens is not None or _tied(model, config)


def _tied(model: Any, config: LongLora) -> bool:
    return config.embeddings and bool(model.config.get_text_config().tie_word_embeddings)


def save(model: Any, config: LongLora, folder: Path, tokenizer: Any) -> Literal["peft", "pretrained"]:
    """Save a model from `prepare`; returns the model argument that loads the folder in lcft and hf.

    Saves an adapter for `peft=`, or a model for `pretrained=` if an adapter is not sufficient (`needs_model_folder`).
    Then the adapter is merged into `model` in the weights' dtype, and `model` must not be used afterwards.

    Raises:
        UserError: the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if merged := needs_model_folder(model, config):
            model.merge_and_unload().save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        else:
            model.save_pretrained(partial)
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return "pretrained" if merged else "peft"
