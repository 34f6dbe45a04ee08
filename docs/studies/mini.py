"""The table of mini.md from the committed rows.

python docs/studies/mini.py                   writes the table anew into mini.md
"""

from __future__ import annotations

import json
from pathlib import Path

from lceval.table import Table, to_markdown

HERE = Path(__file__).parent
# Other processes were running at the same time: what a clock said is no measurement.
TIMES = ("prefill_s", "prefill_tok_s", "decode_tok_s")
MARK = "<!-- the table of mini.json -->\n"


def table() -> str:
    """What `--format markdown` prints of the rows without times, one level of headings up."""
    rows = json.loads((HERE / "mini.json").read_text())["rows"]
    return to_markdown(Table([{**row, **dict.fromkeys(TIMES)} for row in rows])).replace("### ", "## ")


if __name__ == "__main__":
    page = HERE / "mini.md"
    page.write_text(page.read_text().partition(MARK)[0] + MARK + table() + "\n")
