"""The table of one or more runs: a score with its interval and what it cost, one row per run and task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lceval.errors import UserError
from lceval.results import read_runs
from lceval.table import quoted as references
from lceval.table.forms import to_csv, to_json, to_markdown, to_terminal
from lceval.table.markup import to_html, to_latex
from lceval.table.rows import KEYS, Row, Table, build

__all__ = ["KEYS", "Format", "Row", "Table", "build", "main", "to_csv", "to_json", "to_markdown", "to_terminal"]

Format = Literal["terminal", "markdown", "csv", "json", "latex", "html"]


def main(paths: Sequence[Path], fmt: Format = "terminal", reference: str | None = None) -> str:
    """The table of the runs in `paths` as text, without a final newline.

    Args:
        reference: a table of the paper to set beside it, marked as quoted (`quoted.NAMES`).

    Raises:
        UserError: No paths, a folder that cannot be read as a run, no such reference, or one in CSV.
    """
    if not paths:
        raise UserError("no runs given; name one or more run folders, as in: lceval table runs/a runs/b")
    said = None if reference is None else references.quoted(reference)
    if said is not None and fmt == "csv":
        raise UserError(f"--reference {reference} has columns of its own: choose another --format than csv")
    table = build(read_runs(paths))
    if fmt in ("latex", "html"):
        return (to_latex if fmt == "latex" else to_html)(table, said)
    if fmt == "json":
        return to_json(table, said)
    if fmt == "csv":
        return to_csv(table)
    text = to_markdown(table) if fmt == "markdown" else to_terminal(table)
    if said is None:
        return text
    return f"{text}\n\n{(references.to_markdown if fmt == 'markdown' else references.to_text)(said)}"
