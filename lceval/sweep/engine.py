"""A plan's cells, run in this process, in several or on a cluster; what became of each is kept in `sweep.json`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lceval.sweep.plan import Cell, Plan
from lceval.sweep.worker import CellResult, Worker

STATUS = "sweep.json"
Engine = Callable[[Sequence[Sequence[Cell]], Path], Iterator[list[CellResult]]]


@dataclass
class Outcome:
    """What a sweep did: folders of finished cells, in the plan's order; errors of failed ones; contexts read."""

    folders: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    contexts: int = 0


def here(groups: Sequence[Sequence[Cell]], root: Path) -> Iterator[list[CellResult]]:
    """One group after the other, in this process."""
    worker = Worker()
    for group in groups:
        yield worker.run(group, root)


def choose(name: str, workers: int | None, address: str | None) -> Engine:
    """What runs the groups. Imports torch to count the GPUs, where their number decides.

    Args:
        name: local or ray.
        workers: how many at a time; None is one a visible GPU, at least one, or what the cluster has.
        address: of an existing Ray cluster; None starts one here.

    Raises:
        UserError: no ray, or nothing at the address.
    """
    if name == "ray":
        from lceval.sweep import cluster

        cluster.check(address)
        return partial(cluster.run, workers=workers, address=address)
    from lceval.sweep import processes

    count = workers or len(processes.visible_gpus()) or 1
    return here if count == 1 else partial(processes.run, workers=count)


def sweep(plan: Plan, root: Path, engine: Engine = here) -> Outcome:
    """Run what is not finished; a cell that fails is recorded and the rest go on."""
    outcome = Outcome()
    root.mkdir(parents=True, exist_ok=True)
    done = set(plan.finished(root))
    # What is finished is only looked at, which needs no model and no worker.
    looked = here([some for group in plan.groups() if (some := [cell for cell in group if cell in done])], root)
    for results in looked:
        _record(results, root, outcome)
    left = [some for group in plan.groups() if (some := [cell for cell in group if cell not in done])]
    cells, ended = sum(map(len, left)), 0
    _write(root, plan, outcome)
    for results in engine(left, root) if left else ():
        _record(results, root, outcome)
        _write(root, plan, outcome)
        ended += len(results)
        print(f"[{ended}/{cells}] {results[0].cell}: {len(results)} cells", file=sys.stderr)
    outcome.folders = [root / cell.name for cell in plan.finished(root) if cell.name not in outcome.failed]
    return outcome


def _record(results: Sequence[CellResult], root: Path, outcome: Outcome) -> None:
    """A failed cell leaves a line on stderr and a file with its traceback, which goes when it is finished."""
    for cell in results:
        outcome.contexts += cell.contexts
        file = root / _error_file(cell.cell)
        if not cell.error:
            file.unlink(missing_ok=True)
            continue
        outcome.failed[cell.cell] = cell.error
        file.write_text(cell.trace)
        print(f"failed: {cell.cell}: {cell.error} ({file})", file=sys.stderr)


def _error_file(cell: str) -> str:
    return f"{cell}.error.txt"


def _write(root: Path, plan: Plan, outcome: Outcome) -> None:
    """What became of every cell, at once or not at all."""
    done = {cell.name for cell in plan.finished(root)}
    status = {
        cell.name: outcome.failed.get(cell.name, "finished" if cell.name in done else "not run") for cell in plan.cells
    }
    errors = {name: _error_file(name) for name in outcome.failed}
    partial_file = root / f".{STATUS}"
    partial_file.write_text(json.dumps({"cells": status, "errors": errors, "na": dict(plan.na)}, indent=1) + "\n")
    os.replace(partial_file, root / STATUS)
