"""The row schema of all tasks, and the cache of built rows.

Rows are a pure function of their inputs, so the key of a cache entry is a hash of all of them: source files, tokenizer,
length, seed, and the code and templates of this package. An entry is a jsonl file whose first line has the inputs and
the number of rows; it is written atomically.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

from lceval.core.errors import UserError
from lceval.core.io import read_objects, write_objects
from lceval.core.paths import cache_dir

DEFAULT_SEED = 1234

_log = logging.getLogger(__name__)


class Document(TypedDict):
    """One document of a context."""

    pid: str
    title: str
    text: str


class Row(TypedDict):
    """One question on one context.

    Attributes:
        docs: documents of the context, in order.
        gold_pids: ids of the gold documents.
        cluster: id of the full context, shared by its questions.
        context_setting: the `contexts.ContextSetting` as a string.
        length_tokens: tokens of the rendered prompt plus those reserved for the reply; None if no tokenizer is set and
            the source fixes the length.
        instruction: the part of the prompt before the context; the parts are joined by blank lines.
        context: texts of `docs` exactly as in the prompt; empty without documents.
        ask: the part of the prompt after the context.
        reply_prefix: beginning of a reply in the required format, before the answer.
        gold: index of the correct choice.
        separator: between the parts of the prompt, where it is not a blank line.
        messages: the prompt as a conversation of `role` and `content`, where it is one.
        answer_prefix: beginning of the reply that ends the prompt, where each row has its own.
    """

    id: str
    question: str
    answers: list[str]
    docs: list[Document]
    gold_pids: list[str]
    cluster: str
    context_setting: str
    length_tokens: int | None
    source: str
    licence: str
    instruction: str
    context: str
    ask: str
    reply_prefix: str
    choices: NotRequired[list[str]]
    gold: NotRequired[int]
    separator: NotRequired[str]
    answer_prefix: NotRequired[str]
    messages: NotRequired[list[dict[str, str]]]


AnyRow = TypeVar("AnyRow", bound=Row)


def content_id(text: str) -> str:
    """Short id of a text: a hash of its content."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def by_context(rows: Iterable[AnyRow]) -> dict[str, list[AnyRow]]:
    """Rows by `cluster`; contexts in the order of their first row."""
    contexts: dict[str, list[AnyRow]] = {}
    for row in rows:
        contexts.setdefault(row["cluster"], []).append(row)
    return contexts


def together(rows: Iterable[Row]) -> list[Row]:
    """Group rows by context; contexts in the order of their first row."""
    return [row for group in by_context(rows).values() for row in group]


def cached_rows(task: str, inputs: Mapping[str, Any], build: Callable[[], list[Row]]) -> list[Row]:
    """Rows of a task, built once for the same inputs.

    Args:
        task: Task name; part of the file name.
        inputs: Everything the rows depend on besides the code, as JSON values.
        build: Returns the rows.
    """
    key_fields = {"task": task, **inputs, "code": code_digest()}
    key = hashlib.sha256(json.dumps(key_fields, sort_keys=True).encode()).hexdigest()[:24]
    name = f"{task}-{key}.jsonl"
    rows = _load(name)
    if rows is None:
        rows = build()
        try:
            write_objects(cache_dir("rows") / name, [{"rows": len(rows), "inputs": key_fields}, *rows])
        except OSError as error:
            _log.warning("%s: rows not cached (%s); set LCEVAL_CACHE to a writable folder", task, error)
    return rows


def _load(name: str) -> list[Row] | None:
    """Rows of a cache entry; None if it is missing or damaged."""
    try:
        header, *rows = (value for _, value in read_objects(cache_dir("rows") / name))
    except (UserError, OSError, ValueError):
        return None
    return rows if header.get("rows") == len(rows) else None  # type: ignore[return-value]


@cache
def code_digest(folder: Path = Path(__file__).parent) -> str:
    """Hash of the sources and templates in a folder, this package by default; part of the cache key."""
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.yaml")]):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
