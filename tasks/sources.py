"""Source data: from the folder LCEVAL_DATA, else from the hub at a pinned commit; validated and hashed.

Sources are either jsonl files in our own schema (`nq_open/questions.jsonl`), which exist only locally, or unmodified
files of a hub repository. For the latter, `hub/<owner>/<name>/` in the data folder (written by `lceval data fetch`)
takes precedence, so that they can be used offline.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lceval.core.errors import UserError
from lceval.core.io import objects_of

if TYPE_CHECKING:
    from lceval.tasks.catalogue import Dataset, Hub

DATA_VARIABLE = "LCEVAL_DATA"
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class SourceFile:
    """A validated jsonl file; `identity` identifies its content and is part of every row built from it."""

    name: str
    records: list[dict[str, Any]]
    sha256: str

    @property
    def identity(self) -> str:
        return f"{self.name} sha256:{self.sha256[:16]}"


def read_sources(task: str, schemas: Mapping[str, Mapping[str, type]]) -> list[SourceFile]:
    """Read the jsonl files a task is built from.

    Args:
        task: Task name, for messages.
        schemas: Path in the data folder -> required fields of every line: `str`, `int`, `list` for a non-empty list of
            strings, or `object` for anything but null.

    Raises:
        UserError: No data folder, a missing file, or a line that does not match the schema.
    """
    folder = os.environ.get(DATA_VARIABLE, "")
    files = " and ".join(schemas)
    advice = f"set {DATA_VARIABLE} to a folder with {files}"
    if not folder:
        raise UserError(f"{task} requires a data folder and {DATA_VARIABLE} is not set: {advice}.")
    root = Path(folder).expanduser()
    missing = [name for name in schemas if not (root / name).is_file()]
    if missing:
        raise UserError(f"{task}: missing {' and '.join(missing)} in {DATA_VARIABLE}={folder}: {advice}.")
    return [_read(root / name, name, fields) for name, fields in schemas.items()]


def _read(path: Path, name: str, fields: Mapping[str, type]) -> SourceFile:
    content = path.read_bytes()
    records = [_checked(record, where, fields) for where, record in objects_of(content.split(b"\n"), name)]
    if _ESCAPED_SURROGATE.search(content):
        for number, record in enumerate(records, start=1):
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(f"{name} record {number}: a text has half of a surrogate pair.") from None
    if not records:
        raise UserError(f"{name} in {DATA_VARIABLE} is empty: expected one JSON object per line.")
    return SourceFile(name, records, hashlib.sha256(content).hexdigest())


_EXPECTED = {list: "a non-empty list of strings", str: "a string", int: "an integer", object: "a value"}


def _checked(record: dict[str, Any], where: str, fields: Mapping[str, type]) -> dict[str, Any]:
    for field, kind in fields.items():
        if not _fits(record.get(field), kind):
            raise UserError(f"{where}: invalid {field}={record.get(field)!r:.80}: expected {_EXPECTED[kind]}.")
    return record


def _fits(value: object, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    if kind is object:
        return value is not None
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def data_folder() -> Path | None:
    """The folder LCEVAL_DATA; None if it is not set."""
    folder = os.environ.get(DATA_VARIABLE, "")
    return Path(folder).expanduser() if folder else None


def hub_copy(hub: "Hub") -> Path | None:
    """Folder with the local copy of a repository; None without one."""
    root = data_folder()
    copy = root / "hub" / hub.repo if root is not None else None
    return copy if copy is not None and copy.is_dir() else None


def read_hub(task: str, hub: "Hub", split: str, fields: Mapping[str, type]) -> SourceFile:
    """Read one split of a hub repository, from the local copy if there is one, else from the hub.

    Args:
        task: Task name, for messages.
        hub: Repository.
        split: Key of `hub.files`.
        fields: Required fields of every record, as for `read_sources`; further columns are kept.

    Raises:
        UserError: Neither the copy nor the hub can be read, or a record does not match the schema.
    """
    import datasets  # heavy

    copy, pattern = hub_copy(hub), hub.files[split]
    if copy is not None and not (files := sorted(copy.glob(pattern))):
        raise UserError(f"{task}: missing {pattern} in {copy}: run `lceval data fetch {task}` or remove that folder.")
    options: dict[str, Any] = {"features": _features(hub)} if hub.features else {}
    try:
        if copy is not None:
            kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}[files[0].suffix]
            table = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
        else:
            revision = _commit(hub)
            table = datasets.load_dataset(
                hub.repo, data_files={split: pattern}, revision=revision, split=split, **options
            )
    except Exception as error:  # from the hub, its HTTP client or a damaged file: no common base class
        raise _no_hub(task, hub, pattern, error) from error
    name = f"{hub.repo}/{pattern}"
    records = [_checked(dict(record), f"{name} record {n}", fields) for n, record in enumerate(table, start=1)]
    if not records:
        raise UserError(f"{name} is empty.")
    return SourceFile(name, records, _digest(files) if copy is not None else revision)


def hub_file(task: str, hub: "Hub", split: str) -> tuple[Path, str]:
    """A file of a hub repository that is no table, with its identity: its local copy, else downloaded.

    Raises:
        UserError: Neither the copy nor the hub has it.
    """
    from huggingface_hub import hf_hub_download

    copy, name = hub_copy(hub), hub.files[split]
    if copy is not None:
        if not (copy / name).is_file():
            raise UserError(f"{task}: missing {name} in {copy}: run `lceval data fetch {task}` or remove that folder.")
        return copy / name, _digest([copy / name])
    try:
        return Path(hf_hub_download(hub.repo, name, revision=hub.revision, repo_type="dataset")), hub.revision
    except Exception as error:  # from the hub or its HTTP client: no common base class
        raise _no_hub(task, hub, name, error) from error


def _no_hub(task: str, hub: "Hub", pattern: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
    return UserError(
        f"{task} cannot load {hub.repo} from the hub ({reason:.120}): connect to the network, or set "
        f"{DATA_VARIABLE} to a folder with hub/{hub.repo}/{pattern} (`lceval data fetch {task}` downloads it)."
    )


def read_local_or_hub(task: str, dataset: "Dataset", fields: Mapping[str, type]) -> SourceFile:
    """Read a dataset's file in the data folder if it exists, else the first split of its hub repository.

    A local copy of the repository takes precedence. Arguments and errors are those of `read_hub`.
    """
    folder = data_folder()
    local = [name for name in dataset.files if folder is not None and (folder / name).is_file()]
    if dataset.hub is not None and (not local or hub_copy(dataset.hub) is not None):
        return read_hub(task, dataset.hub, next(iter(dataset.hub.files)), fields)
    (source,) = read_sources(task, {dataset.files[0]: fields})
    return source


def _commit(hub: "Hub") -> str:
    """The pinned commit; for a repository without one, the current commit."""
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
    """Index records by a field that must be unique.

    Raises:
        UserError: a duplicate value.
    """
    by_value: dict[str, dict[str, Any]] = {}
    for record in source.records:
        if record[key] in by_value:
            raise UserError(f"{source.name}: duplicate {key}={record[key]!r}: each must be unique.")
        by_value[record[key]] = record
    return by_value


def joint_identity(sources: Sequence[SourceFile]) -> str:
    """Identity of several files as one string."""
    return ", ".join(source.identity for source in sources)
