"""What a training run is asked for: a YAML recipe with `key=value` changes, checked before anything is loaded."""

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
    """A part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The model that is tuned: `pretrained` as for lm_eval.

    Attributes:
        dtype: of the weights. `auto` is bfloat16 where the device computes fast in it (`lceval.training.precision`),
            else float32; the card and `train.json` state the one that was used.
        chat_template: whether prompts go through the tokenizer's template, as `lceval run` does; None: if it has one.
        shape: fields of its configuration, `model_type` among them: what `--dry-run` counts where the model itself is
            not at hand.
    """

    pretrained: str = "smollm2-135m"
    revision: str = "main"
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    chat_template: bool | None = None
    shape: dict[str, str | int | float | bool] | None = None


class Lora(Section):
    """LoRA (Hu et al. 2021): W + alpha / r B A on the linear layers named by `targets`."""

    r: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"


class Optim(Section):
    """AdamW over `max_steps` steps of `contexts_per_step` packed contexts each, on all devices together.

    Attributes:
        warmup: share of the steps over which the rate rises to `learning_rate`.
        schedule: how the learning rate falls after that.
        bf16: compute in bfloat16 (autocast), whatever the weights are kept in.
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
    """Compression-aware fine-tuning: questions and answers see the context through an evictor drawn for each context.

    Attributes:
        evictors: recipe strings without an amount, as `snapkv` or `adakv:of=knorm`; each is as likely.
        keep: the share that stays is drawn uniformly between these two.
        curriculum: draw from the upper end at first: the lower bound falls to `keep[0]` over the first half.
        full: how often nothing is evicted instead.
        query_aware: whether questions take part in the scores, as lcft's.
        self_distillation: weight of self-distillation from the full cache, in the same forward pass: every question is
            also answered from the whole context, both answers are learned, and the KL divergence of the prediction
            under compression from that under the full cache joins the loss. None disables it.
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
            raise ValueError("keep is two shares, 0 < lower <= upper <= 1")
        return keep


class Config(Section):
    """A whole recipe.

    Attributes:
        output: the folder of the adapter, or of the model where `lora` is null.
        data: the rows to learn from (`lceval.training.data.Spec`); their tokens are counted as the model's.
        rows: a file that `lceval train data` wrote, instead of `data`.
        neighbourhoods: rows of tables, instead of `data`.
        texts: plain text, instead of questions. longlora: learned with shifted sparse attention, for a longer window;
            its own LoRA takes the place of `lora`.
        compression_aware: fine-tuning under KV compression.
        grpo: reinforcement by a reward in place of supervised fine-tuning; it has steps and rates of its own, and
            `optim` gives the rest (`bf16`).
        save_steps: steps between checkpoints; the same line goes on from the last one.
        keep_checkpoints: how many of them stay, the newest; None keeps all. Each is an adapter that lcft loads.
        eval_contexts: contexts of the split `test` on which the loss is taken with every checkpoint; 0 takes none.
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
    def _go_together(self) -> Config:
        sources = [name for name in ("rows", "neighbourhoods", "texts") if getattr(self, name) is not None]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} exclude each other")
        if self.grpo is not None and self.compression_aware is not None:
            raise ValueError("compression_aware goes with supervised fine-tuning, not with grpo")
        if self.longlora is not None and self.texts is None:
            raise ValueError("longlora learns from texts: name texts.files and texts.tokens")
        if self.texts is not None and (self.compression_aware or self.grpo or self.eval_contexts):
            raise ValueError("texts go with neither compression_aware, grpo nor eval_contexts, which need questions")
        return self


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        f.name.removesuffix(".yaml") for f in files("lceval.training.recipes").iterdir() if f.name.endswith(".yaml")
    )


def read(recipe: str, changes: Sequence[str] = ()) -> Config:
    """A recipe from a file, or by the name of a shipped one.

    Args:
        changes: KEY=VALUE with dots between sections, as `optim.learning_rate=1e-4`; VALUE as in YAML.

    Raises:
        UserError: no such recipe, not YAML, or what is wrong with its first bad key.
    """
    if Path(recipe).is_file():
        text = Path(recipe).read_text(encoding="utf-8")
    elif recipe in shipped():
        text = (files("lceval.training.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        raise UserError(f"no recipe {recipe!r}: a YAML file, or one of {', '.join(shipped())}")
    try:
        said: Any = yaml.safe_load(text) or {}
        if not isinstance(said, dict):
            raise UserError(f"{recipe}: expected sections as data and optim, found {type(said).__name__}")
        said.setdefault("output", f"runs/{Path(recipe).stem}")
        for change in changes:
            _change(said, change)
    except yaml.YAMLError as error:
        raise UserError(f"{recipe}: not YAML ({' '.join(str(error).split())})") from None
    return parse(said, recipe)


def _change(said: dict[str, Any], change: str) -> None:
    path, separator, value = change.partition("=")
    if not separator:
        raise UserError(f"{change!r}: expected KEY=VALUE, as optim.learning_rate=1e-4")
    *sections, key = path.split(".")
    for section in sections:
        if not isinstance(said.get(section), dict):
            said[section] = {}
        said = said[section]
    read = yaml.safe_load(value)
    if isinstance(read, str):  # YAML 1.1 reads 1e-4 as a word
        with suppress(ValueError):
            read = float(read)
    said[key] = read


def parse(said: Any, source: str) -> Config:
    """A recipe from plain values.

    Raises:
        UserError: what is wrong, by the first key.
    """
    try:
        return Config.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _known(first["loc"][:-1])
            near = get_close_matches(str(first["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
            raise UserError(f"{source}: unknown key {where}; {hint}") from None
        raise UserError(f"{source}: {where}: {first['msg'].lower()} (found {first['input']!r:.60})") from None


def _known(path: Sequence[int | str]) -> list[str]:
    """The keys that the section at a path may have."""
    section: Any = Config
    for part in path:
        kind = section.model_fields[part].annotation
        section = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel))
    return list(section.model_fields)
