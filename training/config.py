"""Training recipes: a YAML file with `--set KEY=VALUE` overrides, validated before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lceval.errors import UserError
from lceval.training.data import Spec
from lceval.training.grpo import Grpo
from lceval.training.longlora import LongLora
from lceval.training.tabular import Neighbourhoods
from lceval.training.texts import Texts


class Section(BaseModel):
    """A section of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The base model; `pretrained` is a name or folder, as for lm_eval.

    Attributes:
        dtype: dtype of the weights. `auto` is bfloat16 where the device computes fast in it
            (`lceval.training.precision`), else float32; the model card and `train.json` record the choice.
        chat_template: whether to apply the tokenizer's chat template; None: if it has one.
        shape: fields of the model's configuration, including `model_type`, for `--dry-run` where the model is not
            available locally.
    """

    pretrained: str = "smollm2-135m"
    revision: str = "main"
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    chat_template: bool | None = None
    shape: dict[str, str | int | float | bool] | None = None


class Lora(Section):
    """LoRA (Hu et al. 2021): W + alpha / r B A on the linear layers in `targets`."""

    r: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"


class Optim(Section):
    """AdamW.

    Attributes:
        contexts_per_step: packed contexts per optimizer step, summed over all devices.
        warmup: fraction of the steps with linear warmup.
        schedule: learning rate schedule after warmup.
        bf16: bfloat16 autocast, independent of the dtype of the weights.
        gradient_checkpointing: recompute activations in backward: less memory, about a third more time.
    """

    learning_rate: float = Field(default=5e-4, gt=0)
    max_steps: int = Field(default=100, gt=0)
    contexts_per_step: int = Field(default=2, gt=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    bf16: bool = False
    gradient_checkpointing: bool = False


class CompressionAware(Section):
    """Compression-aware training: questions and answers attend to what a randomly drawn evictor keeps of the context.

    Attributes:
        evictors: KV recipes without a budget, e.g. `snapkv` or `adakv:of=knorm`; drawn uniformly.
        keep: bounds of the share of the context that is kept, drawn uniformly.
        curriculum: lower the lower bound linearly from `keep[1]` to `keep[0]` over the first half of training.
        full: probability of using the full cache instead.
        query_aware: query-aware eviction, as lcft's model argument of that name.
        self_distillation: weight of self-distillation from the full cache, in the same forward pass: every question is
            also answered from the full cache, both answers are trained on, and KL(full || compressed) of their
            predictions is added to the loss. None disables it.
    """

    evictors: list[str] = Field(min_length=1)
    keep: tuple[float, float] = (0.15, 1.0)
    curriculum: bool = False
    full: float = Field(default=0.3, ge=0, le=1)
    query_aware: bool = False
    self_distillation: float | None = Field(default=None, ge=0)

    @field_validator("keep")
    @classmethod
    def _ordered(cls, keep: tuple[float, float]) -> tuple[float, float]:
        if not 0 < keep[0] <= keep[1] <= 1:
            raise ValueError("keep must be two shares, 0 < lower <= upper <= 1")
        return keep


class Config(Section):
    """A training recipe.

    Attributes:
        output: output folder: a PEFT adapter, or a model where `lora` is null.
        data: training rows to build (`lceval.training.data.Spec`); lengths are in tokens of the model.
        rows: a file written by `lceval train data`, instead of `data`.
        neighbourhoods: rows of tables, instead of `data`.
        texts: plain text, instead of questions.
        longlora: train on `texts` with shifted sparse attention for a longer context window; replaces `lora`.
        compression_aware: training under KV compression.
        grpo: GRPO instead of supervised fine-tuning; replaces `optim` except for `optim.bf16`.
        save_steps: steps between checkpoints.
        keep_checkpoints: number of newest checkpoints to keep; None keeps all. Each is an adapter that lcft loads.
        eval_contexts: number of contexts of the split `test` for the held-out loss at every checkpoint; 0 disables it.
    """

    output: Path
    model: Model = Model()
    data: Spec = Spec(datasets=("squad",))
    rows: Path | None = None
    lora: Lora | None = Lora()
    optim: Optim = Optim()
    neighbourhoods: Neighbourhoods | None = None
    texts: Texts | None = None
    longlora: LongLora | None = None
    compression_aware: CompressionAware | None = None
    grpo: Grpo | None = None
    seed: int = Field(default=0, ge=0)
    save_steps: int = Field(default=50, gt=0)
    keep_checkpoints: int | None = Field(default=2, gt=0)
    eval_contexts: int = Field(default=0, ge=0)
    report_to: list[Literal["tensorboard", "trackio"]] = []

    @model_validator(mode="after")
    def _compatible(self) -> Config:
        sources = [name for name in ("rows", "neighbourhoods", "texts") if getattr(self, name) is not None]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are mutually exclusive")
        if self.grpo is not None and self.compression_aware is not None:
            raise ValueError("compression_aware requires supervised fine-tuning, not grpo")
        if self.longlora is not None and self.texts is None:
            raise ValueError("longlora requires texts: set texts.files and texts.tokens")
        if self.texts is not None and (self.compression_aware or self.grpo or self.eval_contexts):
            raise ValueError("texts have no questions, which compression_aware, grpo and eval_contexts require")
        return self


def shipped() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(
        f.name.removesuffix(".yaml") for f in files("lceval.training.recipes").iterdir() if f.name.endswith(".yaml")
    )


def read(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """A recipe from a file, or a shipped one by name.

    Args:
        overrides: KEY=VALUE with dots between sections, e.g. `optim.learning_rate=1e-4`; VALUE is YAML.

    Raises:
        UserError: unknown recipe, invalid YAML, or the first invalid key.
    """
    if Path(recipe).is_file():
        text = Path(recipe).read_text(encoding="utf-8")
    elif recipe in shipped():
        text = (files("lceval.training.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        raise UserError(f"unknown recipe {recipe!r}: expected a YAML file or one of {', '.join(shipped())}")
    try:
        values: Any = yaml.safe_load(text) or {}
        if not isinstance(values, dict):
            raise UserError(f"{recipe}: expected sections such as data and optim, got {type(values).__name__}")
        values.setdefault("output", f"runs/{Path(recipe).stem}")
        for override in overrides:
            _override(values, override)
    except yaml.YAMLError as error:
        raise UserError(f"{recipe}: invalid YAML ({' '.join(str(error).split())})") from None
    return parse(values, recipe, [override.partition("=")[0] for override in overrides])


def _override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--set {override}: expected --set KEY=VALUE, e.g. --set optim.learning_rate=1e-4")
    *sections, key = path.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: invalid YAML ({' '.join(str(error).split())})") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with suppress(ValueError):
            value = float(value)
    values[key] = value


def parse(values: Any, source: str, overridden: Sequence[str] = ()) -> Config:
    """A recipe from plain values.

    Args:
        source: name of the recipe, for error messages.
        overridden: keys set by `--set`, for error messages.

    Raises:
        UserError: the first invalid key.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        by_set = any(where == key or where.startswith(f"{key}.") for key in overridden)
        place = f"--set {where}" if by_set else f"{source}: {where}" if where else source
        if first["type"] == "extra_forbidden":
            known = _known(first["loc"][:-1])
            near = get_close_matches(str(first["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
            raise UserError(f"{place}: unknown key; {hint}") from None
        message = first["msg"].lower().removeprefix("value error, ")
        raise UserError(f"{place}: {message} (got {first['input']!r:.60})") from None


def _known(path: Sequence[int | str]) -> list[str]:
    """The valid keys of the section at a path."""
    section: Any = Config
    for part in path:
        kind = section.model_fields[part].annotation
        section = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel))
    return list(section.model_fields)
