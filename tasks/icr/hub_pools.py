"""Sources of passage pools: jsonl files of a data folder, or QA datasets of the hub converted to a pool."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lceval.tasks.request import Request
from lceval.tasks.rows import content_id
from lceval.tasks.sources import SourceFile, data_folder, read_hub, read_sources

QUESTION: dict[str, type] = {"question": str, "answers": list, "gold_pids": list}
PASSAGE: dict[str, type] = {"pid": str, "title": str, "text": str}


def read_pool(request: Request) -> tuple[SourceFile, list[SourceFile]]:
    """Questions, and the pools of passages: those of the questions, then further passages as filler.

    Files of the data folder take precedence. Without them, questions and passages are loaded from the hub, without
    further filler.

    Raises:
        UserError: neither source can be read, or invalid data.
    """
    dataset = request.dataset
    questions, passages, *fill = dataset.files
    folder = data_folder()
    local = folder is not None and (folder / questions).is_file()
    if local or dataset.hub is None:
        schemas: dict[str, dict[str, type]] = {questions: QUESTION, passages: PASSAGE, **dict.fromkeys(fill, PASSAGE)}
        question_file, *pools = read_sources(request.task, schemas)
        return question_file, pools
    convert, fields = _CONVERTERS[dataset.dataset]
    source = read_hub(request.task, dataset.hub, "validation", fields)
    pool = _PoolBuilder()
    for record in source.records:
        convert(record, pool)
    return (
        SourceFile(f"{source.name} questions", pool.questions, source.sha256),
        [SourceFile(f"{source.name} passages", [*pool.passages.values()], source.sha256)],
    )


@dataclass
class _PoolBuilder:
    """Collects questions and their unique passages."""

    questions: list[dict[str, Any]] = field(default_factory=list)
    passages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_passage(self, title: str, text: str) -> str:
        """Add a passage and return its id, a hash of its content."""
        pid = content_id(f"{title}\n{text}")
        self.passages.setdefault(pid, {"pid": pid, "title": title, "text": text})
        return pid

    def add_question(
        self, question: str, answers: Sequence[str], gold: Sequence[str], distractors: Sequence[str] = ()
    ) -> None:
        self.questions.append(
            {"question": question, "answers": [*answers], "gold_pids": [*gold], "distractor_pids": [*distractors]}
        )


def _squad(record: Mapping[str, Any], pool: _PoolBuilder) -> None:
    answers = [*dict.fromkeys(record["answers"]["text"])]
    pool.add_question(record["question"], answers, [pool.add_passage(record["title"], record["context"])])


def _hotpotpool(record: Mapping[str, Any], pool: _PoolBuilder) -> None:
    titles, sentences = record["context"]["title"], record["context"]["sentences"]
    gold_titles = set(record["supporting_facts"]["title"])
    pids = {title: pool.add_passage(title, "".join(parts)) for title, parts in zip(titles, sentences, strict=True)}
    gold = [pid for title, pid in pids.items() if title in gold_titles]
    pool.add_question(record["question"], [record["answer"]], gold, [pid for pid in pids.values() if pid not in gold])


def _musique(record: Mapping[str, Any], pool: _PoolBuilder) -> None:
    pids = [
        (pool.add_passage(part["title"], part["paragraph_text"]), part["is_supporting"])
        for part in record["paragraphs"]
    ]
    gold = [pid for pid, supports in pids if supports]
    answers = [record["answer"], *record.get("answer_aliases", [])]
    pool.add_question(record["question"], answers, gold, [pid for pid, supports in pids if not supports])


_CONVERTERS: dict[str, tuple[Callable[[Mapping[str, Any], _PoolBuilder], None], dict[str, type]]] = {
    "squad": (_squad, {"question": str, "title": str, "context": str, "answers": object}),
    "hotpotpool": (_hotpotpool, {"question": str, "answer": str, "context": object, "supporting_facts": object}),
    "musique": (_musique, {"question": str, "answer": str, "paragraphs": object}),
}
