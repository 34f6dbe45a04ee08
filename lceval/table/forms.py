"""The table as text: JSON and CSV carry every key of `KEYS`.

The two forms for people print one section per task and say once, in the caption, what is the same in every row.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lceval.stats import LEVEL, RESAMPLES, SEED
from lceval.table.quoted import Quoted
from lceval.table.rows import KEYS, Row, Table


def to_json(table: Table, quoted: Quoted | None = None) -> str:
    """{"interval": {...}, "rows": [...]}: every number as computed, null where undefined."""
    interval = {
        "method": "percentile bootstrap over clusters; Wilson where all scores are 0 or all are 1",
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seed": SEED,
    }
    beside = {} if quoted is None else {"quoted": vars(quoted)}
    return json.dumps({"interval": interval, "rows": table.rows, **beside}, indent=2, allow_nan=False)


def to_csv(table: Table) -> str:
    """A header of `KEYS` and one line per row; an undefined value is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(KEYS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return text.getvalue().rstrip("\n")


def to_markdown(table: Table) -> str:
    """One heading and pipe table per task, then the caption."""
    parts = []
    columns = columns_of(table)
    for heading, rows in sections(table):
        lines = [
            "| " + " | ".join(column.header.replace("\n", " ") for column in columns) + " |",
            "| " + " | ".join("---" if column.text else "---:" for column in columns) + " |",
        ]
        for row in rows:
            cells = (column.cell(row).replace("|", "\\|").replace("*", "\\*") for column in columns)
            lines.append("| " + " | ".join(cells) + " |")
        parts.append(f"### {heading}\n\n" + "\n".join(lines))
    notes = "\n".join(f"- {line}" for line in caption(table)).replace("*", "\\*")
    return "\n\n".join([*parts, notes])


def to_terminal(table: Table, width: int | None = None) -> str:
    """Plain text for a terminal of `width` characters: the console's own, or 100 where there is none.

    Names fold onto further lines before a number loses a digit; a terminal too narrow for the numbers
    gets lines wider than itself.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = columns_of(table)
    least = [_least_width(column, table) for column in columns]
    available = width or shutil.get_terminal_size(fallback=(100, 24)).columns
    gap = 2 if sum(least) + 2 * (len(columns) - 1) <= available else 1
    needed = sum(least) + gap * (len(columns) - 1)
    text = io.StringIO()
    console = Console(
        file=text, width=max(available, needed), color_system=None, markup=False, emoji=False, highlight=False
    )
    for heading, rows in sections(table):
        grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
        for column, minimum in zip(columns, least, strict=True):
            grid.add_column(
                Text(column.header),
                justify="left" if column.text else "right",
                vertical="top",
                overflow="fold",
                no_wrap=not column.text,
                min_width=minimum,
            )
        for row in rows:
            grid.add_row(*(Text(column.cell(row)) for column in columns))
        console.print(Text(heading), grid, Text(), sep="\n")
    for line in caption(table):
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


@dataclass(frozen=True)
class Column:
    """One column of the forms for people.

    text: left-aligned and foldable; numbers are right-aligned and never broken.
    shown: "always", "differs" (else the caption says it once) or "present" (some row has a value to show).
    """

    header: str
    cell: Callable[[Row], str]
    text: bool = False
    shown: Literal["always", "differs", "present"] = "present"


def _number(value: float | None) -> str:
    """Three significant digits, all digits of a larger number, "-" for None."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _score(row: Row) -> str:
    """`43.8 [31.2, 56.2]`, in percent where the metric is a share."""
    form = _percent if row["unit"] == "share" else _number
    if row["score"] is None:
        return "-"
    interval = "n/a" if row["ci_lo"] is None else f"{form(row['ci_lo'])}, {form(row['ci_hi'])}"
    return f"{form(row['score'])} [{interval}]"


COLUMNS = (
    Column("run", lambda row: row["run"] + ("*" if row["unfinished"] else ""), text=True, shown="always"),
    Column("model", lambda row: _model(row), text=True, shown="differs"),
    Column("recipe", lambda row: row["recipe"], text=True, shown="always"),
    Column("context", lambda row: row["context"] or "-", text=True, shown="differs"),
    Column("n", lambda row: str(row["n"]), shown="always"),
    Column(f"score [{100 * LEVEL:g}% CI]", _score, shown="always"),
    Column("% of full\n[95% CI]", lambda row: _against(row, "retention", _percent)),
    Column("gold\nnll", lambda row: _number(row["gold_nll"])),
    Column("- full\n[95% CI]", lambda row: _against(row, "nll_delta", _number)),
    Column("gold\nkept %", lambda row: _percent(row["gold_kept"])),
    Column("ndcg\n@10 %", lambda row: _percent(row["ndcg10"])),
    Column("kept\n%", lambda row: _percent(row["kept_share"])),
    Column("KV\nMB", lambda row: _number(row["kv_mb"])),
    Column("16b\n%", lambda row: _percent(row["kv_16bit_share"])),
    Column("read\nMB", lambda row: _number(row["bytes_read_per_step"] and row["bytes_read_per_step"] / 1e6)),
    Column("pref.\ns", lambda row: _number(row["prefill_s"])),
    Column("pref.\ntok/s", lambda row: _number(row["prefill_tok_s"])),
    Column("dec.\ntok/s", lambda row: _number(row["decode_tok_s"])),
    Column("err", lambda row: str(row["errors"]), shown="always"),
    Column("form", lambda row: str(row["wrong_format"]) if row["wrong_format"] else "-"),
    Column("cut", lambda row: str(row["truncated"]) if row["truncated"] else "-"),
)


def _against(row: Row, key: str, form: Callable[[float | None], str]) -> str:
    if row[key] is None:
        return "-"
    bounds = row[f"{key}_lo"], row[f"{key}_hi"]
    return form(row[key]) if None in bounds else f"{form(row[key])} [{', '.join(map(form, bounds))}]"


def _model(row: Row) -> str:
    """`lcft smollm2-135m +ao`: model type, weights and adapter, each by the last part of its name or path."""
    names = [(row[key] or "").rstrip("/").rsplit("/", 1)[-1] for key in ("pretrained", "peft")]
    return " ".join([row["model"], *(mark + name for mark, name in zip(("", "+"), names, strict=True) if name)])


def columns_of(table: Table) -> list[Column]:
    """The columns that say something about this table."""
    chosen = []
    for column in COLUMNS:
        cells = {column.cell(row) for row in table.rows}
        if column.shown == "always" or len(cells) > 1 or (column.shown == "present" and cells != {"-"}):
            chosen.append(column)
    return chosen


def sections(table: Table) -> list[tuple[str, list[Row]]]:
    """Rows under the heading of what they measure; scores of another version or metric stand apart.

    A row without samples joins the first section of its task.
    """
    named = {row["task"]: _heading(row) for row in reversed(table.rows) if row["n"]}
    sections: dict[str, list[Row]] = {}
    for row in table.rows:
        heading = _heading(row) if row["n"] else named.get(row["task"], str(row["task"]))
        sections.setdefault(heading, []).append(row)
    return list(sections.items())


def _heading(row: Row) -> str:
    version = f" (version {row['version']})" if row["version"] is not None else ""
    metric = row["metric"] or "no metric per sample"
    unit = " in %" if row["unit"] == "share" else ""
    filtered = f", filter {row['filter']}" if row["filter"] != "none" else ""
    return f"{row['task']}{version}: {metric}{unit}{filtered}"


def caption(table: Table) -> list[str]:
    """What a reader needs to know about the numbers above, one sentence group a line."""
    rows = table.rows
    lines = []
    models = {_model(row) for row in rows}
    if len(models) == 1:
        lines.append(f"model: {models.pop()}")
    counts = sorted({row["clusters"] for row in rows if row["n"]})
    if counts:
        span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        interval = f"[lo, hi]: {100 * LEVEL:g}% bootstrap over clusters (contexts), {span} per row."
        if any(row["score"] in (0.0, 1.0) and row["ci_lo"] is not None for row in rows):
            interval += " All 0 or all 1: Wilson, with the clusters as trials."
        if any(row["score"] is not None and row["ci_lo"] is None for row in rows):
            interval += " n/a: one cluster, or clusters that do not differ."
        lines.append(interval)
    if any(row["kv_mb"] is not None for row in rows):
        lines.append("kept, 16b: share of the bytes of the uncompressed KV cache, and of it at 16 bits a number.")
        lines.append("KV: mean per sample, MB = 1e6 bytes. pref., dec.: prefill of a distinct context, decode.")
    if any(row["gold_nll"] is not None for row in rows):
        lines.append("gold nll: NLL per token of the gold answer; gold kept: share of its passages' slots that stayed.")
    if any(row["retention"] is not None for row in rows):
        lines.append("% of full, - full: against the run under full with the same model, adapter, task and context.")
    if any(row["wrong_format"] for row in rows):
        lines.append("form: outputs that had not the form that was asked for; they are scored as they stand.")
    if any(row["errors"] for row in rows):
        lines.append("err: errors, counted in n and as 0 in the score (no score where 0 is not the worst).")
    if any(row["truncated"] for row in rows):
        lines.append("cut: samples whose prompt did not fit and was shortened.")
    if any(row["unfinished"] for row in rows):
        lines.append("*: unfinished: n counts the samples on disk so far.")
    return lines


def _least_width(column: Column, table: Table) -> int:
    """Characters a column cannot do without; names can do with 11, folded."""
    texts = [column.header, *(column.cell(row) for row in table.rows)]
    longest = max(len(line) for text in texts for line in text.split("\n"))
    return min(longest, 11) if column.text else longest
