"""Rows of `lc_squality_sum`: questions about a story that a summary answers, with four references each."""

from collections.abc import Mapping
from typing import Any

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, read_sources


def rows(request: Request) -> Plan:
    """One row a question, the questions of a story together."""
    (file,) = request.dataset.files
    (source,) = read_sources(request.task, {file: {"document": str}})

    def build() -> list[Row]:
        made: list[Row] = []
        for number, record in enumerate(source.records, start=1):
            try:
                made += _rows(request, source, record)
            except (KeyError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{file} record {number} is no SQuALITY story ({reason:.80}).") from error
        if bare := [row["id"] for row in made if not any(row["answers"])]:
            raise UserError(f"{file} has no reference summary for {bare[0]}: expected one or more.")
        if len({row["id"] for row in made}) < len(made):
            raise UserError(f"{file} has a story or a question twice: each must be unique.")
        return made

    return Plan({"source": source.identity}, build)


def _rows(request: Request, source: SourceFile, record: Mapping[str, Any]) -> list[Row]:
    story = record["metadata"]["passage_id"]
    return [
        request.row(
            id=f"{story}-{asked['question_number']}",
            question=asked["question_text"].strip(),
            answers=[response["response_text"].strip() for response in asked["responses"]],
            docs=[Document(pid=story, title="", text=record["document"].strip())],
            gold_pids=[story],
            cluster=story,
            source=source.identity,
        )
        for asked in record["questions"]
    ]
