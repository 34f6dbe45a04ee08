"""Rows of `lc_lbv2_mc` and `lc_lbv2_mc_ll`: LongBench v2, four options on contexts of 8 thousand to 2 million words."""

from collections.abc import Mapping
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.prompts import LETTERS
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row, content_id, together
from lceval.tasks.sources import SourceFile, by_key, read_local_or_hub

_OPTIONS = tuple(f"choice_{letter}" for letter in LETTERS)
_FIELDS: dict[str, type] = dict.fromkeys(
    ("_id", "domain", "sub_domain", "difficulty", "length", "question", *_OPTIONS, "answer", "context"), str
)


def rows(request: Request) -> RowPlan:
    """One row per question; the few questions with the same context are adjacent."""
    source, identity = _read(request)
    return RowPlan(
        {"source": identity},
        lambda: together(_row(request, record, source, identity) for record in by_key(source, "_id").values()),
    )


def _read(request: Request) -> tuple[SourceFile, str]:
    """The records and their identity: the benchmark, or a sample of it in the data folder."""
    source = read_local_or_hub(request.task, request.dataset, _FIELDS)
    if source.name in request.dataset.files:
        return source, f"{source.identity} (a sample: {len(source.records)} of {request.dataset.count} rows)"
    return source, source.identity


def _row(request: Request, record: Mapping[str, Any], source: SourceFile, identity: str) -> Row:
    if record["answer"] not in [*LETTERS]:
        answer = record["answer"]
        raise UserError(f"{source.name} _id={record['_id']!r}: invalid answer={answer!r:.40}: expected A to D.")
    text, gold = record["context"].strip(), LETTERS.index(record["answer"])
    choices = [record[option] for option in _OPTIONS]
    pid = content_id(text)
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
