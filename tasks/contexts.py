"""What a question is shown: everything (`full`), its gold documents, nothing, or what a retriever finds (`rag`).

`rag` retrieves from exactly the documents that `full` would show. Documents are cut into chunks of at most `chunk`
tokens (a shorter one stays whole); the best chunks that fit into `budget` tokens are shown, in the order in which the
full context has them (Yu et al. 2024 found that order to be the better one).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lceval.errors import UserError
from lceval.tasks import prompts
from lceval.tasks.catalogue import CONTEXTS, Task
from lceval.tasks.rows import Document, Row

if TYPE_CHECKING:
    from lceval.tasks.build import Request

CHUNK_TOKENS = 2048
BUDGET_TOKENS = 4096


@dataclass(frozen=True)
class Choice:
    """A context, as `--metadata` names it; its text is part of a row's identity."""

    kind: str = "full"
    retriever: str = ""
    chunk: int = 0
    budget: int = 0

    @property
    def needs_meter(self) -> bool:
        """Whether tokens are counted for it."""
        return self.kind == "rag"

    def __str__(self) -> str:
        return f"rag:{self.retriever}:chunk={self.chunk}:budget={self.budget}" if self.kind == "rag" else self.kind


def choice(task: Task, metadata: Mapping[str, Any]) -> Choice:
    """What the run's metadata ask for.

    Raises:
        UserError: a context, retriever or size that the task does not have.
    """
    kind, allowed = metadata.get("context", "full"), task.dataset.contexts
    if kind not in CONTEXTS:
        raise UserError(f"context={kind!r}: expected one of {', '.join(CONTEXTS)}.")
    if kind not in allowed:
        raise UserError(f"{task.name} has no context={kind}: it has {', '.join(allowed)}.")
    if kind != "rag":
        given = [key for key in ("chunk", "budget") if key in metadata]
        if given or ("retriever" in metadata and "rag" in allowed):
            raise UserError(f"{task.name}: {(given or ['retriever'])[0]}= goes with context=rag; here context={kind}.")
        return Choice(kind)
    retriever = metadata.get("retriever", task.dataset.retrievers[0])
    if retriever not in task.dataset.retrievers:
        raise UserError(f"{task.name} has no retriever={retriever!r}: it has {', '.join(task.dataset.retrievers)}.")
    sizes = {"chunk": metadata.get("chunk", CHUNK_TOKENS), "budget": metadata.get("budget", BUDGET_TOKENS)}
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{task.name} has {key}={value!r}: expected a positive number of tokens.")
    return Choice(kind, retriever, **sizes)


def apply(rows: Sequence[Row], request: "Request", choice: Choice) -> list[Row]:
    """The rows with the documents that the choice shows; they were built with all of theirs."""
    if choice.kind == "full":
        return list(rows)
    if choice.kind == "rag":
        return _retrieved(rows, request, choice)
    return [_shown(row, request, choice, _gold(row) if choice.kind == "gold" else []) for row in rows]


def _gold(row: Row) -> list[Document]:
    return [document for document in row["docs"] if document["pid"] in row["gold_pids"]]


def _shown(row: Row, request: "Request", choice: Choice, docs: Sequence[Document]) -> Row:
    """The row with other documents; its length is measured anew."""
    layout = request.dataset.layout
    made: Row = {
        **row,
        "shown": str(choice),
        "docs": list(docs),
        "context": prompts.block(layout, [document["text"] for document in docs]),
        "instruction": row["instruction"] if docs else prompts.instruction("none", request.form),
        "length_tokens": None,
    }
    return made


def _retrieved(rows: Sequence[Row], request: "Request", choice: Choice) -> list[Row]:
    from lceval.tasks.retrieval import Collection, chunked

    assert request.meter is not None
    made: list[Row] = []
    collections: dict[str, tuple[Sequence[Document], Collection, list[int]]] = {}
    for row in rows:
        known = collections.get(row["cluster"])
        if known is None or known[0] != row["docs"]:
            chunks = chunked(row["docs"], choice.chunk, request.meter)
            costs = request.meter.pieces([chunk.text for chunk in chunks])
            known = row["docs"], Collection(chunks, choice.retriever), costs
            collections = {row["cluster"]: known}  # the questions on a context stand together
        _, collection, costs = known
        chosen, left = [], choice.budget
        for index in collection.ranked(row["question"]):
            if costs[index] <= left:
                chosen.append(index)
                left -= costs[index]
        chunks = [collection.chunks[index] for index in sorted(chosen)]
        docs = [Document(pid=chunk.pid, title=chunk.title, text=chunk.text) for chunk in chunks]
        made.append(_shown(row, request, choice, docs))
    return made
