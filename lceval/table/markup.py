"""The table for a paper and for a page: LaTeX (booktabs) and plain HTML, with everything from runs escaped."""

from __future__ import annotations

import html

from lceval.table.forms import Column, caption, columns_of, sections
from lceval.table.quoted import Quoted
from lceval.table.rows import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}
_STYLE = (
    "table{border-collapse:collapse}th,td{padding:.2em .6em;border-bottom:1px solid #ccc;text-align:right}"
    ".text{text-align:left}"
)


def to_latex(table: Table, quoted: Quoted | None = None) -> str:
    """A tabular a section (needs the package booktabs), the captions as comments."""
    columns = columns_of(table)
    parts = []
    for heading, rows in sections(table):
        cells = [[column.cell(row) for column in columns] for row in rows]
        parts.append(_tabular(heading, [_head(column) for column in columns], [c.text for c in columns], cells))
    if quoted is not None:
        parts.append(_tabular(quoted.title, quoted.columns, [True] + [False] * (len(quoted.columns) - 1), quoted.rows))
    return "\n\n".join(
        [*parts, "\n".join(f"% {line}" for line in [*caption(table), *(quoted.notes if quoted else [])])]
    )


def _tabular(heading: str, head: list[str], text: list[bool], rows: list[list[str]]) -> str:
    lines = [f"% {heading}", rf"\begin{{tabular}}{{{''.join('l' if left else 'r' for left in text)}}}", r"\toprule"]
    lines.append(" & ".join(map(_latex, head)) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(map(_latex, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in text)


def to_html(table: Table, quoted: Quoted | None = None) -> str:
    """A page of its own, without scripts; `lceval report` is the one to look around in."""
    columns = columns_of(table)
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8"><title>lceval table</title>',
        f"<style>{_STYLE}</style>",
    ]
    for heading, rows in sections(table):
        cells = [[column.cell(row) for column in columns] for row in rows]
        parts.append(_table(heading, [_head(column) for column in columns], [c.text for c in columns], cells))
    if quoted is not None:
        parts.append(_table(quoted.title, quoted.columns, [True] + [False] * (len(quoted.columns) - 1), quoted.rows))
    notes = [*caption(table), *(quoted.notes if quoted else [])]
    return "\n".join([*parts, "<ul>", *(f"<li>{html.escape(line)}</li>" for line in notes), "</ul></html>"])


def _table(heading: str, head: list[str], text: list[bool], rows: list[list[str]]) -> str:
    def line(tag: str, cells: list[str]) -> str:
        kinds = [' class="text"' if left else "" for left in text]
        return (
            "<tr>" + "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"
        )

    return "\n".join(
        [f"<h2>{html.escape(heading)}</h2>", "<table>", line("th", head), *(line("td", r) for r in rows), "</table>"]
    )


def _head(column: Column) -> str:
    return column.header.replace("\n", " ")
