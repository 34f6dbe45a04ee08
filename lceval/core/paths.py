"""Cache folder for what can be rebuilt: converted models and built rows."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(name: str) -> Path:
    """The cache folder `name` under `LCEVAL_CACHE` (default `~/.cache/lceval`), created if missing."""
    root = os.environ.get("LCEVAL_CACHE") or Path.home() / ".cache" / "lceval"
    folder = Path(root).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
