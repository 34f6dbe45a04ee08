"""Reduce rows with full contexts to the documents of a context setting."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

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
    from lceval.tasks.retrievers import chunked, order_by

    assert request.meter is not None
    retrieved: list[Row] = []
    # Rows of one context are adjacent.
    for _, context_rows in groupby(rows, key=itemgetter("cluster", "docs")):
        context = list(context_rows)
        chunks = chunked(context[0]["docs"], setting.chunk, request.meter)
        texts = [chunk["text"] for chunk in chunks]
        costs, ranked = request.meter.pieces(texts), order_by(setting.retriever, texts)
        budget = setting.budget if setting.budget >= 1 else int(setting.budget * sum(costs))
        for row in context:
            chosen, budget_left = [], budget
            for index in ranked(row["question"]):
                if costs[index] <= budget_left:
                    chosen.append(index)
                    budget_left -= costs[index]
            retrieved.append(_with_docs(row, request, setting, [chunks[index] for index in sorted(chosen)]))
    return retrieved
