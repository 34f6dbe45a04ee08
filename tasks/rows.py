"""The row that every task shares, and the cache of built rows.

Rows are a pure function of their inputs, so a cache entry is named by a hash of all of them: the source
files, the tokenizer, the length, the seed, and the code and templates of this package. An entry is a jsonl file whose
first line states the inputs and the number of rows; it appears whole or not at all.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from lceval.errors import UserError
from lceval.home import cache_dir

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_SEED = 1234

_log = logging.getLogger(__name__)


class Document(TypedDict):
    """One document of a context."""

    pid: str
    title: str
    text: str


class Row(TypedDict):
    """One question on one context.

    The prompt is `instruction`, `context` and `ask`, a blank line between; `context` holds the texts of `docs`
    exactly as the prompt shows them (empty without any) and `context_setting` is the `contexts.ContextSetting`;
    `cluster` names the full context that several rows share; `length_tokens` is the rendered prompt plus the
    room for the answer, in the tokens of the model (None where no tokenizer is named and the task's length
    does not depend on one); `reply_prefix` is how a reply in the required form begins, before the answer.
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


def as_dataset(rows: Sequence[Row]) -> "dict[str, Dataset]":
    """What lm-eval expects of a `custom_dataset` function: the rows as the split `test`."""
    from datasets import Dataset  # heavy, and scoring must not need it

    return {"test": Dataset.from_list([dict(row) for row in rows])}


def together(rows: Sequence[Row]) -> list[Row]:
    """The rows of a context next to each other, contexts in the order of their first row."""
    places: dict[str, int] = {}
    for row in rows:
        places.setdefault(row["cluster"], len(places))
    return sorted(rows, key=lambda row: places[row["cluster"]])


def checked_seed(task: str, seed: object) -> int:
    """The seed of the rows, which must be a whole number."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"{task} has data_seed={seed!r}: expected a whole number, e.g. {DEFAULT_SEED}.")
    return seed


def cached_rows(task: str, inputs: Mapping[str, Any], build: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a task, built once for the same inputs.

    Args:
        task: The task's name; part of the file's name.
        inputs: Everything the rows depend on besides the code, as JSON values.
        build: Makes the rows.
    """
    stated = {"task": task, **inputs, "code": code_digest()}
    key = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:24]
    name = f"{task}-{key}.jsonl"
    rows = _load(name)
    if rows is None:
        rows = build()
        try:
            _store(name, stated, rows)
        except OSError as error:
            _log.warning("%s: rows not cached (%s); set LCEVAL_CACHE to a writable folder", task, error)
    return rows


def _load(name: str) -> list[Row] | None:
    """The rows of an entry, or None if there is none or it is damaged (then it is built again)."""
    try:
        header, *lines = (cache_dir("rows") / name).read_text(encoding="utf-8").splitlines()
        rows: list[Row] = [json.loads(line) for line in lines]
        return rows if json.loads(header)["rows"] == len(rows) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(name: str, stated: Mapping[str, Any], rows: Sequence[Row]) -> None:
    lines = [json.dumps(line) for line in ({"rows": len(rows), "inputs": stated}, *rows)]
    folder = cache_dir("rows")
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        os.replace(temporary, folder / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@cache
def code_digest(folder: Path = Path(__file__).parent) -> str:
    """Hash of a package's sources and templates, of this one by default: how rows are built is among their inputs."""
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.yaml")]):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
