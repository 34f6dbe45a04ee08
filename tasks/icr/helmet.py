"""Rows of HELMET's RAG files (Yen et al. 2024): nq, triviaqa, hotpotqa, popqa, on passages retrieved for each question.

A file has K passages per question, and each question several times with its gold passages at different depths. HELMET
chose K for one tokenizer and a two-shot prompt with titles; here `Nk` is N*1024 tokens of the model, within 2%. The
passages of a row are therefore those of the file in order, truncated at the end to the length (the last few selected
to fill it), with each gold passage at its depth in the file. A question with too few passages is taken from the file
of the next larger K; if that has too few as well, the question is skipped.

The prompt is ours, after the paper (zero-shot, `[DOC i]`, no titles), not HELMET's: scores are not comparable.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.compose import Contract, Fitter
from lceval.tasks.icr.helmet_files import QuestionFile, located, passages
from lceval.tasks.prompts import block
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row

_MOST_QUESTIONS = {64: 50, 128: 25}  # by length in K: a row of 128k tokens is a megabyte
_USUAL_QUESTIONS = 100
_WORD = "Then"
_LAST = 5  # maximum number of final passages selected jointly
_WINDOW = 14  # candidates for the final passages


def rows(request: Request) -> RowPlan:
    """All depths of 100 questions (50 at 64k, 25 at 128k) drawn by the seed alone."""
    _, limit = request.meter_and_limit
    hub = request.dataset.hub
    assert hub is not None, request.task
    names = [*hub.files.values()][request.dataset.lengths.index(limit // 1024) :][:2]
    files = [QuestionFile(located(request, hub, name), f"{hub.repo}/{name}") for name in names]
    return RowPlan({"source": ", ".join(file.identity for file in files)}, lambda: _build(request, files))


def _build(request: Request, files: Sequence[QuestionFile]) -> list[Row]:
    meter, limit = request.meter_and_limit
    name = request.dataset.dataset
    offsets = [files[0].offsets()]
    ranked = sorted(offsets[0], key=lambda key: hashlib.sha256(f"{name} {request.seed} {key}".encode()).digest())
    fitter = Fitter.preferred(limit, meter)
    built_rows: list[Row] = []
    questions_done = 0
    for key in ranked:
        for number, file in enumerate(files):
            if number == len(offsets):
                offsets.append(file.offsets())
            records = file.records(offsets[number].get(key, ()))
            question_rows = _rows_of(request, key, records, fitter, file)
            if question_rows:
                built_rows += question_rows
                questions_done += 1
                break
        if questions_done == _MOST_QUESTIONS.get(limit // 1024, _USUAL_QUESTIONS):
            break
    if not built_rows:
        raise UserError(
            f"{request.task}: no question has passages of {limit} tokens of this tokenizer, within 2%, in "
            f"{' or '.join(file.name for file in files)}: choose another length."
        )
    if not any(row["gold_pids"] for row in built_rows):
        raise UserError(f"{request.task}: no gold id of {files[0].name} is among its ctxs: invalid file.")
    return built_rows


def _rows_of(
    request: Request, key: str, records: Iterator[dict[str, Any]], fitter: Fitter, file: QuestionFile
) -> list[Row]:
    """Rows of a question, one per depth; empty if one of them has too few passages."""
    short = hashlib.sha256(key.encode()).hexdigest()[:10]
    costs: dict[str, int] = {}
    question_rows: list[Row] = []
    for depth, record in enumerate(records):
        documents, gold = passages(record)
        _measure(request, documents, costs)
        fitted = fit(request, documents, gold, record["question"].strip(), costs, fitter)
        if fitted is None:
            return []
        arranged, (total,) = fitted
        question_rows.append(
            request.row(
                id=f"{request.dataset.dataset}-{short}-{depth}",
                question=record["question"].strip(),
                answers=record["answers"],
                docs=arranged,
                gold_pids=gold,
                cluster=f"{request.dataset.dataset}-{short}",
                source=file.identity,
                length_tokens=total,
            )
        )
    return question_rows


def _measure(request: Request, documents: Sequence[Document], costs: dict[str, int]) -> None:
    """Add the token counts of new passages; a word is appended, as another document follows in the prompt."""
    meter, _ = request.meter_and_limit
    new = [document for document in documents if document["pid"] not in costs]
    texts = [f"{block(request.dataset.layout, [document['text']])}\n\n{_WORD}" for document in new]
    *counts, word = meter.pieces([*texts, _WORD])
    costs.update({document["pid"]: count - word for document, count in zip(new, counts, strict=True)})


def fit(
    request: Request,
    documents: Sequence[Document],
    gold: Sequence[str],
    question: str,
    costs: Mapping[str, int],
    fitter: Fitter,
) -> tuple[list[Document], list[int]] | None:
    """Documents of the context and its total; None if the length cannot be met."""
    others = [document for document in documents if document["pid"] not in gold]

    def arranged(chosen: Sequence[int]) -> tuple[list[Document], list[int]]:
        docs = arrange(documents, gold, [others[index]["pid"] for index in chosen])
        return docs, request.totals(docs, [question])

    estimates = [costs[document["pid"]] for document in others]
    limit = request.meter_and_limit[1]
    if sum(estimates) < limit and max(arranged(range(len(others)))[1]) < Contract.guaranteed(limit).floor:
        return None
    return fitter.fit(estimates, arranged, packed)


def arrange(documents: Sequence[Document], gold: Sequence[str], kept: Sequence[str]) -> list[Document]:
    """Gold and kept documents in order; the share of other documents before each gold document is preserved."""
    golds, others = set(gold), set(kept)
    arranged = [document for document in documents if document["pid"] in others]
    others_before = inserted = 0
    for document in documents:
        if document["pid"] in golds:
            position = round(others_before * len(others) / max(len(documents) - len(golds), 1))
            arranged.insert(position + inserted, document)
            inserted += 1
        else:
            others_before += 1
    return arranged


def packed(capacity: int, costs: Sequence[int]) -> list[int]:
    """Select candidates in order, then the combination of the next candidates that best fills the remainder.

    Passages have similar lengths, so a single last passage could leave up to its length unfilled; four or five of a
    dozen usually fill it to a few tokens.
    """
    if sum(costs) <= capacity:
        return [*range(len(costs))]
    reserve, remaining = 4 * median(costs), max(capacity, 0)
    chosen: list[int] = []
    for index, cost in enumerate(costs):
        if remaining - cost < reserve:
            break
        chosen.append(index)
        remaining -= cost
    window = range(len(chosen), min(len(chosen) + _WINDOW, len(costs)))
    best, filled = tuple[int, ...](), 0
    for size in range(1, _LAST + 1):
        for candidate in combinations(window, size):
            if filled < (total := sum(map(costs.__getitem__, candidate))) <= remaining:
                best, filled = candidate, total
    return [*chosen, *best]
