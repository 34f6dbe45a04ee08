"""Source data from the folder that LCEVAL_DATA names: found, checked line by line, and hashed."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lceval.errors import UserError

DATA_VARIABLE = "LCEVAL_DATA"


@dataclass(frozen=True)
class SourceFile:
    """A checked jsonl file; `identity` names it by content and becomes part of every row built from it."""

    name: str
    records: list[dict[str, Any]]
    sha256: str

    @property
    def identity(self) -> str:
        return f"{self.name} sha256:{self.sha256[:16]}"


def read_sources(task: str, schemas: Mapping[str, Mapping[str, type]]) -> list[SourceFile]:
    """Read the jsonl files a task is built from.

    Args:
        task: The task's name, for messages.
        schemas: For each file, by its path in the data folder, the fields every line must have: `str`, or
            `list` for a list of one or more strings.

    Raises:
        UserError: No data folder, a missing file, or a line that does not fit the schema.
    """
    folder = os.environ.get(DATA_VARIABLE, "")
    wanted = " and ".join(schemas)
    advice = f"set {DATA_VARIABLE} to a folder that holds {wanted} (not loaded from the hub yet)"
    if not folder:
        raise UserError(f"{task} needs a data folder and {DATA_VARIABLE} is not set: {advice}.")
    root = Path(folder).expanduser()
    missing = [name for name in schemas if not (root / name).is_file()]
    if missing:
        raise UserError(f"{task} finds no {' and no '.join(missing)} in {DATA_VARIABLE}={folder}: {advice}.")
    return [_read(root / name, name, fields) for name, fields in schemas.items()]


def _read(path: Path, name: str, fields: Mapping[str, type]) -> SourceFile:
    content = path.read_bytes()
    records = [
        _record(line, f"{name} line {number}", fields)
        for number, line in enumerate(content.split(b"\n"), start=1)
        if line.strip()
    ]
    if not records:
        raise UserError(f"{name} in {DATA_VARIABLE} is empty: expected one JSON object a line.")
    return SourceFile(name, records, hashlib.sha256(content).hexdigest())


def _record(line: bytes, where: str, fields: Mapping[str, type]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): expected one object a line.") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is a {type(record).__name__}: expected an object with {', '.join(fields)}.")
    for field, kind in fields.items():
        if not _fits(record.get(field), kind):
            form = "a list of one or more strings" if kind is list else "a string"
            raise UserError(f"{where} has {field}={record.get(field)!r:.80}: expected {form}.")
    return record


def _fits(value: object, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)


def by_key(source: SourceFile, key: str) -> dict[str, dict[str, Any]]:
    """The records by a field that must be unique."""
    found: dict[str, dict[str, Any]] = {}
    for record in source.records:
        if record[key] in found:
            raise UserError(f"{source.name} has {key}={record[key]!r} twice: each must be unique.")
        found[record[key]] = record
    return found


def joint_identity(sources: Sequence[SourceFile]) -> str:
    """One string that names several files by content."""
    return ", ".join(source.identity for source in sources)
