"""The table of one or more runs: scores with intervals, retention against the full cache, memory and speed.

`build` computes plain data and never rounds; the renderers only format it. JSON and CSV contain every key of `KEYS`;
the other formats print one section per task and state constant values once, in the caption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lceval.analysis.pairs import results
from lceval.analysis.table.aggregate import aggregate
from lceval.analysis.table.data_formats import to_csv, to_json
from lceval.analysis.table.judged import judged
from lceval.analysis.table.references import load
from lceval.analysis.table.row_values import KEYS, By, Row, Table, row
from lceval.analysis.table.text_formats import to_html, to_latex, to_markdown, to_terminal
from lceval.core.errors import UserError
from lceval.records.results import Run, read_runs

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
        by: what each row aggregates over within a run.
        reference: published tables to quote (`references.yaml`).
        require_kappa: minimum Cohen's kappa with human labels for every judge in the table.

    Raises:
        BelowError: a judge is below it, or uncalibrated.
        UserError: No paths, an unreadable run folder, or an unknown reference.
    """
    if not paths:
        raise UserError("no runs given; pass one or more run folders, for example: lceval table runs/a runs/b")
    references = load(reference)
    runs = read_runs(paths)
    if require_kappa is not None:
        _require(runs, require_kappa)
    table = replace(build(runs, by), quoted=references)
    render: dict[Format, Callable[[Table], str]] = {
        "terminal": to_terminal,
        "markdown": to_markdown,
        "latex": to_latex,
        "csv": to_csv,
        "html": to_html,
        "json": to_json,
    }
    return render[fmt](table)


def _require(runs: Sequence[Run], minimum: float) -> None:
    from lceval.judge import kappas

    for task in (task for run in runs for task in run.tasks):
        if (verdicts := judged(task)).judge:
            kappas.require(verdicts.agreement.get("judge_kappa"), minimum, verdicts.judge)


def build(runs: Iterable[Run], by: By = "task") -> Table:
    """One row per (run, task), or means of these; tasks in order of first appearance, runs in the given order."""
    run_tasks = results(list(runs))
    rows = [row(result, bounds=by == "task") for result in run_tasks]
    return Table(rows) if by == "task" else aggregate(run_tasks, rows, by)
