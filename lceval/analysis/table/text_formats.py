"""Human-readable formats of the table: one section per task, the caption, quoted tables.

Names, labels and paths come from run folders: `_measured` and `_legend` make them printable, the formats escape them.
"""

from __future__ import annotations

import html
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lceval.analysis.table.columns import Column, caption, columns, sections
from lceval.analysis.table.row_values import Table
from lceval.core.safe_text import markdown, printable
from lceval.core.text_tables import pipe


@dataclass(frozen=True)
class TextTable:
    """One table; `text`: whether each column is left-aligned."""

    heading: str
    header: Sequence[str]
    text: Sequence[bool]
    lines: Sequence[Sequence[str]]


def to_markdown(table: Table) -> str:
    """One heading and pipe table per section, then the caption."""

    def section(grid: TextTable) -> str:
        cells = [[markdown(cell) for cell in line] for line in grid.lines]
        left = [i for i, text in enumerate(grid.text) if text]
        return f"### {markdown(grid.heading)}\n\n{pipe([*map(_one_line, grid.header)], cells, left)}"

    legend = "\n".join(f"- {markdown(line)}" for line in _legend(table, columns(table)))
    return "\n\n".join([*map(section, _measured(table, columns(table))), legend, *map(section, _quoted(table))])


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "Δ": "\\ensuremath{\\Delta}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    # A bracket at the start of a row would be parsed as an argument of the preceding line break.
    "[": "{[}",
    "]": "{]}",
}


