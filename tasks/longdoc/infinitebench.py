"""Rows of `lc_infinitebench_*`: questions on whole English books, and what its questions are scored by."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.parsing import extract, normalize
from lceval.tasks.prompts import LETTERS
from lceval.tasks.rows import Document, Row, together
from lceval.tasks.scoring import answer_metrics, with_telemetry
from lceval.tasks.sources import SourceFile, read_hub

_FIELDS: dict[str, type] = {"id": int, "context": str, "input": str, "answer": list}
_SPLITS: dict[str, tuple[str, dict[str, type]]] = {
    "infinite_letter": ("longbook_choice_eng", {**_FIELDS, "options": list}),
    "infinite_qa": ("longbook_qa_eng", _FIELDS),
    "infinite_sum": ("longbook_sum_eng", _FIELDS),
}
"""By form: the split, and what its records must have."""

_SUMMARIZE = "Summarize the book."  # the benchmark gives no question here


def rows(request: Request) -> Plan:
    """One row a record; the questions on a book stand together."""
    assert request.dataset.hub is not None
    split, fields = _SPLITS[request.output_format]
    source = read_hub(request.task, request.dataset.hub, split, fields)
    return Plan(
        {"source": source.identity},
        lambda: together([_row(request, source, record) for record in _unique(source)]),
    )


def _unique(source: SourceFile) -> list[dict[str, Any]]:
    known = {record["id"]: record for record in source.records}
    if len(known) < len(source.records):
        twice = next(n for n, count in Counter(record["id"] for record in source.records).items() if count > 1)
        raise UserError(f"{source.name} has id={twice} twice: each must be unique.")
    return [*known.values()]


def _row(request: Request, source: SourceFile, record: Mapping[str, Any]) -> Row:
    text = record["context"].strip()
    book = hashlib.sha256(text.encode()).hexdigest()[:12]
    more: dict[str, Any] = {}
    answers = record["answer"]
    if request.output_format == "infinite_letter":
        gold = _gold(source, record)
        answers = [LETTERS[gold], record["options"][gold]]
        more = {"choices": record["options"], "gold": gold}
    return request.row(
        id=str(record["id"]),
        question=_SUMMARIZE if request.output_format == "infinite_sum" else record["input"].strip(),
        answers=answers,
        docs=[Document(pid=book, title="", text=text)],
        gold_pids=[book],
        cluster=book,
        source=source.identity,
        **more,
    )


def _gold(source: SourceFile, record: Mapping[str, Any]) -> int:
    """The right option's place: the answer is its text, with or without its letter."""
    text, *letter = record["answer"]
    options = record["options"]
    if len(options) == len(LETTERS):
        if len(letter) == 1 and letter[0] in [*LETTERS]:
            return LETTERS.index(letter[0])
        if not letter and text in options:
            return int(options.index(text))
    raise UserError(
        f"{source.name} id={record['id']} has answer={record['answer']!r:.80} and {len(options)} options: "
        "expected four, and one of them as the answer, with or without its letter."
    )


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Token F1, best over the gold answers, as InfiniteBench counts it: yes, no and noanswer are words like others."""
    said = Counter(normalize(prediction).split())
    golds = (Counter(normalize(answer).split()) for answer in answers)
    # 2PR / (P + R) with P = common / said and R = common / gold
    return max((2.0 * (said & gold).total() / max(1, said.total() + gold.total()) for gold in golds), default=0.0)


def qa_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of the questions."""
    output = str(results[0])
    metrics = {**answer_metrics(output, doc["answers"]), "f1": token_f1(extract(output).answer, doc["answers"])}
    return with_telemetry(metrics, results[0], parsed=bool(metrics["parse_rate"]))
