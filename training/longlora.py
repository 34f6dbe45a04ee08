"""LongLoRA (Chen et al. 2024, arXiv 2309.12307): a longer window by little training.

Shifted sparse attention while it trains (`lceval.training.shifted`), LoRA on the attention's projections, embeddings
and norms trained whole, and RoPE scaled so that the longer positions fall between known ones.

What is saved is a model folder, not an adapter, in two cases. An adapter cannot say that its base must be loaded with
other positions: on the plain base it would answer wrongly without a word. And where the output layer is tied to
embeddings that were trained whole, lm-eval ties them anew after it has loaded an adapter, which breaks what PEFT made.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lceval.errors import UserError
from lceval.models.geometry import Geometry
from lceval.training import shifted

TRAINED_WHOLE = {"embeddings": "embed", "norms": "norm"}
"""Which modules an option means: those with weights of their own whose name has this in it."""


class LongLora(BaseModel):
    """What is trained, and for which window.

    Attributes:
        group: a group's share of the longest sequence in a batch; the paper takes a quarter.
        group_tokens: tokens of a group, even, instead of a share.
        r, alpha, targets: of LoRA.
        embeddings, norms: train these whole (the output layer too, where it is tied to the embeddings).
        window_tokens: the window to reach; None leaves the model's own.
        rope: how positions are scaled for it: `linear` divides all of them, `yarn` (Peng et al. 2023) slow turns only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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
            raise ValueError("group and group_tokens exclude each other")
        return self


def prepare(model: Any, config: LongLora) -> Any:
    """The model as a PEFT model, ready to train: its window extended, its attention shifted, its trainables chosen.

    Args:
        model: a causal LM of transformers, changed in place.

    Raises:
        UserError: a model that shifted attention does not fit, or a window that is none.
    """
    from peft import LoraConfig, get_peft_model  # heavy

    if any(Geometry.of(model).windows):
        raise UserError(f"{model.config.model_type} has sliding layers: LongLoRA shifts attention that sees everything")
    if getattr(model.config, "attention_dropout", 0.0):
        raise UserError(f"attention_dropout={model.config.attention_dropout}: shifted attention has none; set it to 0")
    if config.window_tokens is not None:
        extend(model, config.window_tokens, config.rope)
    model.set_attn_implementation(shifted.register(config.group, config.group_tokens))
    whole = trained_whole(model, config)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        modules_to_save=whole or None,
        # Otherwise PEFT trains the embeddings away from the output layer that the model shares them with.
        ensure_weight_tying=_tied(model, config),
    )
    return get_peft_model(model, lora)


def trained_whole(model: Any, config: LongLora) -> list[str]:
    """The last part of the names of the modules that are trained whole.

    Raises:
        UserError: the model has none of a kind that is asked for.
    """
    named = {
        n.rpartition(".")[2] for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None
    }
    found: list[str] = []
    for option, part in TRAINED_WHOLE.items():
        if getattr(config, option):
            own = sorted(name for name in named if part in name.lower())
            if not own:
                raise UserError(
                    f"{option}=true and {model.config.model_type} has no module named *{part}*: set it to false"
                )
            found += own
    return found


def extend(model: Any, window_tokens: int, rope: str = "linear") -> None:
    """Scale the RoPE of a loaded model so that its window holds so many tokens; its config says so when it is saved.

    Raises:
        UserError: the window is no longer than the model's own, or its RoPE is scaled already.
    """
    text = model.config.get_text_config()
    decoder = model.get_decoder()
    known, own = getattr(text, "rope_parameters", None), text.max_position_embeddings
    if not isinstance(known, dict) or "rope_type" not in known or not hasattr(decoder, "rotary_emb"):
        raise UserError(f"{text.model_type} has no RoPE of one kind for all layers: its window cannot be extended here")
    if known["rope_type"] != "default":
        raise UserError(f"the model's RoPE is already {known['rope_type']}: extend the model that it was made from")
    if window_tokens <= own:
        raise UserError(f"window_tokens={window_tokens} is no more than the model's own {own}: leave it out")
    scaled = {**known, "rope_type": rope, "factor": window_tokens / own}
    if rope == "yarn":
        scaled["original_max_position_embeddings"] = own
    text.rope_parameters = scaled
    text.max_position_embeddings = window_tokens
    pair = decoder.rotary_emb
    decoder.rotary_emb = type(pair)(config=text).to(pair.inv_freq.device)


def needs_model_folder(model: Any, config: LongLora) -> bool:
    """Whether an adapter alone would not be the trained model to lcft and hf (see above)."""
    return config.window_tokens is not None or _tied(model, config)


def _tied(model: Any, config: LongLora) -> bool:
    return config.embeddings and bool(model.config.get_text_config().tie_word_embeddings)


def save(model: Any, config: LongLora, folder: Path, tokenizer: Any) -> Literal["peft", "pretrained"]:
    """Save what `prepare` made; says as which model argument lcft, hf and others load the folder.

    An adapter for `peft=` where that is enough. Where it is not (`needs_model_folder`), a whole model for
    `pretrained=`: the adapter is merged in the weights' dtype, and `model` is of no further use.

    Raises:
        UserError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if whole := needs_model_folder(model, config):
            model.merge_and_unload().save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        else:
            model.save_pretrained(partial)
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return "pretrained" if whole else "peft"
