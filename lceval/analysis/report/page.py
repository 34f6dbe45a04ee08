"""One standalone HTML file from templates, plotting library and data.

Text from runs is untrusted: it is stored in a JSON block in which no tag can close, the scripts insert it as text only,
and the page's content security policy allows only its own two scripts and no network access.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lceval.analysis.report.payload import collect
from lceval.core.errors import InfrastructureError, UserError
from lceval.records.results import read_runs

MARKER = "<!doctype html><!-- lceval report -->"
SCRIPTS = ("base.js", "plots.js", "page.js")


@dataclass(frozen=True)
class ReportFile:
    """The written file and its contents."""

    html: Path
    runs: int
    rows: int
    samples: int
    bytes: int


def write(paths: Sequence[Path], html: Path) -> ReportFile:
    """Write the page of the runs in `paths`; an earlier report is replaced.

    Raises:
        UserError: No runs, a folder that is not a run, or an existing file at `html` that is not a report.
        InfrastructureError: The file cannot be written.
    """
    if not paths:
        raise UserError(
            "no runs given; pass one or more run folders, for example: lceval report runs/a --output report.html"
        )
    _check_writable(html)
    runs = read_runs(paths)
    data = collect(runs)
    content = render(data)
    _replace(html, content)
    samples = sum(len(block["id"]) for block in data["blocks"])
    return ReportFile(html, len(runs), len(data["rows"]), samples, len(content))


def render(data: dict[str, Any]) -> bytes:
    """The page of `data`; equal data gives equal bytes."""
    from plotly.offline import get_plotlyjs

    source = files("lceval.analysis.report")
    library = get_plotlyjs()
    script = "".join((source / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "css": (source / "page.css").read_text(encoding="utf-8"),
        "plotly": library,
        "data": json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": script,
        "hashes": f"{_hash(library)} {_hash(script)}",
    }
    template = (source / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    # A lone surrogate, valid in JSON, cannot be encoded as UTF-8.
    return f"{MARKER}\n{page}".encode("utf-8", "replace")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _check_writable(html: Path) -> None:
    # os.path, because the methods of Path raise for a name that is too long.
    if os.path.isdir(html):
        raise UserError(f"--output {html}: is a folder; pass a file, for example {html / 'report.html'}")
    if not os.path.isdir(html.parent):
        raise UserError(f"--output {html}: no folder {html.parent}; create it first")
    if os.path.exists(html):
        with html.open("rb") as file:
            if file.readline().strip() != MARKER.encode():
                raise UserError(f"--output {html}: not an lceval report; choose another name")


def _replace(html: Path, content: bytes) -> None:
    """Write the file atomically."""
    partial = None
    try:
        with tempfile.NamedTemporaryFile(dir=html.parent, prefix=f".{html.name}.", delete=False) as file:
            partial = Path(file.name)
            file.write(content)
        partial.chmod(0o666 & ~_umask())
        partial.replace(html)
    except OSError as error:
        if partial:
            partial.unlink(missing_ok=True)
        raise InfrastructureError(f"{html}: cannot be written ({error.strerror})") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
