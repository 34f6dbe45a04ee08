"""Rows of `lc_infinitebench_*`: questions on whole English books; F1 of its questions."""

from collections.abc import Mapping, Sequence
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.parsing import extract, normalize
from lceval.tasks.prompts import LETTERS
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row, content_id, together
from lceval.tasks.scoring import answer_metrics, overlap_f1, with_telemetry
from lceval.tasks.sources import SourceFile, by_key, read_hub

_FIELDS: dict[str, type] = {"id": int, "context": str, "input": str, "answer": list}
_SPLITS: dict[str, tuple[str, dict[str, type]]] = {
    "infinite_letter": ("longbook_choice_eng", {**_FIELDS, "options": list}),
    "infinite_qa": ("longbook_qa_eng", _FIELDS),
    "infinite_sum": ("longbook_sum_eng", _FIELDS),
}
"""By output format: the split, and the required fields of its records."""

_SUMMARIZE = "Summarize the book."  # the benchmark has no question here


def rows(request: Request) -> RowPlan:
    """One row per record; the questions on a book are adjacent."""
    assert request.dataset.hub is not None
    split, fields = _SPLITS[request.output_format]
    source = read_hub(request.task, request.dataset.hub, split, fields)
    return RowPlan(
        {"source": source.identity},
        lambda: together(_row(request, source, record) for record in by_key(source, "id").values()),
    )


def _row(request: Request, source: SourceFile, record: Mapping[str, Any]) -> Row:
    text = record["context"].strip()
    book = content_id(text)
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
    """Index of the correct option: the answer is its text, with or without its letter."""
    text, *letter = record["answer"]
    options = record["options"]
    if len(options) == len(LETTERS):
        if len(letter) == 1 and letter[0] in [*LETTERS]:
            return LETTERS.index(letter[0])
        if not letter and text in options:
            return int(options.index(text))
    raise UserError(
        f"{source.name} id={record['id']}: invalid answer={record['answer']!r:.80} with {len(options)} options: "
        "expected four options and the text of one of them, with or without its letter."
    )


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Token F1, maximum over the gold answers, by InfiniteBench's rule: no special case for yes, no and noanswer."""
    tokens = normalize(prediction).split()
    return max((overlap_f1(tokens, normalize(answer).split()) for answer in answers), default=0.0)


def qa_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of question answering; `f1` is on the whole output, as in the benchmark."""
    output, answers = str(results[0]), doc["answers"]
    metrics = {
        **answer_metrics(output, answers),
        "f1": token_f1(output, answers),
        "f1_extracted": token_f1(extract(output).answer, answers),
    }
    return with_telemetry(metrics, results[0], parsed=bool(metrics["parse_rate"]))
