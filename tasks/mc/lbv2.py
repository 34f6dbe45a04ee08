"""Rows of `lc_lbv2_mc` and `lc_lbv2_mc_ll`: LongBench v2, four options on contexts of 8 thousand to 2 million words."""

import hashlib
from collections.abc import Mapping
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.prompts import LETTERS
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row, together
from lceval.tasks.sources import SourceFile, by_key, data_folder, hub_copy, read_hub, read_sources

_OPTIONS = tuple(f"choice_{letter}" for letter in LETTERS)
_FIELDS: dict[str, type] = dict.fromkeys(
    ("_id", "domain", "sub_domain", "difficulty", "length", "question", *_OPTIONS, "answer", "context"), str
)


def rows(request: Request) -> RowPlan:
    """One row per question; the few questions with the same context are adjacent."""
    source, identity = _read(request)

    def build() -> list[Row]:
        return together([_row(request, record, source, identity) for record in by_key(source, "_id").values()])

    return RowPlan({"source": identity}, build)


def _read(request: Request) -> tuple[SourceFile, str]:
    """The records and their identity: the benchmark, or a sample of it in the data folder."""
    dataset, folder = request.dataset, data_folder()
    assert dataset.hub is not None
    (sample,) = dataset.files
    if hub_copy(dataset.hub) is None and folder is not None and (folder / sample).is_file():
        (source,) = read_sources(request.task, {sample: _FIELDS})
        return source, f"{source.identity} (a sample: {len(source.records)} of {dataset.count} rows)"
    source = read_hub(request.task, dataset.hub, "train", _FIELDS)
    return source, source.identity


def _row(request: Request, record: Mapping[str, Any], source: SourceFile, identity: str) -> Row:
    if record["answer"] not in [*LETTERS]:
        answer = record["answer"]
        raise UserError(f"{source.name} _id={record['_id']!r}: invalid answer={answer!r:.40}: expected A to D.")
    text, gold = record["context"].strip(), LETTERS.index(record["answer"])
    choices = [record[option] for option in _OPTIONS]
    pid = hashlib.sha256(text.encode()).hexdigest()[:12]
    return request.row(
        id=record["_id"],
        question=record["question"].strip(),
        answers=[LETTERS[gold], choices[gold]],
        docs=[Document(pid=pid, title="", text=text)],
        gold_pids=[pid],
        cluster=pid,
        source=identity,
        choices=choices,
        gold=gold,
        difficulty=record["difficulty"],
        length_class=record["length"],
        domain=record["domain"],
        sub_domain=record["sub_domain"],
    )
