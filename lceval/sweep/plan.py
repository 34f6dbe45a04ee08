"""The cells of a grid: what is run, under which folder, and what it will cost."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lceval.errors import UserError
from lceval.sweep.grid import Grid

# Prefill and decode of a model of 135M parameters in float32 on two cores, seconds a token; see `Plan.cost`.
PREFILL_S, DECODE_S = 0.0015, 0.035


@dataclass(frozen=True)
class Cell:
    """One run folder."""

    model: str
    adapter: str | None
    recipe: str
    task: str
    metadata: tuple[tuple[str, str | int], ...]
    limit: int | None
    batch_size: int
    model_args: tuple[tuple[str, str | int | float], ...]

    @property
    def group(self) -> tuple[object, ...]:
        """Cells of one group differ in nothing but the recipe."""
        return self.model, self.adapter, self.task, self.metadata, self.limit, self.batch_size, self.model_args

    @property
    def owner(self) -> tuple[object, ...]:
        """Cells of one owner use one loaded model."""
        return self.model, self.adapter, self.batch_size, self.model_args

    @property
    def name(self) -> str:
        """The folder's name: readable parts, and a digest where they alone could be another cell's."""
        shown = [str(value) for _, value in self.metadata]
        parts = [self.model.rstrip("/").rsplit("/", 1)[-1], *([Path(self.adapter).name] if self.adapter else [])]
        readable = "_".join([*parts, self.task, *shown, self.recipe])
        digest = hashlib.sha256(json.dumps(self.argv(Path()), sort_keys=True).encode()).hexdigest()[:6]
        return f"{re.sub(r'[^A-Za-z0-9.+=-]+', '-', readable)}_{digest}"

    def argv(self, folder: Path) -> list[str]:
        """The flags with which `lceval run` makes the same cell."""
        args = {"pretrained": self.model, **({"peft": self.adapter} if self.adapter else {}), "kv": self.recipe}
        args |= {key: str(value) for key, value in self.model_args}
        flags = [
            "--model=lcft",
            f"--model_args={','.join(f'{k}={v}' for k, v in args.items())}",
            f"--tasks={self.task}",
        ]
        flags += [f"--batch_size={self.batch_size}", f"--output_path={folder}"]
        if self.limit is not None:
            flags.append(f"--limit={self.limit}")
        if self.metadata:
            flags.append(f"--metadata={json.dumps(dict(self.metadata))}")
        return flags


@dataclass(frozen=True)
class Plan:
    """The cells of a grid, in the order they are run, and the combinations that make no sense, with the reason."""

    cells: tuple[Cell, ...]
    na: tuple[tuple[str, str], ...]

    def groups(self) -> list[list[Cell]]:
        """Cells that share their contexts, side by side with those that share their model."""
        found: dict[tuple[object, ...], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.group, []).append(cell)
        return sorted(found.values(), key=lambda group: [c.owner for c in self.cells].index(group[0].owner))

    def finished(self, root: Path) -> list[Cell]:
        """Cells that an earlier start finished."""
        return [cell for cell in self.cells if _status(root / cell.name) == "finished"]

    def cost(self, root: Path) -> dict[str, Any]:
        """What is left: samples, prefill tokens where the task's name says its length, and seconds.

        Seconds assume the packaged model on two cores (`PREFILL_S`, `DECODE_S`), one context a sample at most, and 32
        new tokens an answer: an upper bound there, and for another model a number to scale.
        """
        done = {cell.name for cell in self.finished(root)}
        samples, tokens, seconds = 0, 0, 0.0
        for group in self.groups():
            left = [cell for cell in group if cell.name not in done]
            if not left:
                continue
            n, length = _questions(left[0]), _length(left[0].task)
            samples += n * len(left)
            tokens += n * (length or 0)
            seconds += n * (length or 0) * PREFILL_S + n * len(left) * 32 * DECODE_S
        return {
            "cells": len(self.cells),
            "finished": len(done),
            "samples": samples,
            "prefill_tokens": tokens,
            "seconds": seconds,
        }


def plan(grid: Grid) -> Plan:
    """Cross everything; each name is checked, nothing is loaded.

    Raises:
        UserError: an unknown task, dataset, mode or context, or a bad recipe.
    """
    from lceval.models import recipe
    from lceval.tasks import catalogue, contexts

    recipes = [str(recipe.parse(text)) for text in grid.recipes]
    names, na = _tasks(grid)
    cells = []
    for model, adapter, name, context, seed in product(grid.models, grid.adapters, names, grid.contexts, grid.seeds):
        metadata: Mapping[str, str | int] = {"context": context} if isinstance(context, str) else context
        metadata = {key: value for key, value in metadata.items() if (key, value) != ("context", "full")}
        try:
            contexts.choice(catalogue.find(name), metadata)
        except UserError as error:
            na.append((f"{name} {json.dumps(metadata)}", str(error)))
            continue
        if seed is not None:
            metadata |= {"data_seed": seed}
        cells += [
            Cell(
                model, adapter, how, name, tuple(sorted(metadata.items())), grid.limit, grid.batch_size,
                tuple(sorted(grid.model_args.items())),
            )
            for how in recipes
        ]  # fmt: skip
    if not cells:
        raise UserError(f"no cell of the grid can be run: {na[0][0]}: {na[0][1]}" if na else "the grid has no cell")
    return Plan(tuple(dict.fromkeys(cells)), tuple(dict.fromkeys(na)))


def _tasks(grid: Grid) -> tuple[list[str], list[tuple[str, str]]]:
    """Task names, and the combinations of dataset, mode and length that there are not."""
    from lceval.tasks import catalogue

    every, groups, datasets = catalogue.tasks(), catalogue.groups(), catalogue.datasets()
    names: list[str] = []
    na: list[tuple[str, str]] = []
    for said in grid.tasks:
        if said in every:
            names.append(said)
        elif said in groups:
            names += [member for name in groups[said] for member in groups.get(name, [name])]
        elif said in datasets:
            dataset = datasets[said]
            for mode, length in product(grid.modes, (grid.lengths or dataset.lengths) if dataset.lengths else [None]):
                name = f"lc_{said}_{mode}" + (f"_{length}k" if length else "")
                if name in every:
                    names.append(name)
                else:
                    modes, lengths = ", ".join(dataset.modes), ", ".join(map(str, dataset.lengths))
                    na.append((name, f"{said} has modes {modes}" + (f" at {lengths} K tokens" if lengths else "")))
        else:
            catalogue.find(said)
    return list(dict.fromkeys(names)), na


def _questions(cell: Cell) -> int:
    """How many questions a cell asks, from the limit or the catalogue's count."""
    from lceval.tasks import catalogue

    digits = re.search(r"\d[\d,]*", catalogue.find(cell.task).dataset.count)
    rows = int(digits[0].replace(",", "")) if digits else 100
    return rows if cell.limit is None else min(cell.limit, rows)


def _length(task: str) -> int | None:
    from lceval.tasks import catalogue

    length = catalogue.find(task).length_k
    return length * 1024 if length else None


def _status(folder: Path) -> str | None:
    file = folder / "run.json"
    return str(json.loads(file.read_text()).get("status")) if file.is_file() else None
