"""The cache folder, and file names from data that must not leave their folder."""

from __future__ import annotations

import os
from pathlib import Path

from lceval.core.errors import UserError


def cache_dir(name: str) -> Path:
    """The cache folder `name` under `LCEVAL_CACHE` (default `~/.cache/lceval`), created if missing."""
    root = os.environ.get("LCEVAL_CACHE") or Path.home() / ".cache" / "lceval"
    folder = Path(root).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def plain_name(name: str, what: str) -> str:
    """`name`, if it can be part of a file's name.

    Args:
        what: what it names, for the error.

    Raises:
        UserError: it would be a path.
    """
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise UserError(f"{what} {name!r}: expected a name without '/', since files are named after it")
    return name


def named(file: Path) -> Path:
    """`file`, unless it has no name, as the empty path, `.` and `/`.

    Raises:
        UserError: it has none.
    """
    if not file.name:
        raise UserError(f"{file}: is a folder; pass a file")
    return file


def not_a_link(file: Path) -> Path:
    """`file`, unless it is a symbolic link, which could lead out of a folder that somebody else made.

    Raises:
        UserError: it is one.
    """
    if os.path.islink(file):  # Path.is_symlink raises for a name that is too long
        raise UserError(f"{file}: a symbolic link is not followed; replace it with a copy of the file")
    return file
