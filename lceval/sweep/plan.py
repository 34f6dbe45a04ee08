"""The cells of a grid: what is run, under which folder, and what it will cost."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lceval.errors import UserError
from lceval.sweep.grid import Grid


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
    model_args: tuple[tuple[str, bool | str | int | float], ...]
    gen_kwargs: str = ""
    """JSON, empty for none."""

    @property
    def group(self) -> tuple[object, ...]:
        """Cells of one group differ in nothing but the recipe."""
        asked = self.task, self.metadata, self.limit, self.gen_kwargs
        return self.model, self.adapter, self.batch_size, self.model_args, *asked

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
        if self.gen_kwargs:
            flags.append(f"--gen_kwargs={self.gen_kwargs}")
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
        return [cell for cell in self.cells if is_finished(root / cell.name)]


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
            contexts.setting(catalogue.find(name), metadata)
        except UserError as error:
            na.append((f"{name} {json.dumps(metadata)}", str(error)))
            continue
        if seed is not None:
            metadata |= {"data_seed": seed}
        cells += [
            Cell(
                model, adapter, how, name, tuple(sorted(metadata.items())), grid.limit, grid.batch_size,
                tuple(sorted(grid.model_args.items())),
                json.dumps(grid.gen_kwargs, sort_keys=True) if grid.gen_kwargs else "",
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


def is_finished(folder: Path) -> bool:
    """Whether a run folder's run.json says that it is finished."""
    file = folder / "run.json"
    return file.is_file() and json.loads(file.read_text()).get("status") == "finished"
