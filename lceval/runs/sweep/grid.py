"""The grid of a sweep: a YAML file or a preset, validated before any model is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from lceval.core import yaml_config
from lceval.core.errors import UserError


class Grid(BaseModel):
    """Lists of settings; each combination is a cell.

    Attributes:
        models, adapters: `pretrained` and `peft`; None is no adapter.
        recipes: KV recipes.
        scorers: `scorer` of the recipes that require one (kvzap); None is the model's default.
        contexts: context settings as in lm_eval's `--metadata`: `full`, `gold`, `none`, or `{context: rag, …}`.
        tasks: tasks, groups, or datasets, which are crossed with `modes` and `lengths` (K tokens).
        seeds: `data_seed` of the rows; None is the task's default.
        limit: questions per cell; None is all.
        model_args: further model arguments, e.g. `diagnose: gold`.
        gen_kwargs: generation arguments that override the tasks', e.g. `max_gen_toks: 16`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    models: list[str] = Field(min_length=1)
    adapters: list[str | None] = [None]
    recipes: list[str] = Field(default=["full"], min_length=1)
    scorers: list[str | None] = Field(default=[None], min_length=1)
    contexts: list[str | dict[str, str | int | float]] = Field(default=["full"], min_length=1)
    tasks: list[str] = Field(min_length=1)
    modes: list[str] = ["ao"]
    lengths: list[int] = []
    seeds: list[int | None] = [None]
    limit: int | None = Field(default=None, gt=0)
    batch_size: PositiveInt | Literal["auto"] = 1
    model_args: dict[str, bool | str | int | float] = {}
    gen_kwargs: dict[str, bool | int | float | str | list[str]] = {}


PRESETS = "lceval.runs.sweep.presets"


def presets() -> list[str]:
    """Names of the packaged grids."""
    return yaml_config.shipped(PRESETS)


def read(file: Path | None, preset: str | None, overrides: Sequence[str] = ()) -> tuple[str, Grid]:
    """A grid and its name, from a file or a preset, with KEY=VALUE overrides.

    Raises:
        UserError: neither or both of file and preset, or as `lceval.core.yaml_config.read`.
    """
    if (file is None) == (preset is None):
        raise UserError(f"expected either a grid file or --preset ({', '.join(presets())})")
    if file is not None and not os.path.isfile(file):
        raise UserError(f"{file}: no such file; docs/sweep.md has an example")
    if preset is not None and preset not in presets():
        raise UserError(f"no preset {preset!r}: one of {', '.join(presets())}")
    source = file or str(preset)
    return Path(source).stem, yaml_config.read(Grid, source, PRESETS, "grid", overrides)
