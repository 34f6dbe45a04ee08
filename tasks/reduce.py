"""Reduce rows with full contexts to the documents of a context setting."""

from collections.abc import Sequence

from lceval.tasks import prompts
from lceval.tasks.contexts import ContextSetting
from lceval.tasks.request import Request
from lceval.tasks.rows import Document, Row


def apply(rows: Sequence[Row], request: Request, setting: ContextSetting) -> list[Row]:
    """Reduce rows built with full contexts to the documents of the setting."""
    if setting.kind == "full":
        return list(rows)
    if setting.kind == "rag":
        return _retrieved(rows, request, setting)
    return [_with_docs(row, request, setting, _gold(row) if setting.kind == "gold" else []) for row in rows]


def _gold(row: Row) -> list[Document]:
    return [document for document in row["docs"] if document["pid"] in row["gold_pids"]]


def _with_docs(row: Row, request: Request, setting: ContextSetting, docs: Sequence[Document]) -> Row:
    """Return the row with other documents; its length is measured again."""
    layout = request.dataset.layout
    return {
        **row,
        "context_setting": str(setting),
        "docs": list(docs),
        "context": prompts.block(layout, [document["text"] for document in docs]),
        "instruction": row["instruction"] if docs else prompts.instruction("none", request.output_format),
        "length_tokens": None,
    }


def _retrieved(rows: Sequence[Row], request: Request, setting: ContextSetting) -> list[Row]:
    from lceval.tasks.retrievers import Collection, chunked

    assert request.meter is not None
    retrieved: list[Row] = []
    collections: dict[str, tuple[Sequence[Document], Collection, list[int]]] = {}
    for row in rows:
        cached = collections.get(row["cluster"])
        if cached is None or cached[0] != row["docs"]:
            chunks = chunked(row["docs"], setting.chunk, request.meter)
            costs = request.meter.pieces([chunk.text for chunk in chunks])
            cached = row["docs"], Collection(chunks, setting.retriever), costs
            collections = {row["cluster"]: cached}  # rows of one context are adjacent
        _, collection, costs = cached
        chosen, budget_left = [], setting.budget
        for index in collection.ranked(row["question"]):
            if costs[index] <= budget_left:
                chosen.append(index)
                budget_left -= costs[index]
        chunks = [collection.chunks[index] for index in sorted(chosen)]
        docs = [Document(pid=chunk.pid, title=chunk.title, text=chunk.text) for chunk in chunks]
        retrieved.append(_with_docs(row, request, setting, docs))
    return retrieved
