"""Files: JSON Lines, and writes that leave either the old file or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lceval.core.errors import UserError


def read_objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, one in memory at a time, each with its place (`FILE line N`).

    Blank lines are skipped, and a byte order mark is ignored.

    Raises:
        UserError: an unreadable file, or a line that is not a JSON object in UTF-8.
    """
    try:
        with file.open("rb") as lines:
            yield from objects_of(lines, str(file))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def objects_of(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_objects`, of lines that are open or in memory."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{name} line {number}"
            yield where, parse_object(line, where)


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """The object of one line.

    Raises:
        UserError: not a JSON object in UTF-8.
    """
    import jsonlines

    try:
        value: dict[str, Any] = jsonlines.Reader([line], loads=json.loads).read(type=dict)
    except jsonlines.InvalidLineError as error:
        reason = error.__cause__ or "another type"
        raise UserError(f"{where} is not a JSON object ({reason!s:.80}): expected one per line") from error
    return value


def write_text(file: Path, text: str) -> None:
    """Write a file atomically; its folder exists."""
    with replacing(file) as out:
        out.write(text.encode())


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write an indented JSON file atomically; values that JSON lacks become texts."""
    with replacing(file) as out:
        out.write(_encoded(value, indent=2) + b"\n")


def write_objects(file: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file atomically."""
    with replacing(file) as out:
        out.writelines(_encoded(value) + b"\n" for value in objects)


def _encoded(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a truncated answer may end with
        return json.dumps(value, indent=indent, default=str).encode()


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A new file beside `file` that replaces it if the block succeeds, and is deleted otherwise."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
