"""Rows of `lc_ruler_*`: RULER (Hsieh et al. 2024, arXiv 2404.06654) as kvpress runs it.

Rows have their prompts: context and question follow each other without anything between them, and the reply begins with
the row's answer prefix. The score is RULER's string match on the output without control characters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks import catalogue
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row, content_id, together
from lceval.tasks.scoring import with_telemetry
from lceval.tasks.sources import SourceFile, data_folder, hub_copy, read_hub, read_sources

_FIELDS: dict[str, type] = {
    "context": str,
    "question": str,
    "answer_prefix": str,
    "answer": list,
    "task": str,
    "max_new_tokens": int,
}
_CONTROL = re.compile(r"[\x00-\x1f]")


def rows(request: Request) -> RowPlan:
    """The rows of one of RULER's tasks at a length; those on one context are adjacent."""
    assert request.limit is not None
    source = _source(request, str(request.limit))
    return RowPlan({"source": source.identity}, lambda: _rows(request, source))


def _source(request: Request, length: str) -> SourceFile:
    hub, local, folder = request.dataset.hub, f"ruler/{length}.jsonl", data_folder()
    assert hub is not None
    if hub_copy(hub) is None and folder is not None and (folder / local).is_file():
        return read_sources(request.task, {local: _FIELDS})[0]
    return read_hub(request.task, hub, length, _FIELDS)


def _rows(request: Request, source: SourceFile) -> list[Row]:
    name = catalogue.find(request.task).mode
    limit = catalogue.output_format_config(request.output_format)["generation_kwargs"]["max_gen_toks"]
    of_task = [(number, record) for number, record in enumerate(source.records) if record["task"] == name]
    for number, record in of_task:
        if record["max_new_tokens"] != limit:
            raise UserError(
                f"{source.name} record {number + 1}: max_new_tokens={record['max_new_tokens']}, and {request.task} "
                f"generates {limit}."
            )
    return together([_row(request, source, number, record) for number, record in of_task])


def _row(request: Request, source: SourceFile, number: int, record: Mapping[str, Any]) -> Row:
    context = content_id(record["context"])
    return request.row(
        id=f"{record['task']}-{number}",
        question=record["question"],
        answers=record["answer"],
        docs=[Document(pid=context, title="", text=record["context"])],
        gold_pids=[context],
        cluster=context,
        source=source.identity,
        answer_prefix=record["answer_prefix"],
        separator="",
    )


def string_match(output: str, references: Sequence[str]) -> list[bool]:
    """Whether each reference is in the output, in any case, after control characters became line breaks."""
    text = _CONTROL.sub("\n", output.strip()).strip().lower()
    return [reference.lower() in text for reference in references]


def all_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results`: the share of the references that are in the output."""
    matches = string_match(str(results[0]), doc["answers"])
    return with_telemetry({"string_match": sum(matches) / len(matches)}, results[0], parsed=True)


def best_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of questions: whether one of the references is in the output."""
    matches = string_match(str(results[0]), doc["answers"])
    return with_telemetry({"string_match": float(any(matches))}, results[0], parsed=True)
