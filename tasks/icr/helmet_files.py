"""HELMET's files of questions with passages: location, records, gold passages.

There are two schemas. Most files list the gold passages in `positive_ctxs`; PopQA's have `s_pop`, the popularity of the
entity, and a flag `has_answer` on each passage.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lceval.core.errors import UserError
from lceval.core.io import parse_object
from lceval.tasks.catalogue import Hub
from lceval.tasks.request import Request
from lceval.tasks.rows import Document
from lceval.tasks.sources import DATA_VARIABLE, data_folder

RARE = 1000
"""PopQA: only entities with fewer page views per month are used, as in the official evaluation."""


class QuestionFile:
    """A file of questions with K passages each; records are read on demand, as a file may be gigabytes."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        with path.open("rb") as stream:
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def identity(self) -> str:
        return f"{self.name} sha256:{self.sha256[:16]}"

    def offsets(self) -> dict[str, list[int]]:
        """Byte offsets of the records of each question.

        Raises:
            UserError: An invalid line.
        """
        offsets: dict[str, list[int]] = {}
        start = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    record = checked(line, f"{self.name} line {number}")
                    if is_used(record):
                        offsets.setdefault(key_of(record), []).append(start)
                start += len(line)
        return offsets

    def records(self, starts: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Read the records at byte offsets."""
        with self.path.open("rb") as stream:
            for start in starts:
                stream.seek(start)
                record: dict[str, Any] = json.loads(stream.readline())
                yield record


def located(request: Request, hub: Hub, name: str) -> Path:
    """Path of a file in the data folder.

    Raises:
        UserError: The file is missing.
    """
    root, path = data_folder(), f"hub/{hub.repo}/{name}"
    advice = f"`lceval data fetch {request.dataset.dataset}` downloads it (from an archive of 11 GB on the hub)"
    if root is None:
        raise UserError(f"{request.task} requires {path} in a data folder and {DATA_VARIABLE} is not set: {advice}.")
    if not (root / path).is_file():
        raise UserError(f"{request.task}: missing {path} in {DATA_VARIABLE}={root}: {advice}.")
    return root / path


def checked(line: bytes, where: str) -> dict[str, Any]:
    """Parse and validate a record.

    Raises:
        UserError: Invalid JSON or a missing field.
    """
    record = parse_object(line, where)
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "question": (lambda of: isinstance(of, str) and bool(of.strip()), "a string"),
        "answers": (lambda of: _list_of(of, lambda one: isinstance(one, str)), "a list of strings"),
        "ctxs": (lambda of: _list_of(of, _is_passage), "a list of passages with title, text and psg_id or id"),
    }
    if "s_pop" in record:
        rules["s_pop"] = (lambda of: isinstance(of, int | float), "a number")
        rules["ctxs"] = (
            lambda of: _list_of(of, lambda one: _is_passage(one) and isinstance(one.get("has_answer"), bool)),
            "a list of passages with title, text, psg_id or id, and has_answer",
        )
    else:
        rules["positive_ctxs"] = (
            lambda of: _list_of(of, lambda one: isinstance(one, dict) and bool(pid_of(one))),
            "a list of passages with psg_id or id",
        )
    for field, (fits, expected) in rules.items():
        if not fits(record.get(field)):
            raise UserError(f"{where}: invalid {field}={record.get(field)!r:.80}: expected {expected}.")
    return record


def _list_of(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(fits(one) for one in value)


def _is_passage(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("title"), str)
        and isinstance(one.get("text"), str)
        and bool(pid_of(one))
    )


def pid_of(passage: Mapping[str, Any]) -> str:
    """Id of a passage: `psg_id` or `id`, depending on the file."""
    pid = passage.get("psg_id", passage.get("id"))
    return "" if pid is None or isinstance(pid, bool) else str(pid)


def key_of(record: Mapping[str, Any]) -> str:
    """Key shared by the records of one question."""
    return str(record["id"]) if record.get("id") is not None else str(record["question"])


def is_used(record: Mapping[str, Any]) -> bool:
    """Whether the official evaluation uses the record."""
    return "s_pop" not in record or bool(record["s_pop"] < RARE)


def passages(record: Mapping[str, Any]) -> tuple[list[Document], list[str]]:
    """Unique passages of a record in order, and the ids of the gold passages."""
    documents: dict[str, Document] = {}
    for passage in record["ctxs"]:
        pid = pid_of(passage)
        documents.setdefault(pid, Document(pid=pid, title=passage["title"], text=passage["text"].strip()))
    if "s_pop" in record:
        gold = {pid_of(passage) for passage in record["ctxs"] if passage["has_answer"]}
    else:
        gold = {pid_of(passage) for passage in record["positive_ctxs"]}
    return [*documents.values()], [pid for pid in documents if pid in gold]
