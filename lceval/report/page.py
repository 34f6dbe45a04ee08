"""One HTML file from plain values: templates, plotting library and data put together, with nothing to fetch.

What runs wrote is untrusted text. It lies in a JSON block in which no tag can close, the scripts put it on the page as
text only, and the page's own policy lets no script run but the two that it came with and lets nothing be fetched.
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

from lceval.errors import InfrastructureError, UserError
from lceval.report.data import collect
from lceval.results import read_runs

MARKER = "<!doctype html><!-- lceval report -->"
SCRIPTS = ("base.js", "plots.js", "page.js")


@dataclass(frozen=True)
class Report:
    """What was written."""

    html: Path
    runs: int
    rows: int
    samples: int
    bytes: int


def write(paths: Sequence[Path], html: Path) -> Report:
    """Read the runs in `paths` and write their page; a page that this made before is replaced.

    Raises:
        UserError: No runs, a folder that is no run, or a file at `html` that this did not make.
        InfrastructureError: The file could not be written.
    """
    if not paths:
        raise UserError("no runs given; name one or more run folders, as in: lceval report runs/a --output report.html")
    _may_write(html)
    runs = read_runs(paths)
    data = collect(runs)
    content = render(data)
    _replace(html, content)
    samples = sum(len(block["id"]) for block in data["blocks"])
    return Report(html, len(runs), len(data["rows"]), samples, len(content))


def render(data: dict[str, Any]) -> bytes:
    """The page that shows `data`; the same data gives the same bytes."""
    from plotly.offline import get_plotlyjs

    source = files("lceval.report")
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
    # Half a surrogate pair, which JSON may carry, has no bytes in UTF-8.
    return f"{MARKER}\n{page}".encode("utf-8", "replace")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _may_write(html: Path) -> None:
    if html.is_dir():
        raise UserError(f"--output {html}: is a folder; name a file, as in {html / 'report.html'}")
    if not html.parent.is_dir():
        raise UserError(f"--output {html}: no folder {html.parent}; make it first")
    if html.exists():
        with html.open("rb") as file:
            if file.readline().strip() != MARKER.encode():
                raise UserError(f"--output {html}: not a report of lceval; choose another name")


def _replace(html: Path, content: bytes) -> None:
    """Write all of it or nothing."""
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
        raise InfrastructureError(f"{html}: could not be written ({error.strerror})") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
