"""Rows of `lc_squality_sum`: query-focused summaries of stories, with four references each."""

from collections.abc import Mapping
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, read_sources


def rows(request: Request) -> RowPlan:
    """One row per question, grouped by story."""
    (file,) = request.dataset.files
    (source,) = read_sources(request.task, {file: {"document": str}})

    def build() -> list[Row]:
        built_rows: list[Row] = []
        for number, record in enumerate(source.records, start=1):
            try:
                built_rows += _rows(request, source, record)
            except (KeyError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{file} record {number} is not a SQuALITY story ({reason:.80}).") from error
        if without_reference := [row["id"] for row in built_rows if not any(row["answers"])]:
            raise UserError(f"{file}: no reference summary for {without_reference[0]}: expected one or more.")
        if len({row["id"] for row in built_rows}) < len(built_rows):
            raise UserError(f"{file}: duplicate story or question: each must be unique.")
        return built_rows

    return RowPlan({"source": source.identity}, build)


def _rows(request: Request, source: SourceFile, record: Mapping[str, Any]) -> list[Row]:
    story = record["metadata"]["passage_id"]
    return [
        request.row(
            id=f"{story}-{question['question_number']}",
            question=question["question_text"].strip(),
            answers=[response["response_text"].strip() for response in question["responses"]],
            docs=[Document(pid=story, title="", text=record["document"].strip())],
            gold_pids=[story],
            cluster=story,
            source=source.identity,
        )
        for question in record["questions"]
    ]
