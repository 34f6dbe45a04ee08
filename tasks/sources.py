"""Source data: from the folder that LCEVAL_DATA names, else from the hub at a pinned commit; checked and hashed.

A dataset comes in one of two shapes: jsonl files of our own schema (`nq_open/questions.jsonl`), which exist only
locally, or the files of a hub repository as they are there. The latter are looked for under `hub/<owner>/<name>/` of
the data folder first (what `lceval data fetch` fills), so a machine without network reads them with the same code.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lceval.errors import UserError

if TYPE_CHECKING:
    from lceval.tasks.catalogue import Hub

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
        schemas: For each file, by its path in the data folder, the fields every line must have: `str`, `int`,
            `list` for a list of one or more strings, or `object` for anything but null.

    Raises:
        UserError: No data folder, a missing file, or a line that does not fit the schema.
    """
    folder = os.environ.get(DATA_VARIABLE, "")
    wanted = " and ".join(schemas)
    advice = f"set {DATA_VARIABLE} to a folder that holds {wanted}"
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
    return _checked(record, where, fields)


_FORMS = {list: "a list of one or more strings", str: "a string", int: "a whole number", object: "a value"}


def _checked(record: dict[str, Any], where: str, fields: Mapping[str, type]) -> dict[str, Any]:
    for field, kind in fields.items():
        if not _fits(record.get(field), kind):
            output_format = _FORMS[kind]
            raise UserError(f"{where} has {field}={record.get(field)!r:.80}: expected {output_format}.")
    return record


def _fits(value: object, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    if kind is object:
        return value is not None
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def data_folder() -> Path | None:
    """The folder that LCEVAL_DATA names, or None where it names none."""
    named = os.environ.get(DATA_VARIABLE, "")
    return Path(named).expanduser() if named else None


def hub_copy(hub: "Hub") -> Path | None:
    """Where the data folder holds a copy of the repository, or None."""
    root = data_folder()
    copy = root / "hub" / hub.repo if root is not None else None
    return copy if copy is not None and copy.is_dir() else None


def read_hub(task: str, hub: "Hub", split: str, fields: Mapping[str, type]) -> SourceFile:
    """The records of one split of a hub repository, from the local copy if there is one, else from the hub.

    Args:
        task: The task's name, for messages.
        hub: The repository; `hub.files[split]` says which of its files to read.
        split: One of `hub.files`.
        fields: What every record must have, as for `read_sources`; further columns are kept.

    Raises:
        UserError: Neither is at hand, or a record that does not fit.
    """
    import datasets  # heavy

    copy, pattern = hub_copy(hub), hub.files[split]
    if copy is not None and not (found := sorted(copy.glob(pattern))):
        raise UserError(f"{task} finds no {pattern} in {copy}: run `lceval data fetch {task}` or remove that folder.")
    options: dict[str, Any] = {"features": _features(hub)} if hub.features else {}
    try:
        if copy is not None:
            kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}[found[0].suffix]
            table = datasets.load_dataset(kind, data_files=[str(file) for file in found], split="train", **options)
        else:
            files = {split: pattern}
            revision = _commit(hub)
            table = datasets.load_dataset(hub.repo, data_files=files, revision=revision, split=split, **options)
    except Exception as error:  # of the hub, of its HTTP client, of a damaged file: they share no base
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise UserError(
            f"{task} reads {hub.repo} from the hub ({reason:.120}): connect, or set {DATA_VARIABLE} to a folder that "
            f"holds hub/{hub.repo}/{pattern} (`lceval data fetch {task}` fills it where there is a network)."
        ) from error
    name = f"{hub.repo}/{pattern}"
    records = [_checked(dict(record), f"{name} record {n}", fields) for n, record in enumerate(table, start=1)]
    if not records:
        raise UserError(f"{name} is empty.")
    return SourceFile(name, records, _digest(found) if copy is not None else revision)


def _commit(hub: "Hub") -> str:
    """The commit that is read: the pinned one, or, for a repository of which we know none, the one it has today."""
    if re.fullmatch("[0-9a-f]{40}", hub.revision):
        return hub.revision
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(hub.repo, revision=hub.revision).sha)


def _features(hub: "Hub") -> Any:
    from datasets import Features, List, Value

    kinds = {"string": Value("string"), "int64": Value("int64"), "list": List(Value("string"))}
    return Features({column: kinds[kind] for column, kind in hub.features.items()})


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


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
