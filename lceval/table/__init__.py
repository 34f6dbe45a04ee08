"""The table of one or more runs: a score with its interval, what is left of it beside `full`, and what it cost.

`build` computes plain data and never rounds; the renderers only format it. JSON and CSV carry every key of `KEYS`; the
forms for people print one section per task and say once, in the caption, what is the same in every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lceval.errors import UserError
from lceval.results import Run, read_runs
from lceval.table.aggregate import aggregate
from lceval.table.forms import to_html, to_latex, to_markdown, to_terminal
from lceval.table.judged import judged
from lceval.table.pairs import results
from lceval.table.references import load
from lceval.table.render import to_csv, to_json
from lceval.table.rows import KEYS, By, Row, Table, row

Format = Literal["terminal", "markdown", "latex", "csv", "html", "json"]

__all__ = [
    "KEYS", "By", "Format", "Row", "Table", "build", "main",
    "to_csv", "to_html", "to_json", "to_latex", "to_markdown", "to_terminal",
]  # fmt: skip


def main(
    paths: Sequence[Path],
    fmt: Format = "terminal",
    *,
    by: By = "task",
    reference: Sequence[str] = (),
    require_kappa: float | None = None,
) -> str:
    """The table of the runs in `paths`, as text without a final newline.

    Args:
        by: what a row stands for, beside its run.
        reference: published tables to quote beside ours (`references.yaml`).
        require_kappa: least agreement with people of every judge whose verdicts are in the table.

    Raises:
        BelowError: a judge agrees less, or is uncalibrated.
        UserError: No paths, a folder that cannot be read as a run, or no such reference.
    """
    if not paths:
        raise UserError("no runs given; name one or more run folders, as in: lceval table runs/a runs/b")
    quoted = load(reference)
    runs = read_runs(paths)
    if require_kappa is not None:
        _require(runs, require_kappa)
    table = replace(build(runs, by), quoted=quoted)
    render: dict[Format, Callable[[Table], str]] = {
        "terminal": to_terminal,
        "markdown": to_markdown,
        "latex": to_latex,
        "csv": to_csv,
        "html": to_html,
        "json": to_json,
    }
    return render[fmt](table)


def _require(runs: Sequence[Run], least: float) -> None:
    from lceval.judge import calibrations

    for task in (task for run in runs for task in run.tasks):
        if (found := judged(task)).judge:
            calibrations.require(found.worth.get("judge_kappa"), least, found.judge)


def build(runs: Iterable[Run], by: By = "task") -> Table:
    """One row per (run, task), tasks in the order they first appear, in each the runs as given; or means of those."""
    found = results(list(runs))
    rows = [row(result, bounds=by == "task") for result in found]
    return Table(rows) if by == "task" else aggregate(found, rows, by)
