"""Rows of `lc_quality_mc`: QuALITY questions on whole stories, four options scored as text."""

from typing import TYPE_CHECKING, Any

from lceval.errors import UserError
from lceval.tasks.prompts import ANSWER_PREFIX, multiple_choice
from lceval.tasks.rows import Document, Row, as_dataset, cached_rows
from lceval.tasks.sources import SourceFile, by_key, joint_identity, read_sources
from lceval.tasks.tokens import TokenMeter, meter_for, names_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

TASK = "lc_quality_mc"
STORIES = "quality/stories.jsonl"
QUESTIONS = "quality/questions.jsonl"
LICENCE = "CC BY 4.0"
LETTERS = "ABCD"


def dataset(**metadata: Any) -> "dict[str, Dataset]":
    """lm-eval's `custom_dataset` of `lc_quality_mc`.

    Args:
        **metadata: model_args and metadata of the run; names the tokenizer, which only `length_tokens`
            needs (the stories fix the length).

    Raises:
        UserError: No data folder or damaged data.
    """
    stories, questions = read_sources(
        TASK,
        {
            STORIES: {"doc_id": str, "text": str},
            QUESTIONS: {"id": str, "doc_id": str, "question": str, "choices": list, "answer": str},
        },
    )
    meter = meter_for(TASK, metadata) if names_tokenizer(metadata) else None
    inputs = {
        "source": joint_identity([stories, questions]),
        "tokenizer": meter.fingerprint if meter is not None else None,
    }
    return as_dataset(cached_rows(TASK, inputs, lambda: build_rows(stories, questions, meter)))


def build_rows(stories: SourceFile, questions: SourceFile, meter: TokenMeter | None) -> list[Row]:
    """One row a question, the questions of a story together; `length_tokens` is None without a meter."""
    texts = {story: record["text"].strip() for story, record in by_key(stories, "doc_id").items()}
    source = joint_identity([stories, questions])
    rows: list[Row] = []
    for record in by_key(questions, "id").values():
        story, choices = record["doc_id"], record["choices"]
        if story not in texts:
            raise UserError(f"{QUESTIONS} has doc_id={story!r} that {STORIES} does not have.")
        if len(choices) != len(LETTERS) or record["answer"] not in list(LETTERS):
            raise UserError(f"{QUESTIONS} id={record['id']!r}: expected four choices and an answer A, B, C or D.")
        gold = LETTERS.index(record["answer"])
        rows.append(
            Row(
                id=record["id"],
                question=record["question"],
                answers=[choices[gold]],
                docs=[Document(pid=story, title="", text=texts[story])],
                gold_pids=[story],
                cluster=story,
                length_tokens=None,
                source=source,
                licence=LICENCE,
                context=texts[story],
                choices=choices,
                gold=gold,
            )
        )
    rows.sort(key=lambda row: row["cluster"])
    if meter is not None:
        _measure(rows, meter)
    return rows


def _measure(rows: list[Row], meter: TokenMeter) -> None:
    """Set `length_tokens`: the rendered prompt and the longest option."""
    prompts = meter.prompts([multiple_choice(row) for row in rows], ANSWER_PREFIX)
    for row, prompt in zip(rows, prompts, strict=True):
        row["length_tokens"] = prompt + max(meter.pieces([f" {choice}" for choice in row["choices"]]))
