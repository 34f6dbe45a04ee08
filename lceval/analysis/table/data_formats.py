"""Machine-readable formats of the table: every key, unrounded, empty where undefined."""

from __future__ import annotations

import csv
import io
import json

from lceval.analysis.table.columns import mean_over
from lceval.analysis.table.row_values import KEYS, Row, Table
from lceval.core.safe_text import printable
from lceval.stats.estimates import LEVEL, RESAMPLES, SEED


def to_json(table: Table) -> str:
    """{"interval": …, "rows": […], …}: unrounded numbers, null where undefined; quoted numbers under `quoted`."""
    interval = {
        "method": "percentile bootstrap over clusters; Wilson where all scores are 0 or all are 1",
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seed": SEED,
    }
    content = {
        "interval": interval,
        "by": table.by,
        "mean_over": mean_over(table),
        "left_out": list(table.left_out),
        "rows": table.rows,
        "quoted": [
            {key: value for key, value in row.items() if value is not None}
            for reference in table.quoted
            for row in reference.flat()
        ],
    }
    return json.dumps(content, indent=2, allow_nan=False)


def to_csv(table: Table) -> str:
    """A header of `KEYS` and `metrics.NAME` columns, one line per row; undefined values are empty cells.

    A text that a spreadsheet would take for a formula is preceded by an apostrophe.
    """
    rows = [*table.rows, *(row for reference in table.quoted for row in reference.flat())]
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"] or {}))
    text = io.StringIO()
    header = [*(key for key in KEYS if key != "metrics"), *(printable(f"metrics.{name}") for name in names)]
    writer = csv.DictWriter(text, fieldnames=header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_flat(row) for row in rows)
    return text.getvalue().rstrip("\n")


def _flat(row: Row) -> Row:
    metrics = {printable(f"metrics.{name}"): value for name, value in (row["metrics"] or {}).items()}
    return {key: _cell(value) for key, value in row.items() if key != "metrics"} | metrics


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text != "-" and text.startswith(("=", "+", "-", "@")) else text
