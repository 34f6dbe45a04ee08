"""What `lceval sweep` does with its arguments: show the plan, run it, print the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from lceval.errors import InfrastructureError, UserError
from lceval.sweep import cost
from lceval.sweep.grid import read
from lceval.sweep.plan import Plan, plan


def run(
    file: Path | None,
    preset: str | None,
    changes: Sequence[str],
    output_path: Path | None,
    *,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    dry_run: bool,
    as_json: bool,
) -> tuple[str, int]:
    """The text for stdout, and the exit code.

    Raises:
        UserError: a bad grid, or a bad choice of engine. InfrastructureError: no cell could be finished.
    """
    if address is not None and engine != "ray":
        raise UserError(f"--address {address} is a Ray cluster's: it goes with --engine ray")
    name, grid = read(file, preset, changes)
    planned = plan(grid)
    root = output_path or Path("runs") / name
    if dry_run:
        return _json(planned, root) if as_json else render(planned, root), 0
    from lceval.sweep.engine import choose, sweep
    from lceval.table import main as table_text

    chosen = choose(engine, workers, address)
    print(render(planned, root), file=sys.stderr)
    # stdout is the table's, whatever the libraries print.
    with redirect_stdout(sys.stderr):
        outcome = sweep(planned, root, chosen)
    print(
        f"{root}: {len(outcome.folders)} of {len(planned.cells)} cells, {outcome.contexts} contexts read",
        file=sys.stderr,
    )
    if not outcome.folders:
        first = next(iter(outcome.failed.items()))
        raise InfrastructureError(f"no cell was finished; the first, {first[0]}: {first[1]}")
    return table_text(outcome.folders, "json" if as_json else "terminal"), 4 if outcome.failed else 0


def render(planned: Plan, root: Path) -> str:
    """The plan as text: cells, those that make no sense, and what is left."""
    done = {cell.name for cell in planned.finished(root)}
    lines = [f"{'done' if cell.name in done else 'to do':<6} {cell.name}" for cell in planned.cells]
    lines += [f"n/a    {name}: {reason}" for name, reason in planned.na]
    return "\n".join([*lines, *cost.render(cost.cost(planned, root))])


def _json(planned: Plan, root: Path) -> str:
    cells = [{"name": cell.name, "run": cell.argv(root / cell.name)} for cell in planned.cells]
    na = [{"name": name, "reason": reason} for name, reason in planned.na]
    return json.dumps({"cells": cells, "na": na, "cost": cost.cost(planned, root)}, indent=2)
