"""The grid of a sweep: a YAML file or a preset, validated before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lceval.errors import UserError


class Grid(BaseModel):
    """Lists of settings; each combination is a cell.

    Attributes:
        models, adapters: `pretrained` and `peft`; None is no adapter.
        recipes: KV recipes.
        contexts: context settings as in lm_eval's `--metadata`: `full`, `gold`, `none`, or `{context: rag, …}`.
        tasks: tasks, groups, or datasets, which are crossed with `modes` and `lengths` (K tokens).
        seeds: `data_seed` of the rows; None is the task's default.
        limit: questions per cell; None is all.
        model_args: further model arguments, e.g. `diagnose: gold`.
        gen_kwargs: generation arguments that override the tasks', e.g. `max_gen_toks: 16`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str] = Field(min_length=1)
    adapters: list[str | None] = [None]
    recipes: list[str] = Field(default=["full"], min_length=1)
    contexts: list[str | dict[str, str | int]] = Field(default=["full"], min_length=1)
    tasks: list[str] = Field(min_length=1)
    modes: list[str] = ["ao"]
    lengths: list[int] = []
    seeds: list[int | None] = [None]
    limit: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=1, gt=0)
    model_args: dict[str, bool | str | int | float] = {}
    gen_kwargs: dict[str, bool | int | float | str | list[str]] = {}


def presets() -> list[str]:
    """Names of the packaged grids."""
    return sorted(
        f.name.removesuffix(".yaml") for f in files("lceval.sweep.presets").iterdir() if f.name.endswith("yaml")
    )


def read(file: Path | None, preset: str | None, overrides: Sequence[str] = ()) -> tuple[str, Grid]:
    """A grid and its name.

    Args:
        overrides: KEY=VALUE texts that replace keys of the file; VALUE is YAML.

    Raises:
        UserError: neither or both of file and preset, no valid grid, or an unknown key.
    """
    if (file is None) == (preset is None):
        raise UserError(f"expected either a grid file or --preset ({', '.join(presets())})")
    if preset is not None:
        if preset not in presets():
            raise UserError(f"no preset {preset!r}: one of {', '.join(presets())}")
        name, text = preset, (files("lceval.sweep.presets") / f"{preset}.yaml").read_text(encoding="utf-8")
    else:
        assert file is not None
        if not file.is_file():
            raise UserError(f"{file}: no such file; docs/sweep.md has an example")
        name, text = file.stem, file.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
        for override in overrides:
            key, separator, value = override.partition("=")
            if not separator:
                raise UserError(f"--set {override!r}: expected KEY=VALUE")
            values[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{file or preset}: not YAML ({' '.join(str(error).split())})") from None
    return name, parse(values, str(file or preset))


def parse(values: Any, source: str) -> Grid:
    """A grid from plain values; `source` names their file in errors.

    Raises:
        UserError: the first invalid key.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: expected keys such as models, recipes and tasks, got {type(values).__name__}")
    for key in values:
        if key not in Grid.model_fields:
            near = get_close_matches(str(key), Grid.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(Grid.model_fields)}"
            raise UserError(f"{source}: unknown key {key!r}; {hint}")
    try:
        return Grid.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{source}: {where}: {first['msg'].lower()} (got {first['input']!r:.60})") from None
