"""The tables of sweeps, from their committed rows.

python studies/sweeps.py            rewrite the sweep table of docs/studies/NAME-tables.md from NAME.json
"""

from __future__ import annotations

import json
from pathlib import Path

from lceval.analysis.table import Table, to_markdown

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "studies"
NAMES = ("mini", "tuned")
# Not comparable: other processes ran at the same time.
TIMES = ("prefill_s", "prefill_tok_s", "decode_tok_s")


def mark(name: str) -> str:
    """The line after which a tables page is generated."""
    return f"<!-- the table of {name}.json -->\n"


def table(name: str) -> str:
    """The output of `lceval table --format markdown` without times, headings one level up."""
    rows = json.loads((HERE / f"{name}.json").read_text())["rows"]
    return to_markdown(Table([{**row, **dict.fromkeys(TIMES)} for row in rows])).replace("### ", "## ")


if __name__ == "__main__":
    for name in NAMES:
        page = PAGES / f"{name}-tables.md"
        page.write_text(page.read_text().partition(mark(name))[0] + mark(name) + table(name) + "\n")
