"""What a question is shown: everything (`full`), its gold documents, nothing, or what a retriever finds (`rag`).

`rag` retrieves from exactly the documents that `full` would show. Documents are cut into chunks of at most `chunk`
tokens (a shorter one stays whole); the best chunks that fit into `budget` tokens are shown, in the order in which the
full context has them (Yu et al. 2024 found that order to be the better one).

Where contexts are drawn from a pool of passages, `split`, `questions`, `negatives` and `alike` say from which side of
it and how; they are part of the choice because samples of different draws are not comparable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lceval.errors import UserError
from lceval.tasks import prompts
from lceval.tasks.catalogue import CONTEXTS, Task, datasets
from lceval.tasks.rows import Document, Row

if TYPE_CHECKING:
    from lceval.tasks.build import Request

CHUNK_TOKENS = 2048
BUDGET_TOKENS = 4096
POOL_KEYS = ("split", "questions", "negatives", "length_matched")
_MOST_QUESTIONS = 64  # on a context


@dataclass(frozen=True)
class ContextSetting:
    """A context, as `--metadata` names it; its text is part of a row's identity.

    Attributes:
        split: the side of the pool that questions and documents come from, `train` or `test`; empty: all of it.
        questions: on a context; 0: as many as the dataset usually has.
        negatives: what ranks the hard negatives, of RETRIEVERS or `random`; empty: as the dataset usually does.
        alike: whether the other documents are chosen to be as long as the gold ones.
    """

    kind: str = "full"
    retriever: str = ""
    chunk: int = 0
    budget: int = 0
    split: str = ""
    questions: int = 0
    negatives: str = ""
    length_matched: bool = False

    @property
    def needs_meter(self) -> bool:
        """Whether tokens are counted for it."""
        return self.kind == "rag"

    def __str__(self) -> str:
        parts = [f"rag:{self.retriever}:chunk={self.chunk}:budget={self.budget}" if self.kind == "rag" else self.kind]
        parts += [f"{key}={value}" for key in ("split", "questions", "negatives") if (value := getattr(self, key))]
        return ":".join([*parts, *(["length_matched"] if self.length_matched else [])])


def setting(task: Task, metadata: Mapping[str, Any]) -> ContextSetting:
    """What the run's metadata ask for.

    Raises:
        UserError: a context, retriever, size, split or number of questions that the task does not have.
    """
    kind, allowed = metadata.get("context", "full"), task.dataset.contexts
    if kind not in CONTEXTS:
        raise UserError(f"context={kind!r}: expected one of {', '.join(CONTEXTS)}.")
    if kind not in allowed:
        raise UserError(f"{task.name} has no context={kind}: it has {', '.join(allowed)}.")
    pool = _pool(task, metadata)
    if kind != "rag":
        given = [key for key in ("chunk", "budget") if key in metadata]
        if given or ("retriever" in metadata and "rag" in allowed):
            raise UserError(f"{task.name}: {(given or ['retriever'])[0]}= goes with context=rag; here context={kind}.")
        return ContextSetting(kind, **pool)
    retriever = metadata.get("retriever", task.dataset.retrievers[0])
    if retriever not in task.dataset.retrievers:
        raise UserError(f"{task.name} has no retriever={retriever!r}: it has {', '.join(task.dataset.retrievers)}.")
    sizes = {"chunk": metadata.get("chunk", CHUNK_TOKENS), "budget": metadata.get("budget", BUDGET_TOKENS)}
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{task.name} has {key}={value!r}: expected a positive number of tokens.")
    return ContextSetting(kind, retriever, **sizes, **pool)


def _pool(task: Task, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata ask of the pool that contexts are drawn from; what it usually is is left out."""
    dataset = task.dataset
    asked = {key: metadata[key] for key in POOL_KEYS if key in metadata}
    if asked and not dataset.splits:
        having = [name for name, other in datasets().items() if other.splits]
        raise UserError(f"{task.name} has no {next(iter(asked))}=: only {', '.join(having)} are drawn from a pool.")
    if not asked:
        return {}
    usual = {
        "split": "all",
        "questions": dataset.per_context,
        "negatives": dataset.retrievers[0],
        "length_matched": False,
    }
    for key, allowed in (("split", ("all", *dataset.splits)), ("negatives", (*dataset.retrievers, "random"))):
        if key in asked and asked[key] not in allowed:
            raise UserError(f"{task.name} has no {key}={asked[key]!r}: it has {', '.join(allowed)}.")
    questions, length_matched = asked.get("questions", 1), asked.get("length_matched", False)
    if isinstance(questions, bool) or not isinstance(questions, int) or not 1 <= questions <= _MOST_QUESTIONS:
        raise UserError(f"{task.name} has questions={questions!r}: expected a number from 1 to {_MOST_QUESTIONS}.")
    if not isinstance(length_matched, bool):
        raise UserError(f"{task.name} has length_matched={length_matched!r}: expected true or false.")
    return {key: value for key, value in asked.items() if value != usual[key]}


def apply(rows: Sequence[Row], request: "Request", setting: ContextSetting) -> list[Row]:
    """The rows with the documents that the choice shows; they were built with all of theirs."""
    if setting.kind == "full":
        return list(rows)
    if setting.kind == "rag":
        return _retrieved(rows, request, setting)
    return [_shown(row, request, setting, _gold(row) if setting.kind == "gold" else []) for row in rows]


def _gold(row: Row) -> list[Document]:
    return [document for document in row["docs"] if document["pid"] in row["gold_pids"]]


def _shown(row: Row, request: "Request", setting: ContextSetting, docs: Sequence[Document]) -> Row:
    """The row with other documents; its length is measured anew."""
    layout = request.dataset.layout
    made: Row = {
        **row,
        "context_setting": str(setting),
        "docs": list(docs),
        "context": prompts.block(layout, [document["text"] for document in docs]),
        "instruction": row["instruction"] if docs else prompts.instruction("none", request.output_format),
        "length_tokens": None,
    }
    return made


def _retrieved(rows: Sequence[Row], request: "Request", setting: ContextSetting) -> list[Row]:
    from lceval.tasks.retrieval import Collection, chunked

    assert request.meter is not None
    made: list[Row] = []
    collections: dict[str, tuple[Sequence[Document], Collection, list[int]]] = {}
    for row in rows:
        known = collections.get(row["cluster"])
        if known is None or known[0] != row["docs"]:
            chunks = chunked(row["docs"], setting.chunk, request.meter)
            costs = request.meter.pieces([chunk.text for chunk in chunks])
            known = row["docs"], Collection(chunks, setting.retriever), costs
            collections = {row["cluster"]: known}  # the questions on a context stand together
        _, collection, costs = known
        chosen, left = [], setting.budget
        for index in collection.ranked(row["question"]):
            if costs[index] <= left:
                chosen.append(index)
                left -= costs[index]
        chunks = [collection.chunks[index] for index in sorted(chosen)]
        docs = [Document(pid=chunk.pid, title=chunk.title, text=chunk.text) for chunk in chunks]
        made.append(_shown(row, request, setting, docs))
    return made
