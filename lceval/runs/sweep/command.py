"""The command `lceval sweep`: print the plan, run it, print the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from lceval.core.errors import InfrastructureError, UserError
from lceval.core.safe_text import echo
from lceval.runs.sweep import cost
from lceval.runs.sweep.grid import read
from lceval.runs.sweep.plan import SweepPlan, plan


def run(
    file: Path | None,
    preset: str | None,
    overrides: Sequence[str],
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
        UserError: a bad grid or engine. InfrastructureError: no cell was finished.
    """
    if address is not None and engine != "ray":
        raise UserError(f"--address {address} requires --engine ray")
    name, grid = read(file, preset, overrides)
    sweep_plan = plan(grid)
    root = output_path or Path("runs") / name
    if dry_run:
        return _json(sweep_plan, root) if as_json else render(sweep_plan, root), 0
    from lceval.analysis.table import main as table_text
    from lceval.runs.sweep.execution import choose, sweep

    run_groups = choose(engine, workers, address)
    echo(render(sweep_plan, root), err=True)
    # Only the table goes to stdout, whatever libraries print.
    with redirect_stdout(sys.stderr):
        outcome = sweep(sweep_plan, root, run_groups)
    echo(
        f"{root}: {len(outcome.folders)} of {len(sweep_plan.cells)} cells, {outcome.contexts} contexts prefilled",
        err=True,
    )
    if not outcome.folders:
        first = next(iter(outcome.failed.items()))
        raise InfrastructureError(f"no cell was finished; the first error, of {first[0]}: {first[1]}")
    return table_text(outcome.folders, "json" if as_json else "terminal"), 4 if outcome.failed else 0


def render(sweep_plan: SweepPlan, root: Path) -> str:
    """The plan as text: cells, invalid combinations, and the remaining cost."""
    done = {cell.name for cell in sweep_plan.finished(root)}
    lines = [f"{'done' if cell.name in done else 'to do':<6} {cell.name}" for cell in sweep_plan.cells]
    lines += [f"n/a    {name}: {reason}" for name, reason in sweep_plan.na]
    return "\n".join([*lines, *cost.render(cost.cost(sweep_plan, root))])


def _json(sweep_plan: SweepPlan, root: Path) -> str:
    cells = [{"name": cell.name, "run": cell.argv(root / cell.name)} for cell in sweep_plan.cells]
    na = [{"name": name, "reason": reason} for name, reason in sweep_plan.na]
    return json.dumps({"cells": cells, "na": na, "cost": cost.cost(sweep_plan, root)}, indent=2)
