"""`lceval report --site`: a static leaderboard, a folder that any host can serve and that opens from a disk.

`index.html` has methods by budget, a plot and all rows; `runs/` a page a run with its samples; `table.csv` and
`table.json` what `lceval table` prints. Everything comes from the run folders: the same runs give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lceval.analysis.pairs import results
from lceval.analysis.report.page import is_ours, render, replace
from lceval.analysis.report.payload import collect, finite
from lceval.analysis.table import KEYS, build, to_csv, to_json
from lceval.core.errors import InfrastructureError, UserError
from lceval.records.results import Run, read_runs

INDEX, RUNS = "index.html", "runs"
NAME_CHARACTERS = 80


@dataclass(frozen=True)
class Site:
    """The written folder and its contents."""

    folder: Path
    runs: int
    rows: int
    samples: int
    bytes: int


def write(paths: Sequence[Path], folder: Path, title: str = "lceval leaderboard") -> Site:
    """Write the site of the runs in `paths`; an earlier site is replaced.

    Raises:
        UserError: no runs, a folder that is not a run, or `folder` has something else than a site.
        InfrastructureError: a file cannot be written.
    """
    if not paths:
        raise UserError("no runs given; pass one or more run folders, for example: lceval report runs/a --site public")
    _check_writable(folder)
    runs = read_runs(paths)
    table = build(runs)
    pages = {run.label: f"{RUNS}/{page_name(run.label)}.html" for run in runs}
    rows: Any = finite([{**row, "page": pages[row["run"]]} for row in table.rows])
    files = {INDEX: render({"rows": rows, "keys": KEYS}, ("leaderboard", "board"), title)}
    files |= {"table.csv": f"{to_csv(table)}\n".encode("utf-8", "replace")}
    files |= {"table.json": f"{to_json(table)}\n".encode("utf-8", "replace")}
    try:
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
        # Nothing else that lies there, such as run folders, is touched.
        for page in (folder / RUNS).glob("*.html"):
            if page.is_file() and is_ours(page) and f"{RUNS}/{page.name}" not in pages.values():
                page.unlink()
    except OSError as error:
        raise InfrastructureError(f"{folder}: cannot be written ({error.strerror})") from None
    written = samples = 0
    for run in runs:
        data = of_run(run, runs)
        samples += sum(len(block["id"]) for block in data["blocks"])
        content = render(data, ("board", "samples"), run.label)
        replace(folder / pages[run.label], content)
        written += len(content)
    # The first page comes last: a site that was interrupted has the old one, or none.
    for name, content in reversed(files.items()):
        replace(folder / name, content)
        written += len(content)
    return Site(folder, len(runs), len(rows), samples, written)


def page_name(label: str) -> str:
    """The name of a run's page: readable, within a folder whatever the label is, and unique."""
    readable = re.sub(r"[^A-Za-z0-9.+=-]+", "-", label).strip("-.")[:NAME_CHARACTERS]
    return f"{readable}_{hashlib.sha256(label.encode('utf-8', 'replace')).hexdigest()[:6]}"


def of_run(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """The data of one run's page, with the scores under full of the same samples."""
    fulls = {id(result.full) for result in results(runs) if result.run is run and result.full is not None}
    beside = [other for other in runs if other is run or any(id(task) in fulls for task in other.tasks)]
    data = collect(beside)
    own = [index for index, row in enumerate(data["rows"]) if row["run"] == run.label]
    blocks = [data["blocks"][index] for index in own]
    for block in [block for block in blocks if block["full"]]:
        # Of the run under full only the scores, as a block without a row.
        scores = data["blocks"][block["full"]["block"]]["score"]
        block["full"] = {**block["full"], "block": len(blocks)}
        blocks.append({"id": [], "status": [], "score": scores, "full": None})
    return {**data, "rows": [data["rows"][index] for index in own], "blocks": blocks, "home": f"../{INDEX}"}


def _check_writable(folder: Path) -> None:
    # os.path, because the methods of Path raise for a name that is too long.
    if os.path.isfile(folder):
        raise UserError(f"--site {folder}: is a file; pass a folder")
    if os.path.isdir(folder) and os.listdir(folder):
        index = folder / INDEX
        if not (index.is_file() and is_ours(index)):
            raise UserError(f"--site {folder}: not an lceval site; choose another folder, or an empty one")
