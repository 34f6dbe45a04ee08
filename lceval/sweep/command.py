"""What `lceval sweep` does with its arguments: show the plan, run it, print the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lceval.errors import InfrastructureError
from lceval.sweep.grid import read
from lceval.sweep.plan import Plan, plan


def run(
    file: Path | None,
    preset: str | None,
    changes: Sequence[str],
    output_path: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> tuple[str, int]:
    """The text for stdout, and the exit code.

    Raises:
        UserError: a bad grid. InfrastructureError: no cell could be finished.
    """
    name, grid = read(file, preset, changes)
    planned = plan(grid)
    root = output_path or Path("runs") / name
    if dry_run:
        return _json(planned, root) if as_json else render(planned, root), 0
    print(render(planned, root), file=sys.stderr)
    from lceval.sweep.local import sweep
    from lceval.table import main as table_text

    outcome = sweep(planned, root)
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
    cost = planned.cost(root)
    lines.append(
        f"{cost['cells']} cells, {cost['finished']} finished; left: {cost['samples']} samples, at most "
        f"{cost['prefill_tokens']:,} tokens to read (tasks without a length in their name not counted); "
        f"{cost['seconds'] / 60:.0f} min if it were the packaged model on two cores"
    )
    return "\n".join(lines)


def _json(planned: Plan, root: Path) -> str:
    cells = [{"name": cell.name, "run": cell.argv(root / cell.name)} for cell in planned.cells]
    na = [{"name": name, "reason": reason} for name, reason in planned.na]
    return json.dumps({"cells": cells, "na": na, "cost": planned.cost(root)}, indent=2)