def latex(text: str) -> str:
    """The text with LaTeX special characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(table: Table) -> str:
    """One `table` with a booktabs `tabular` per section; the caption follows as a paragraph."""

    def tabular(grid: TextTable) -> str:
        def line(cells: Sequence[str]) -> str:
            return " & ".join(map(latex, cells)) + " \\\\"

        return "\n".join(
            [
                "\\begin{table}",
                "\\centering",
                f"\\caption{{{latex(grid.heading)}}}",
                f"\\begin{{tabular}}{{{''.join('l' if text else 'r' for text in grid.text)}}}",
                "\\toprule",
                line(list(map(_one_line, grid.header))),
                "\\midrule",
                *map(line, grid.lines),
                "\\bottomrule",
                "\\end{tabular}",
                "\\end{table}",
            ]
        )

    legend = "{\\footnotesize " + "\n\n".join(map(latex, _legend(table, columns(table)))) + "\\par}"
    packages = "% needs \\usepackage{booktabs}"
    return "\n\n".join(
        [packages, *map(tabular, _measured(table, columns(table))), legend, *map(tabular, _quoted(table))]
    )


_STYLE = (
    ":root{color-scheme:light dark}body{font:14px system-ui,sans-serif;margin:1.5rem}"
    "table{border-collapse:collapse;margin:0 0 1.5rem}caption{text-align:left;font-weight:600;padding:.3rem 0}"
    "th,td{padding:.25rem .6rem;text-align:right;"
    "border-bottom:1px solid color-mix(in srgb,currentColor 20%,transparent)}"
    "th.text,td.text{text-align:left}.quoted{font-style:italic}.wide{overflow-x:auto}"
)


def to_html(table: Table) -> str:
    """A standalone page: plain tables, no scripts, no external resources."""

    def element(grid: TextTable, kind: str) -> str:
        def cells(tag: str, line: Sequence[str]) -> str:
            marks = [' class="text"' if text else "" for text in grid.text]
            return "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for c, m in zip(line, marks, strict=True))

        body = "\n".join(f"<tr>{cells('td', line)}</tr>" for line in grid.lines)
        head = cells("th", list(map(_one_line, grid.header)))
        return (
            f'<div class="wide"><table class="{kind}">\n<caption>{html.escape(grid.heading)}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )

    legend = "\n".join(f"<li>{html.escape(line)}</li>" for line in _legend(table, columns(table)))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f"<title>lceval table</title><style>{_STYLE}</style></head><body>",
            *(element(grid, "measured") for grid in _measured(table, columns(table))),
            f"<ul>\n{legend}\n</ul>",
            *(element(grid, "quoted") for grid in _quoted(table)),
            "</body></html>",
        ]
    )


def to_terminal(table: Table, width: int | None = None) -> str:
    """Plain text for a terminal of `width` characters (default: that of the console, else 100).

    Numbers are never shortened: names fold onto further lines and optional columns are omitted (the caption lists
    them). Lines exceed the width if the required columns do not fit.
    """
    from rich.console import Console
    from rich.text import Text

    available = width or shutil.get_terminal_size(fallback=(100, 24)).columns
    chosen, omitted = _fitting(table, available)
    grids, quoted = _measured(table, chosen), list(_quoted(table))
    # The same widths in all sections, so that their columns align.
    minimum = [max(widths) for widths in zip(*map(_minimum_widths, grids), strict=True)]
    gap = 2 if _total_width(minimum, 2) <= available else 1
    required = max([_total_width(minimum, gap), *(_total_width(_minimum_widths(grid), 2) for grid in quoted)])
    text = io.StringIO()
    console = Console(
        file=text, width=max(available, required), color_system=None, markup=False, emoji=False, highlight=False
    )
    for grid in grids:
        console.print(Text(grid.heading), _rich(grid, minimum, gap), Text(), sep="\n")
    lines = _legend(table, chosen)
    if omitted:
        names = ", ".join(_one_line(column.header) for column in omitted)
        lines.append(f"Omitted at this width: {names}; --format markdown has all columns.")
    for line in lines:
        console.print(Text(line))
    for grid in quoted:
        console.print(Text(), Text(grid.heading), _rich(grid, _minimum_widths(grid), 2), sep="\n")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _fitting(table: Table, available: int) -> tuple[list[Column], list[Column]]:
    """The columns that fit, and the omitted ones."""
    chosen, omitted = columns(table), list[Column]()
    while _total_width(_widths(table, chosen), 1) > available:
        optional = max(chosen, key=lambda column: column.priority)
        if not optional.priority:
            break
        chosen.remove(optional)
        omitted.append(optional)
    return chosen, omitted


def _widths(table: Table, chosen: Sequence[Column]) -> list[int]:
    return [max(widths) for widths in zip(*map(_minimum_widths, _measured(table, chosen)), strict=True)]


def _minimum_widths(grid: TextTable) -> list[int]:
    """The minimum width of each column in characters; text folds at 11."""
    widths = []
    for text, *cells in zip(grid.text, grid.header, *grid.lines, strict=True):
        longest = max(len(line) for cell in cells for line in str(cell).split("\n"))
        widths.append(min(longest, 11) if text else longest)
    return widths


def _total_width(widths: Sequence[int], gap: int) -> int:
    return sum(widths) + gap * (len(widths) - 1)


def _rich(grid: TextTable, widths: Sequence[int], gap: int) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    rendered = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    for header, text, minimum in zip(grid.header, grid.text, widths, strict=True):
        rendered.add_column(
            Text(header),
            justify="left" if text else "right",
            vertical="top",
            overflow="fold",
            no_wrap=not text,
            min_width=minimum,
        )
    for line in grid.lines:
        rendered.add_row(*map(Text, line))
    return rendered


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def _legend(table: Table, chosen: Sequence[Column]) -> list[str]:
    return [*map(printable, caption(table, chosen))]


def _measured(table: Table, chosen: Sequence[Column]) -> list[TextTable]:
    header = [column.header for column in chosen]
    text = [column.text for column in chosen]
    return [
        TextTable(
            printable(heading), header, text, [[printable(column.cell(row)) for column in chosen] for row in rows]
        )
        for heading, rows in sections(table)
    ]


def _quoted(table: Table) -> Iterator[TextTable]:
    for reference in table.quoted:
        header = reference.header()
        text = [name in ("quoted", "recipe") for name in header]
        yield TextTable(reference.heading, header, text, reference.lines())
