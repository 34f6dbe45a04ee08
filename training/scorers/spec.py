"""Recipes of scorers: a YAML file with `--set KEY=VALUE` overrides, validated before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lceval.core import yaml_config
from lceval.training.config import Pretrained, Section
from lceval.training.data import Spec
from lceval.training.texts import Texts


class AdaptedModel(Pretrained):
    """The model whose slots are scored.

    Attributes:
        peft: folder or hub name of an adapter in place, as lcft's model argument of that name.
    """

    peft: str | None = None


class Linear(Section):
    """Linear maps by ridge regression, in closed form from all tokens.

    Attributes:
        ridge: penalty on the squared weights, in units of the mean variance of an input channel.
    """

    ridge: float = Field(default=1e-3, gt=0)


class Mlp(Section):
    """Two layers with a GELU between them, trained with Adam on the squared error of standardized targets.

    Attributes:
        hidden: width of the hidden layer.
        tokens: tokens to train on, the same number of each context; their attention inputs are on disk in 16 bit
            (tokens x channels x layers x 2 bytes) until the run is finished.
        epochs: passes over these tokens.
        learning_rate: peak, from which a cosine falls to 0.
        batch: tokens per step.
    """

    hidden: int = Field(default=512, gt=0)
    tokens: int = Field(default=100_000, gt=0)
    epochs: int = Field(default=10, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch: int = Field(default=512, gt=0)


class ScorerRecipe(Section):
    """A recipe of a scorer.

    Attributes:
        output: output folder, which lcft loads.
        data: training rows, whose contexts are used; lengths are in tokens of the model.
        texts: plain text, each piece of `tokens` tokens a context, instead of `data` or besides it.
        contexts: maximum number of contexts to train on; None: all.
        held_out: contexts to report on. None of their documents is in a context trained on.
        target: what is learned, as its natural logarithm. `kvzip` and `kvzip+` are the scores of these methods;
            `attention` is the most attention that a slot receives from the questions and gold answers of the rows, over
            their tokens and the query heads of a KV head.
        floor: smaller targets count as this one.
        linear, mlp: the kind of map; exactly one.
        seed: seed of the order of contexts, which sets those held out, and of the MLP.
        save_contexts: contexts between checkpoints.
    """

    output: Path
    model: AdaptedModel = AdaptedModel()
    data: Spec | None = None
    texts: Texts | None = None
    contexts: int | None = Field(default=None, gt=0)
    held_out: int = Field(default=8, gt=0)
    target: Literal["kvzip", "kvzip+", "attention"] = "kvzip"
    floor: float = Field(default=1e-6, gt=0, lt=1)
    linear: Linear | None = None
    mlp: Mlp | None = None
    seed: int = Field(default=0, ge=0)
    save_contexts: int = Field(default=8, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> ScorerRecipe:
        if (self.linear is None) == (self.mlp is None):
            raise ValueError("expected exactly one of linear and mlp")
        if self.data is None and self.texts is None:
            raise ValueError("no contexts: set data.datasets, or texts.files and texts.tokens")
        if self.texts is not None and self.target == "attention":
            raise ValueError("target=attention requires questions, which texts do not have: use data, or target=kvzip")
        if self.data is not None and self.data.split == "test":
            raise ValueError("data.split=test is for evaluation: a scorer is trained on split=train")
        return self

    @property
    def kind(self) -> str:
        """`linear` or `mlp`."""
        return "linear" if self.mlp is None else "mlp"


SHIPPED = "lceval.training.scorers"


def shipped() -> list[str]:
    """Names of the recipes in the package."""
    return yaml_config.shipped(SHIPPED)


def read(recipe: str, overrides: Sequence[str] = ()) -> ScorerRecipe:
    """A recipe from a file, or a shipped one by name, with KEY=VALUE overrides.

    Raises:
        UserError: as `lceval.core.yaml_config.read`.
    """
    defaults = {"output": f"runs/{Path(recipe).stem}"}
    return yaml_config.read(ScorerRecipe, recipe, SHIPPED, "recipe of a scorer", overrides, defaults)


def parse(values: Any, source: str) -> ScorerRecipe:
    """A recipe from plain values; `source` names it in errors.

    Raises:
        UserError: the first invalid key.
    """
    return yaml_config.parse(ScorerRecipe, values, source)
