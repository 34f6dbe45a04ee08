"""Where passage pools come from: jsonl files of a data folder, or question sets on the hub turned into such a pool."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lceval.tasks.build import Request
from lceval.tasks.sources import SourceFile, data_folder, read_hub, read_sources

QUESTION: dict[str, type] = {"question": str, "answers": list, "gold_pids": list}
PASSAGE: dict[str, type] = {"pid": str, "title": str, "text": str}


def read_pool(request: Request) -> tuple[SourceFile, SourceFile, list[SourceFile]]:
    """Questions, their passages, and further passages to fill contexts with.

    The files of the data folder win; where they are not there and the dataset is on the hub too, the questions and
    their passages come from there, and there is no further filling.

    Raises:
        UserError: neither is at hand, or damaged data.
    """
    dataset = request.dataset
    questions, passages, *fill = dataset.files
    folder = data_folder()
    local = folder is not None and (folder / questions).is_file()
    if local or dataset.hub is None:
        schemas: dict[str, dict[str, type]] = {questions: QUESTION, passages: PASSAGE, **dict.fromkeys(fill, PASSAGE)}
        asked, told, *more = read_sources(request.task, schemas)
        return asked, told, more
    convert, fields = _CONVERTERS[dataset.dataset]
    found = read_hub(request.task, dataset.hub, "validation", fields)
    pool = _Flat()
    for record in found.records:
        convert(record, pool)
    made = [SourceFile(f"{found.name} {part}", list(records), found.sha256) for part, records in pool.parts.items()]
    return made[0], made[1], []


@dataclass
class _Flat:
    """Questions that point into passages, each passage once."""

    questions: list[dict[str, Any]] = field(default_factory=list)
    passages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Sequence[dict[str, Any]]]:
        return {"questions": self.questions, "passages": [*self.passages.values()]}

    def add(self, title: str, text: str) -> str:
        """The id of a passage, which follows from its words."""
        pid = hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:12]
        self.passages.setdefault(pid, {"pid": pid, "title": title, "text": text})
        return pid

    def ask(self, question: str, answers: Sequence[str], gold: Sequence[str], wrong: Sequence[str] = ()) -> None:
        self.questions.append(
            {"question": question, "answers": [*answers], "gold_pids": [*gold], "distractor_pids": [*wrong]}
        )


def _squad(record: Mapping[str, Any], pool: _Flat) -> None:
    answers = [*dict.fromkeys(record["answers"]["text"])]
    pool.ask(record["question"], answers, [pool.add(record["title"], record["context"])])


def _hotpotpool(record: Mapping[str, Any], pool: _Flat) -> None:
    titles, sentences = record["context"]["title"], record["context"]["sentences"]
    named = set(record["supporting_facts"]["title"])
    pids = {title: pool.add(title, "".join(parts)) for title, parts in zip(titles, sentences, strict=True)}
    gold = [pid for title, pid in pids.items() if title in named]
    pool.ask(record["question"], [record["answer"]], gold, [pid for pid in pids.values() if pid not in gold])


def _musique(record: Mapping[str, Any], pool: _Flat) -> None:
    pids = [(pool.add(part["title"], part["paragraph_text"]), part["is_supporting"]) for part in record["paragraphs"]]
    gold = [pid for pid, supports in pids if supports]
    answers = [record["answer"], *record.get("answer_aliases", [])]
    pool.ask(record["question"], answers, gold, [pid for pid, supports in pids if not supports])


_CONVERTERS: dict[str, tuple[Callable[[Mapping[str, Any], _Flat], None], dict[str, type]]] = {
    "squad": (_squad, {"question": str, "title": str, "context": str, "answers": object}),
    "hotpotpool": (_hotpotpool, {"question": str, "answer": str, "context": object, "supporting_facts": object}),
    "musique": (_musique, {"question": str, "answer": str, "paragraphs": object}),
}
