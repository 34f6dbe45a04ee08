"""HELMET's files of questions with passages: where they lie, their records, and what a record says is gold.

Two schemas are among them. Most files have `positive_ctxs`, which name the gold passages; PopQA's have `s_pop`, how
often the entity is looked up, and each passage says whether it `has_answer`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lceval.errors import UserError
from lceval.tasks.build import Request
from lceval.tasks.catalogue import Hub
from lceval.tasks.rows import Document
from lceval.tasks.sources import DATA_VARIABLE, data_folder

RARE = 1000
"""PopQA: only entities looked up less often than this a month are asked about, as in the official evaluation."""


class Pool:
    """A file of questions with K passages each; lines are read when they are wanted, as a file may be gigabytes."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        with path.open("rb") as stream:
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def identity(self) -> str:
        return f"{self.name} sha256:{self.sha256[:16]}"

    def places(self) -> dict[str, list[int]]:
        """Where in the file each question's records begin.

        Raises:
            UserError: A damaged line.
        """
        found: dict[str, list[int]] = {}
        start = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    record = checked(line, f"{self.name} line {number}")
                    if asked(record):
                        found.setdefault(key_of(record), []).append(start)
                start += len(line)
        return found

    def records(self, starts: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The records that begin there."""
        with self.path.open("rb") as stream:
            for start in starts:
                stream.seek(start)
                record: dict[str, Any] = json.loads(stream.readline())
                yield record


def located(request: Request, hub: Hub, name: str) -> Path:
    """The file of the data folder.

    Raises:
        UserError: It is not there.
    """
    root, wanted = data_folder(), f"hub/{hub.repo}/{name}"
    advice = f"`lceval data fetch {request.dataset.dataset}` takes it from an archive of 11 GB on the hub"
    if root is None:
        raise UserError(f"{request.task} reads {wanted} of a data folder and {DATA_VARIABLE} is not set: {advice}.")
    if not (root / wanted).is_file():
        raise UserError(f"{request.task} finds no {wanted} in {DATA_VARIABLE}={root}: {advice}.")
    return root / wanted


def checked(line: bytes, where: str) -> dict[str, Any]:
    """A record, with what its rows are made of.

    Raises:
        UserError: It is none.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): expected one object a line.") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is a {type(record).__name__}: expected an object.")
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
    for field, (fits, output_format) in rules.items():
        if not fits(record.get(field)):
            raise UserError(f"{where} has {field}={record.get(field)!r:.80}: expected {output_format}.")
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
    """Its id, which one half of the files call `psg_id` and the other `id`."""
    said = passage.get("psg_id", passage.get("id"))
    return "" if said is None or isinstance(said, bool) else str(said)


def key_of(record: Mapping[str, Any]) -> str:
    """What the records of one question share."""
    return str(record["id"]) if record.get("id") is not None else str(record["question"])


def asked(record: Mapping[str, Any]) -> bool:
    """Whether the official evaluation asks it."""
    return "s_pop" not in record or bool(record["s_pop"] < RARE)


def passages(record: Mapping[str, Any]) -> tuple[list[Document], list[str]]:
    """Its passages in order, each once, and the ids of the gold ones among them."""
    found: dict[str, Document] = {}
    for passage in record["ctxs"]:
        pid = pid_of(passage)
        found.setdefault(pid, Document(pid=pid, title=passage["title"], text=passage["text"].strip()))
    if "s_pop" in record:
        gold = {pid_of(passage) for passage in record["ctxs"] if passage["has_answer"]}
    else:
        gold = {pid_of(passage) for passage in record["positive_ctxs"]}
    return [*found.values()], [pid for pid in found if pid in gold]
