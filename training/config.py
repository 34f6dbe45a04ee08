"""Training recipes: a YAML file with `--set KEY=VALUE` overrides, validated before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lceval.core import yaml_config
from lceval.training.data import Spec
from lceval.training.grpo import Grpo
from lceval.training.longlora import LongLora
from lceval.training.tabular import Neighbourhoods
from lceval.training.texts import Texts


class Section(BaseModel):
    """A section of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Pretrained(Section):
    """The base model; `pretrained` is a name or folder, as for lm_eval.

    Attributes:
        dtype: dtype of the weights. `auto` is bfloat16 where the device computes fast in it
            (`lceval.training.precision`), else float32; the model card and `train.json` record the choice.
        chat_template: whether to apply the tokenizer's chat template; None: if it has one.
    """

    pretrained: str = "smollm2-135m"
    revision: str = "main"
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    chat_template: bool | None = None

    def applies_template(self, tokenizer: Any) -> bool:
        """Whether prompts have the chat template."""
        return tokenizer.chat_template is not None if self.chat_template is None else self.chat_template


class Model(Pretrained):
    """The model to train.

    Attributes:
        shape: fields of the model's configuration, including `model_type`, for `--dry-run` where the model is not
            available locally.
    """

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


class LearnedScorer(Section):
    """The scorer by which `kvzap` evicts in training.

    Attributes:
        init: folder or hub name; None: the model's own.
        learning_rate: that of its weights, which are trained together with the adapter; 0 keeps them.
        temperature: of the gate through which it is trained, at the beginning and at the end; geometric in between.
    """

    init: str | None = None
    learning_rate: float = Field(default=0.0, ge=0)
    temperature: tuple[float, float] = (1.0, 0.1)

    @property
    def is_trained(self) -> bool:
        return self.learning_rate > 0

    @field_validator("temperature")
    @classmethod
    def _falling(cls, temperature: tuple[float, float]) -> tuple[float, float]:
        if not 0 < temperature[1] <= temperature[0]:
            raise ValueError("temperature must be two numbers, first >= last > 0")
        return temperature


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
        scorer: that of the evictor `kvzap`.
    """

    evictors: list[str] = Field(min_length=1)
    keep: tuple[float, float] = (0.15, 1.0)
    curriculum: bool = False
    full: float = Field(default=0.3, ge=0, le=1)
    query_aware: bool = False
    self_distillation: float | None = Field(default=None, ge=0)
    scorer: LearnedScorer = LearnedScorer()

    @property
    def has_kvzap(self) -> bool:
        """Whether an evictor goes by learned scores."""
        return any(name.partition(":")[0] == "kvzap" for name in self.evictors)

    @model_validator(mode="after")
    def _learned(self) -> CompressionAware:
        if self.has_kvzap and self.query_aware:
            raise ValueError("kvzap scores a context alone, so query_aware must be false")
        if self.scorer != LearnedScorer() and not self.has_kvzap:
            raise ValueError("scorer is that of the evictor kvzap, which evictors does not have")
        return self

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


RECIPES = "lceval.training.recipes"


def shipped() -> list[str]:
    """Names of the recipes in the package."""
    return yaml_config.shipped(RECIPES)


def read(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """A recipe from a file, or a shipped one by name, with KEY=VALUE overrides.

    Raises:
        UserError: as `lceval.core.yaml_config.read`.
    """
    return yaml_config.read(Config, recipe, RECIPES, "recipe", overrides, {"output": f"runs/{Path(recipe).stem}"})


def parse(values: Any, source: str) -> Config:
    """A recipe from plain values; `source` names it in errors.

    Raises:
        UserError: the first invalid key.
    """
    return yaml_config.parse(Config, values, source)
