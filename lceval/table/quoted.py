"""Figures of the paper (arXiv 2601.18527), to stand beside ours: quoted, never computed with."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import yaml

from lceval.errors import UserError

NAMES = ("paper-table1", "paper-table2")


@dataclass(frozen=True)
class Quoted:
    """A table as it was printed: cells are text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def quoted(name: str) -> Quoted:
    """One of NAMES.

    Raises:
        UserError: another name.
    """
    if name not in NAMES:
        raise UserError(f"no reference {name!r}: one of {', '.join(NAMES)}")
    said = yaml.safe_load((files("lceval.table") / "quoted.yaml").read_text(encoding="utf-8"))[name]
    rows = [[row, *map(str, values)] for row, values in said["rows"].items()]
    return Quoted(f"{said['title']} (quoted)", ["quoted", *said["columns"]], rows, [said["note"]])


def to_text(table: Quoted) -> str:
    """Aligned columns for a terminal."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    text = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(x, widths, strict=True)))
        for x in lines
    ]
    return "\n".join([table.title, *text, "", *table.notes])


def to_markdown(table: Quoted) -> str:
    """A pipe table under a heading."""
    rule = "| --- |" + " ---: |" * (len(table.columns) - 1)
    lines = ["| " + " | ".join(line) + " |" for line in [table.columns, *table.rows]]
    return "\n".join([f"### {table.title}", "", lines[0], rule, *lines[1:], "", *(f"- {note}" for note in table.notes)])
