"""The table in the forms that people read: a section per task, then the caption, then what was quoted."""

from __future__ import annotations

import html
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lceval.table.columns import Column, caption, columns, sections
from lceval.table.rows import Table


@dataclass(frozen=True)
class Grid:
    """One table: `text` says which columns are left-aligned."""

    heading: str
    header: Sequence[str]
    text: Sequence[bool]
    lines: Sequence[Sequence[str]]


def to_markdown(table: Table) -> str:
    """One heading and pipe table per section, then the caption."""

    def pipe(grid: Grid) -> str:
        lines = [
            "| " + " | ".join(map(_one_line, grid.header)) + " |",
            "| " + " | ".join("---" if text else "---:" for text in grid.text) + " |",
        ]
        escaped = ([cell.replace("|", "\\|").replace("*", "\\*") for cell in line] for line in grid.lines)
        lines += ["| " + " | ".join(line) + " |" for line in escaped]
        return f"### {grid.heading}\n\n" + "\n".join(lines)

    said = "\n".join(f"- {line}" for line in caption(table, columns(table))).replace("*", "\\*")
    return "\n\n".join([*map(pipe, _measured(table, columns(table))), said, *map(pipe, _quoted(table))])


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    # At the start of a row a bracket would belong to the line break before it.
    "[": "{[}",
    "]": "{]}",
}


def latex(text: str) -> str:
    """The text with every sign that LaTeX would act on escaped."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def to_latex(table: Table) -> str:
    """One `table` with a booktabs `tabular` per section; the caption follows as a paragraph."""

    def tabular(grid: Grid) -> str:
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

    said = "{\\footnotesize " + "\n\n".join(map(latex, caption(table, columns(table)))) + "\\par}"
    needed = "% needs \\usepackage{booktabs}"
    return "\n\n".join([needed, *map(tabular, _measured(table, columns(table))), said, *map(tabular, _quoted(table))])


_STYLE = (
    ":root{color-scheme:light dark}body{font:14px system-ui,sans-serif;margin:1.5rem}"
    "table{border-collapse:collapse;margin:0 0 1.5rem}caption{text-align:left;font-weight:600;padding:.3rem 0}"
    "th,td{padding:.25rem .6rem;text-align:right;"
    "border-bottom:1px solid color-mix(in srgb,currentColor 20%,transparent)}"
    "th.text,td.text{text-align:left}.quoted{font-style:italic}.wide{overflow-x:auto}"
)


def to_html(table: Table) -> str:
    """A page of its own: plain tables, no script, nothing fetched."""

    def element(grid: Grid, kind: str) -> str:
        def cells(tag: str, line: Sequence[str]) -> str:
            marks = [' class="text"' if text else "" for text in grid.text]
            return "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for c, m in zip(line, marks, strict=True))

        body = "\n".join(f"<tr>{cells('td', line)}</tr>" for line in grid.lines)
        head = cells("th", list(map(_one_line, grid.header)))
        return (
            f'<div class="wide"><table class="{kind}">\n<caption>{html.escape(grid.heading)}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )

    said = "\n".join(f"<li>{html.escape(line)}</li>" for line in caption(table, columns(table)))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f"<title>lceval table</title><style>{_STYLE}</style></head><body>",
            *(element(grid, "measured") for grid in _measured(table, columns(table))),
            f"<ul>\n{said}\n</ul>",
            *(element(grid, "quoted") for grid in _quoted(table)),
            "</body></html>",
        ]
    )


def to_terminal(table: Table, width: int | None = None) -> str:
    """Plain text for a terminal of `width` characters: the console's own, or 100 where there is none.

    Names fold onto further lines, and columns that one can do without are left out (the caption says which), before a
    number loses a digit; a terminal too narrow for the rest gets lines wider than itself.
    """
    from rich.console import Console
    from rich.text import Text

    available = width or shutil.get_terminal_size(fallback=(100, 24)).columns
    chosen, left_out = _fitting(table, available)
    grids, quoted = _measured(table, chosen), list(_quoted(table))
    # One width for all sections, so that their columns stand below each other.
    least = [max(widths) for widths in zip(*map(_least, grids), strict=True)]
    gap = 2 if _needed(least, 2) <= available else 1
    wanted = max([_needed(least, gap), *(_needed(_least(grid), 2) for grid in quoted)])
    text = io.StringIO()
    console = Console(
        file=text, width=max(available, wanted), color_system=None, markup=False, emoji=False, highlight=False
    )
    for grid in grids:
        console.print(Text(grid.heading), _rich(grid, least, gap), Text(), sep="\n")
    lines = caption(table, chosen)
    if left_out:
        names = ", ".join(_one_line(column.header) for column in left_out)
        lines.append(f"Not shown at this width: {names}; --format markdown has all.")
    for line in lines:
        console.print(Text(line))
    for grid in quoted:
        console.print(Text(), Text(grid.heading), _rich(grid, _least(grid), 2), sep="\n")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _fitting(table: Table, available: int) -> tuple[list[Column], list[Column]]:
    """The columns that fit, and those that had to go."""
    chosen, left_out = columns(table), list[Column]()
    while _needed(_widths(table, chosen), 1) > available:
        spare = max(chosen, key=lambda column: column.spare)
        if not spare.spare:
            break
        chosen.remove(spare)
        left_out.append(spare)
    return chosen, left_out


def _widths(table: Table, chosen: Sequence[Column]) -> list[int]:
    return [max(widths) for widths in zip(*map(_least, _measured(table, chosen)), strict=True)]


def _least(grid: Grid) -> list[int]:
    """Characters each column cannot do without; names can do with 11, folded."""
    found = []
    for text, *cells in zip(grid.text, grid.header, *grid.lines, strict=True):
        longest = max(len(line) for cell in cells for line in str(cell).split("\n"))
        found.append(min(longest, 11) if text else longest)
    return found


def _needed(widths: Sequence[int], gap: int) -> int:
    return sum(widths) + gap * (len(widths) - 1)


def _rich(grid: Grid, least: Sequence[int], gap: int) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    for header, text, minimum in zip(grid.header, grid.text, least, strict=True):
        made.add_column(
            Text(header),
            justify="left" if text else "right",
            vertical="top",
            overflow="fold",
            no_wrap=not text,
            min_width=minimum,
        )
    for line in grid.lines:
        made.add_row(*map(Text, line))
    return made


def _one_line(text: str) -> str:
    return text.replace("-\n", "").replace("\n", " ")


def _measured(table: Table, chosen: Sequence[Column]) -> list[Grid]:
    header = [column.header for column in chosen]
    text = [column.text for column in chosen]
    return [
        Grid(heading, header, text, [[column.cell(row) for column in chosen] for row in rows])
        for heading, rows in sections(table)
    ]


def _quoted(table: Table) -> Iterator[Grid]:
    for reference in table.quoted:
        header = reference.header()
        text = [name in ("quoted", "recipe") for name in header]
        yield Grid(reference.heading, header, text, reference.lines())
