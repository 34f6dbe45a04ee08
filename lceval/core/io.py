"""Files: JSON Lines, and writes that leave either the old file or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lceval.core.errors import UserError
from lceval.core.paths import named

# Half of a surrogate pair, as a truncated answer may end with, becomes \ud83d: the same text in JSON.
_HALF_PAIRS = "backslashreplace"
MOST_LEVELS = 100
"""Maximum nesting of JSON that is read: Python's stack ends at about 1,000, in what is called with the value."""


def decode(text: str | bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: not JSON, or nested deeper than `MOST_LEVELS`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MOST_LEVELS} levels") from None
    level, levels = [value], 0
    while level := [
        child
        for node in level
        if isinstance(node, dict | list)
        for child in (node.values() if isinstance(node, dict) else node)
    ]:
        levels += 1
        if levels > MOST_LEVELS:
            raise ValueError(f"nested deeper than {MOST_LEVELS} levels")
    return value


def read_text(file: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        UserError: an unreadable file, or one that is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} is not a text in UTF-8 ({error})") from None


def read_object(file: Path, advice: str) -> dict[str, Any]:
    """The object of a JSON file.

    Args:
        advice: what to do about a damaged file, for the error.

    Raises:
        UserError: an unreadable file, or one that is not a JSON object.
    """
    try:
        value = decode(read_text(file))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}; {advice}")
    return value


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
        value: dict[str, Any] = jsonlines.Reader([line], loads=decode).read(type=dict)
    except jsonlines.InvalidLineError as error:
        reason = error.__cause__ or "another type"
        raise UserError(f"{where} is not a JSON object ({reason!s:.80}): expected one per line") from error
    return value


def write_text(file: Path, text: str) -> None:
    """Write a file atomically; its folder exists."""
    with replacing(file) as out:
        out.write(text.encode(errors=_HALF_PAIRS))


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write an indented JSON file atomically; values that JSON lacks become texts."""
    with replacing(file) as out:
        out.write(_encoded(value, indent=2) + b"\n")


def write_objects(file: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file atomically."""
    with replacing(file) as out:
        out.writelines(_encoded(value) + b"\n" for value in objects)


def _encoded(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str).encode(errors=_HALF_PAIRS)


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A new file beside `file` that replaces it if the block succeeds, and is deleted otherwise."""
    partial = named(file).with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
