"""The cells of a grid: their settings, run folders and commands."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lceval.core.errors import UserError
from lceval.core.io import read_object
from lceval.runs.sweep.grid import Grid

MOST_CELLS = 10_000
_NAME_CHARACTERS = 200  # of a folder's name, which file systems limit to 255 bytes


@dataclass(frozen=True)
class Cell:
    """One combination of the grid's settings, and so one run folder."""

    model: str
    adapter: str | None
    recipe: str
    scorer: str | None
    task: str
    metadata: tuple[tuple[str, str | int | float], ...]
    limit: int | None
    batch_size: int | str
    model_args: tuple[tuple[str, bool | str | int | float], ...]
    gen_kwargs: str = ""
    """JSON; empty if there are none."""

    @property
    def group(self) -> tuple[object, ...]:
        """Cells of one group differ only in recipe and scorer."""
        settings = self.task, self.metadata, self.limit, self.gen_kwargs
        return self.model, self.adapter, self.batch_size, self.model_args, *settings

    @property
    def owner(self) -> tuple[object, ...]:
        """Cells of one owner use the same loaded model."""
        return self.model, self.adapter, self.batch_size, self.model_args

    @property
    def name(self) -> str:
        """The folder's name: readable parts, and a digest because these alone are not unique."""
        values = [str(value) for _, value in self.metadata]
        parts = [self.model.rstrip("/").rsplit("/", 1)[-1], *([Path(self.adapter).name] if self.adapter else [])]
        parts += [self.task, *values, self.recipe, *([Path(self.scorer).name] if self.scorer else [])]
        readable = "_".join(parts)
        digest = hashlib.sha256(json.dumps(self.argv(Path()), sort_keys=True).encode()).hexdigest()[:6]
        return f"{re.sub(r'[^A-Za-z0-9.+=-]+', '-', readable)[:_NAME_CHARACTERS]}_{digest}"

    def argv(self, folder: Path) -> list[str]:
        """The arguments of `lceval run` for the same run."""
        args = {"pretrained": self.model, **({"peft": self.adapter} if self.adapter else {}), "kv": self.recipe}
        args |= {"scorer": self.scorer} if self.scorer else {}
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
        if self.gen_kwargs:
            flags.append(f"--gen_kwargs={self.gen_kwargs}")
        return flags


@dataclass(frozen=True)
class SweepPlan:
    """The cells of a grid in order, and the invalid combinations (`na`) with their reasons."""

    cells: tuple[Cell, ...]
    na: tuple[tuple[str, str], ...]

    def groups(self) -> list[list[Cell]]:
        """Cells in groups that share their contexts; groups that share a model are adjacent."""
        groups: dict[tuple[object, ...], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(cell.group, []).append(cell)
        return sorted(groups.values(), key=lambda group: [c.owner for c in self.cells].index(group[0].owner))

    def finished(self, root: Path) -> list[Cell]:
        """Cells whose run folder is finished."""
        return [cell for cell in self.cells if is_finished(root / cell.name)]


def plan(grid: Grid) -> SweepPlan:
    """The cross product of a grid. Names are checked; no model or data is loaded.

    Raises:
        UserError: an unknown task, dataset, mode or context, or a bad recipe.
    """
    from lceval.models import recipe
    from lceval.tasks import catalogue, contexts

    recipes = [
        (str(parsed), scorer)
        for parsed in map(recipe.parse, grid.recipes)
        for scorer in (grid.scorers if parsed.needs_scorer else [None])
    ]
    names, na = _tasks(grid)
    axes = (grid.models, grid.adapters, names, grid.contexts, grid.seeds, recipes)
    count = math.prod(len(axis) for axis in axes)
    if count > MOST_CELLS:
        raise UserError(f"the grid has {count:,} cells, more than {MOST_CELLS:,}: split it into several grids")
    cells = []
    for model, adapter, name, context, seed in product(grid.models, grid.adapters, names, grid.contexts, grid.seeds):
        metadata: Mapping[str, str | int | float] = {"context": context} if isinstance(context, str) else context
        metadata = {key: value for key, value in metadata.items() if (key, value) != ("context", "full")}
        try:
            contexts.setting(catalogue.find(name), metadata)
        except UserError as error:
            na.append((f"{name} {json.dumps(metadata)}", str(error)))
            continue
        if seed is not None:
            metadata |= {"data_seed": seed}
        cells += [
            Cell(
                model, adapter, kv, scorer, name, tuple(sorted(metadata.items())), grid.limit, grid.batch_size,
                tuple(sorted(grid.model_args.items())),
                json.dumps(grid.gen_kwargs, sort_keys=True) if grid.gen_kwargs else "",
            )
            for kv, scorer in recipes
        ]  # fmt: skip
    if not cells:
        raise UserError(f"no cell of the grid can be run: {na[0][0]}: {na[0][1]}" if na else "the grid has no cell")
    return SweepPlan(tuple(dict.fromkeys(cells)), tuple(dict.fromkeys(na)))


def _tasks(grid: Grid) -> tuple[list[str], list[tuple[str, str]]]:
    """Task names, and the combinations of dataset, mode and length that do not exist."""
    from lceval.tasks import catalogue

    every, groups, datasets = catalogue.tasks(), catalogue.groups(), catalogue.datasets()
    names: list[str] = []
    na: list[tuple[str, str]] = []
    for entry in grid.tasks:
        if entry in every:
            names.append(entry)
        elif entry in groups:
            names += [member for name in groups[entry] for member in groups.get(name, [name])]
        elif entry in datasets:
            dataset = datasets[entry]
            for mode, length in product(grid.modes, (grid.lengths or dataset.lengths) if dataset.lengths else [None]):
                name = f"lc_{entry}_{mode}" + (f"_{length}k" if length else "")
                if name in every:
                    names.append(name)
                else:
                    modes, lengths = ", ".join(dataset.modes), ", ".join(map(str, dataset.lengths))
                    na.append((name, f"{entry} has modes {modes}" + (f" at {lengths} K tokens" if lengths else "")))
        else:
            catalogue.find(entry)
    return list(dict.fromkeys(names)), na


def is_finished(folder: Path) -> bool:
    """Whether a run folder is finished, according to its run.json."""
    file = folder / "run.json"
    advice = "delete the folder to run the cell again"
    return file.is_file() and read_object(file, advice).get("status") == "finished"
