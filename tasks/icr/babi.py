"""Rows of `lc_babi_*`: the facts of a bAbI story scattered over real text (after BABILong, Kuratov et al. 2024).

The facts keep their order, on which the answers depend, at random positions of the text. Paragraphs that mention a
person of the facts or an answer are removed from the text. A story has several questions, each with its own context;
they form one cluster.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.catalogue import find
from lceval.tasks.icr.haystack import SCHEMA, STORIES, Haystack, depth_of, unable
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, joint_identity, read_sources

QUESTION: dict[str, type] = {"facts": list, "question": str, "target": str}  # and `supporting`, validated by `checked`


def rows(request: Request) -> RowPlan:
    """`options.questions` questions of bAbI task qa1, qa2 or qa3 (one, two or three supporting facts), by mode."""
    name = f"babi/{find(request.task).mode}_test.jsonl"
    stories, questions = read_sources(request.task, {STORIES: SCHEMA, name: QUESTION})
    for number, record in enumerate(questions.records, start=1):
        checked(record, f"{name} record {number}")
    return RowPlan({"source": joint_identity([stories, questions])}, lambda: _build(request, stories, questions))


def checked(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Validate the indices of the supporting facts.

    Raises:
        UserError: `supporting` is not a list of indices of the facts.
    """
    supporting, count = record.get("supporting"), len(record["facts"])
    integers = isinstance(supporting, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in supporting)
    if not supporting or not integers or not all(0 <= n < count for n in supporting):
        raise UserError(
            f"{where}: invalid supporting={supporting!r:.80}: expected indices of its {count} facts, from 0."
        )
    return record


def _build(request: Request, stories: SourceFile, questions: SourceFile) -> list[Row]:
    haystack = Haystack(request, stories, revealing(questions.records))
    mode = find(request.task).mode
    clusters = story_numbers([record["facts"] for record in questions.records])
    order = list(range(len(questions.records)))
    random.Random(f"babi {mode} {request.seed}").shuffle(order)
    built_rows: list[Row] = []
    for number in order:
        record = questions.records[number]
        rng = random.Random(f"babi {mode} {request.seed} {number}")
        facts = [Document(pid=f"fact-{n}", title="", text=text) for n, text in enumerate(record["facts"])]
        depths = sorted(rng.random() for _ in facts)
        fitted = haystack.context(facts, depths, [record["question"]], rng)
        if fitted is None:
            continue  # the story alone exceeds the length: use the next question
        documents, (total,) = fitted
        pids = [facts[n]["pid"] for n in sorted(set(record["supporting"]))]
        built_rows.append(
            request.row(
                id=f"babi-{mode}-{number:03d}",
                question=record["question"],
                answers=[record["target"]],
                docs=documents,
                gold_pids=pids,
                cluster=f"babi-{mode}-story-{clusters[number]:03d}",
                source=joint_identity([stories, questions]),
                length_tokens=total,
                depth=depth_of(request.dataset.layout, documents, pids),
            )
        )
        if len(built_rows) == request.dataset.options["questions"]:
            break
    if not built_rows:
        raise unable(request, f"any story of {questions.name}")
    return built_rows


def revealing(records: Sequence[dict[str, Any]]) -> re.Pattern[str]:
    """Pattern of text that could bear on a question: a person of the facts, or an answer, also as part of a word."""
    people = {fact.split()[0] for record in records for fact in record["facts"] if fact.split()}
    answers = {record["target"] for record in records}
    words = [rf"\b{re.escape(name)}\b" for name in sorted(people)] + [re.escape(answer) for answer in sorted(answers)]
    return re.compile("|".join(words), re.IGNORECASE)


def story_numbers(facts: Sequence[Sequence[str]]) -> list[int]:
    """Story number of each list of facts; consecutive lists of a story extend the previous list."""
    numbers: list[int] = []
    for index, current in enumerate(facts):
        continues = index > 0 and list(current[: len(facts[index - 1])]) == list(facts[index - 1])
        numbers.append(numbers[-1] if continues else (numbers[-1] + 1 if numbers else 0))
    return numbers
