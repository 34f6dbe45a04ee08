"""The tables of sweeps from their committed rows.

python docs/studies/sweeps.py            writes the table of NAME.json anew into NAME.md
"""

from __future__ import annotations

import json
from pathlib import Path

from lceval.table import Table, to_markdown

HERE = Path(__file__).parent
NAMES = ("mini", "tuned")
# Other processes were running at the same time: what a clock said is no measurement.
TIMES = ("prefill_s", "prefill_tok_s", "decode_tok_s")


def mark(name: str) -> str:
    """The line after which a page is computed."""
    return f"<!-- the table of {name}.json -->\n"


def table(name: str) -> str:
    """What `--format markdown` prints of the rows without times, one level of headings up."""
    rows = json.loads((HERE / f"{name}.json").read_text())["rows"]
    return to_markdown(Table([{**row, **dict.fromkeys(TIMES)} for row in rows])).replace("### ", "## ")


if __name__ == "__main__":
    for name in NAMES:
        page = HERE / f"{name}.md"
        page.write_text(page.read_text().partition(mark(name))[0] + mark(name) + table(name) + "\n")
