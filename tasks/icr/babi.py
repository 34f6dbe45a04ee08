"""Rows of `lc_babi_*`: the facts of a bAbI story scattered over real text (after BABILong, Kuratov et al. 2024).

The facts keep their order, which is what the questions are about, and stand at random places of the text. The text has
no sentence with a person of the facts or with a word that is an answer. A story asks several questions as it goes on,
so its questions are one cluster though each has a context of its own.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.catalogue import find
from lceval.tasks.icr.haystack import SCHEMA, STORIES, Haystack, depth_of, unable
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, joint_identity, read_sources

QUESTION: dict[str, type] = {"facts": list, "question": str, "target": str}  # and `supporting`, which `checked` checks


def rows(request: Request) -> Plan:
    """The questions of the mode's task (qa1: one supporting fact, qa2: two, qa3: three), as many as the options say."""
    name = f"babi/{find(request.task).mode}_test.jsonl"
    stories, questions = read_sources(request.task, {STORIES: SCHEMA, name: QUESTION})
    for number, record in enumerate(questions.records, start=1):
        checked(record, f"{name} record {number}")
    return Plan({"source": joint_identity([stories, questions])}, lambda: _build(request, stories, questions))


def checked(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A record whose supporting facts are numbers of its facts.

    Raises:
        UserError: They are not.
    """
    said, count = record.get("supporting"), len(record["facts"])
    numbers = isinstance(said, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in said)
    if not said or not numbers or not all(0 <= n < count for n in said):
        raise UserError(f"{where} has supporting={said!r:.80}: expected numbers of its {count} facts, from 0.")
    return record


def _build(request: Request, stories: SourceFile, questions: SourceFile) -> list[Row]:
    haystack = Haystack(request, stories, telling(questions.records))
    mode = find(request.task).mode
    clusters = story_numbers([record["facts"] for record in questions.records])
    order = list(range(len(questions.records)))
    random.Random(f"babi {mode} {request.seed}").shuffle(order)
    made: list[Row] = []
    for number in order:
        record = questions.records[number]
        rng = random.Random(f"babi {mode} {request.seed} {number}")
        facts = [Document(pid=f"fact-{n}", title="", text=text) for n, text in enumerate(record["facts"])]
        depths = sorted(rng.random() for _ in facts)
        fitted = haystack.context(facts, depths, [record["question"]], rng)
        if fitted is None:
            continue  # its story alone is longer than the task: another question takes its place
        documents, (total,) = fitted
        pids = [facts[n]["pid"] for n in sorted(set(record["supporting"]))]
        made.append(
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
        if len(made) == request.dataset.options["questions"]:
            break
    if not made:
        raise unable(request, f"any story of {questions.name}")
    return made


def telling(records: Sequence[dict[str, Any]]) -> re.Pattern[str]:
    """Matches text that may say something about a question: a person of the facts, or an answer, also inside a word."""
    people = {fact.split()[0] for record in records for fact in record["facts"] if fact.split()}
    answers = {record["target"] for record in records}
    words = [rf"\b{re.escape(name)}\b" for name in sorted(people)] + [re.escape(answer) for answer in sorted(answers)]
    return re.compile("|".join(words), re.IGNORECASE)


def story_numbers(facts: Sequence[Sequence[str]]) -> list[int]:
    """For each list of facts the number of its story: the next list of a story begins with all facts of the last."""
    numbers: list[int] = []
    for place, own in enumerate(facts):
        goes_on = place > 0 and list(own[: len(facts[place - 1])]) == list(facts[place - 1])
        numbers.append(numbers[-1] if goes_on else (numbers[-1] + 1 if numbers else 0))
    return numbers
