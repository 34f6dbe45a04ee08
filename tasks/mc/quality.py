"""Rows of `lc_quality_mc`: QuALITY questions on whole stories, four options scored by log-likelihood of their text."""

from lceval.core.errors import UserError
from lceval.tasks.prompts import LETTERS
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, by_key, joint_identity, read_sources

STORIES = "quality/stories.jsonl"
QUESTIONS = "quality/questions.jsonl"


def rows(request: Request) -> RowPlan:
    """One row per question, grouped by story."""
    stories, questions = read_sources(
        request.task,
        {
            STORIES: {"doc_id": str, "text": str},
            QUESTIONS: {"id": str, "doc_id": str, "question": str, "choices": list, "answer": str},
        },
    )
    return RowPlan({"source": joint_identity([stories, questions])}, lambda: _build(request, stories, questions))


def _build(request: Request, stories: SourceFile, questions: SourceFile) -> list[Row]:
    texts = {story: record["text"].strip() for story, record in by_key(stories, "doc_id").items()}
    built_rows: list[Row] = []
    for record in by_key(questions, "id").values():
        story, choices = record["doc_id"], record["choices"]
        if story not in texts:
            raise UserError(f"{QUESTIONS}: unknown doc_id={story!r}: not in {STORIES}.")
        if len(choices) != len(LETTERS) or record["answer"] not in list(LETTERS):
            raise UserError(f"{QUESTIONS} id={record['id']!r}: expected four choices and an answer A, B, C or D.")
        gold = LETTERS.index(record["answer"])
        built_rows.append(
            request.row(
                id=record["id"],
                question=record["question"],
                answers=[choices[gold]],
                docs=[Document(pid=story, title="", text=texts[story])],
                gold_pids=[story],
                cluster=story,
                source=joint_identity([stories, questions]),
                choices=choices,
                gold=gold,
            )
        )
    return sorted(built_rows, key=lambda row: row["cluster"])
