"""One standalone HTML file from templates, plotting library and data.

A page has parts, each with a fragment of HTML and a script. Text from runs is untrusted: it is stored in a JSON block
in which no tag can close, the scripts insert it as text only, and the page's content security policy allows only its
own scripts and no network access.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lceval.analysis.report.payload import collect
from lceval.core.errors import InfrastructureError, UserError
from lceval.core.io import replacing
from lceval.records.results import read_runs

MARKER = "<!doctype html><!-- lceval report -->"
REPORT = ("board", "plots", "samples")


@dataclass(frozen=True)
class ReportFile:
    """The written file and its contents."""

    html: Path
    runs: int
    rows: int
    samples: int
    bytes: int


def write(paths: Sequence[Path], output: Path) -> ReportFile:
    """Write the page of the runs in `paths`; an earlier report is replaced.

    Raises:
        UserError: No runs, a folder that is not a run, or an existing file at `output` that is not a report.
        InfrastructureError: The file cannot be written.
    """
    if not paths:
        raise UserError(
            "no runs given; pass one or more run folders, for example: lceval report runs/a --output report.html"
        )
    _check_writable(output)
    runs = read_runs(paths)
    data = collect(runs)
    content = render(data)
    replace(output, content)
    samples = sum(len(block["id"]) for block in data["blocks"])
    return ReportFile(output, len(runs), len(data["rows"]), samples, len(content))


def render(data: dict[str, Any], parts: Sequence[str] = REPORT, title: str = "lceval report") -> bytes:
    """The page of `data`; equal data gives equal bytes.

    Args:
        parts: in order; those with plots include the plotting library.
    """
    source = files("lceval.analysis.report")

    def read(name: str) -> str:
        return (source / name).read_text(encoding="utf-8")

    # The scripts of other parts use that of the board, wherever it stands.
    scripts = ["".join(read(f"{name}.js") for name in ("base", "board", *(part for part in parts if part != "board")))]
    if "plots" in parts:
        from plotly.offline import get_plotlyjs

        scripts.insert(0, get_plotlyjs())
    filled = {
        "css": read("page.css"),
        "title": html.escape(title),
        "main": "".join(read(f"{name}.html") for name in parts),
        "data": json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "scripts": "".join(f"<script>{script}</script>" for script in scripts),
        "hashes": " ".join(map(_hash, scripts)),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], read("page.html"))
    # A lone surrogate, valid in JSON, cannot be encoded as UTF-8.
    return f"{MARKER}\n{page}".encode("utf-8", "replace")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def is_ours(file: Path) -> bool:
    """Whether a file was written here."""
    with file.open("rb") as content:
        return content.readline().strip() == MARKER.encode()


def _check_writable(output: Path) -> None:
    # os.path, because the methods of Path raise for a name that is too long.
    if os.path.isdir(output):
        raise UserError(f"--output {output}: is a folder; pass a file, for example {output / 'report.html'}")
    if not os.path.isdir(output.parent):
        raise UserError(f"--output {output}: no folder {output.parent}; create it first")
    if os.path.exists(output) and not is_ours(output):
        raise UserError(f"--output {output}: not an lceval report; choose another name")


def replace(file: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        InfrastructureError: it cannot be written.
    """
    try:
        with replacing(file) as out:
            out.write(content)
    except OSError as error:
        raise InfrastructureError(f"{file}: cannot be written ({error.strerror})") from None
