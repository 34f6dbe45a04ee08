"""Run a plan's cells in this process, in several or on a cluster; the status of each cell is in `sweep.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lceval.core.io import write_json
from lceval.core.safe_text import echo
from lceval.runs.sweep.plan import Cell, SweepPlan
from lceval.runs.sweep.worker import CellResult, Worker

STATUS = "sweep.json"
Engine = Callable[[Sequence[Sequence[Cell]], Path], Iterator[list[CellResult]]]


@dataclass
class SweepOutcome:
    """Folders of finished cells in the plan's order, errors of failed cells, and the number of contexts prefilled."""

    folders: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    contexts: int = 0


def here(groups: Sequence[Sequence[Cell]], root: Path) -> Iterator[list[CellResult]]:
    """Run the groups one after another in this process."""
    worker = Worker()
    for group in groups:
        yield worker.run(group, root)


def choose(name: str, workers: int | None, address: str | None) -> Engine:
    """The function that runs the groups. Imports torch to count the GPUs if their number matters.

    Args:
        name: local or ray.
        workers: number of workers; None is one per GPU, visible or of the cluster, and at least one.
        address: address of an existing Ray cluster; None starts one on this machine.

    Raises:
        UserError: Ray is not installed, or nothing listens at the address.
    """
    if name == "ray":
        from lceval.runs.sweep import cluster

        cluster.check(address)
        return partial(cluster.run, workers=workers, address=address)
    from lceval.runs.sweep import processes

    count = workers or len(processes.visible_gpus()) or 1
    return here if count == 1 else partial(processes.run, workers=count)


def sweep(plan: SweepPlan, root: Path, engine: Engine = here) -> SweepOutcome:
    """Run the unfinished cells; a failing cell is recorded and does not stop the others."""
    outcome = SweepOutcome()
    root.mkdir(parents=True, exist_ok=True)
    done = set(plan.finished(root))
    # Finished cells are only verified, which requires no model and no worker.
    verified = here([some for group in plan.groups() if (some := [cell for cell in group if cell in done])], root)
    for results in verified:
        _record(results, root, outcome)
    left = [some for group in plan.groups() if (some := [cell for cell in group if cell not in done])]
    cells, ended = sum(map(len, left)), 0
    _write(root, plan, outcome)
    for results in engine(left, root) if left else ():
        _record(results, root, outcome)
        _write(root, plan, outcome)
        ended += len(results)
        echo(f"[{ended}/{cells}] {results[0].cell}: {len(results)} cells", err=True)
    outcome.folders = [root / cell.name for cell in plan.finished(root) if cell.name not in outcome.failed]
    return outcome


def _record(results: Sequence[CellResult], root: Path, outcome: SweepOutcome) -> None:
    """Print a failed cell's error to stderr and write its traceback to a file; delete that file once it is finished."""
    for cell in results:
        outcome.contexts += cell.contexts
        file = root / _error_file(cell.cell)
        if not cell.error:
            file.unlink(missing_ok=True)
            continue
        outcome.failed[cell.cell] = cell.error
        file.write_text(cell.trace)
        echo(f"failed: {cell.cell}: {cell.error} ({file})", err=True)


def _error_file(cell: str) -> str:
    return f"{cell}.error.txt"


def _write(root: Path, plan: SweepPlan, outcome: SweepOutcome) -> None:
    """Write the status of every cell, atomically."""
    done = {cell.name for cell in plan.finished(root)}
    status = {
        cell.name: outcome.failed.get(cell.name, "finished" if cell.name in done else "not run") for cell in plan.cells
    }
    errors = {name: _error_file(name) for name in outcome.failed}
    write_json(root / STATUS, {"cells": status, "errors": errors, "na": dict(plan.na)})
