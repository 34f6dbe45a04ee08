"""The table of one or more runs: a score with its interval and what it cost, one row per run and task."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lceval.errors import UserError
from lceval.results import read_runs
from lceval.table.forms import to_csv, to_json, to_markdown, to_terminal
from lceval.table.rows import KEYS, Row, Table, build

__all__ = ["KEYS", "Format", "Row", "Table", "build", "main", "to_csv", "to_json", "to_markdown", "to_terminal"]

Format = Literal["terminal", "markdown", "csv", "json"]


def main(paths: Sequence[Path], fmt: Format = "terminal") -> str:
    """The table of the runs in `paths`, as text in one of four forms, without a final newline.

    Raises:
        UserError: No paths, or a folder that cannot be read as a run.
    """
    if not paths:
        raise UserError("no runs given; name one or more run folders, as in: lceval table runs/a runs/b")
    table = build(read_runs(paths))
    render: dict[Format, Callable[[Table], str]] = {
        "terminal": to_terminal,
        "markdown": to_markdown,
        "csv": to_csv,
        "json": to_json,
    }
    return render[fmt](table)
