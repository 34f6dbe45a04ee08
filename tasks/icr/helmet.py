"""Rows of HELMET's RAG files (Yen et al. 2024): nq, triviaqa, hotpotqa, popqa, on passages retrieved for each question.

A file holds K passages a question, and each question several times with its gold passages at another depth. K was
chosen for one tokenizer and a prompt with examples and titles; `Nk` here is N*1024 tokens of the model and within 2% of
it, so the passages of a row are those of the file in their order, less as many from the end as do not fit (the last few
chosen to fill the length), with each gold passage at the depth it has in the file. A question whose passages come to
less is taken from the file of the next longer K, and where that has too few as well another question takes its place.

The prompt is ours after the paper (zero-shot, `[DOC i]`, no titles), not HELMET's (two-shot, with titles): scores are
not comparable between the two.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.compose import Contract, Fitter
from lceval.tasks.icr.helmet_files import Pool, located, passages
from lceval.tasks.prompts import block
from lceval.tasks.rows import Document, Row

_MOST_QUESTIONS = {64: 50, 128: 25}  # by length in K: a row of 128k tokens is a megabyte
_USUAL_QUESTIONS = 100
_WORD = "Then"
_LAST = 5  # passages at the end that are chosen together
_WINDOW = 14  # of how many


def rows(request: Request) -> Plan:
    """Every depth of 100 questions (50 at 64k, 25 at 128k), which depend on the seed alone."""
    _, limit = request.fitted
    hub = request.dataset.hub
    assert hub is not None, request.task
    names = [*hub.files.values()][request.dataset.lengths.index(limit // 1024) :][:2]
    pools = [Pool(located(request, hub, name), f"{hub.repo}/{name}") for name in names]
    return Plan({"source": ", ".join(pool.identity for pool in pools)}, lambda: _build(request, pools))


def _build(request: Request, pools: Sequence[Pool]) -> list[Row]:
    meter, limit = request.fitted
    name = request.dataset.dataset
    places = [pools[0].places()]
    ranked = sorted(places[0], key=lambda key: hashlib.sha256(f"{name} {request.seed} {key}".encode()).digest())
    # Without room for the chat template too, what the name promises is kept with it.
    fitters = [Fitter(Contract.preferred(limit, meter), packed), Fitter(Contract.promised(limit), packed)]
    made: list[Row] = []
    done = 0
    for key in ranked:
        for number, pool in enumerate(pools):
            if number == len(places):
                places.append(pool.places())
            records = pool.records(places[number].get(key, ()))
            own = _rows_of(request, key, records, fitters, pool)
            if own:
                made += own
                done += 1
                break
        if done == _MOST_QUESTIONS.get(limit // 1024, _USUAL_QUESTIONS):
            break
    if not made:
        raise UserError(
            f"{request.task} has no question whose passages come to {limit} tokens of this tokenizer, within 2%, in "
            f"{' or '.join(pool.name for pool in pools)}: choose another length."
        )
    if not any(row["gold_pids"] for row in made):
        raise UserError(f"{request.task} finds no gold passage among the ctxs of {pools[0].name}: their ids differ.")
    return made


def _rows_of(
    request: Request, key: str, records: Iterator[dict[str, Any]], fitters: Sequence[Fitter], pool: Pool
) -> list[Row]:
    """A question's rows, one a depth; none if its passages are too few for one of them."""
    short = hashlib.sha256(key.encode()).hexdigest()[:10]
    costs: dict[str, int] = {}
    made: list[Row] = []
    for depth, record in enumerate(records):
        documents, gold = passages(record)
        _measure(request, documents, costs)
        fitted = fit(request, documents, gold, record["question"].strip(), costs, fitters)
        if fitted is None:
            return []
        made.append(
            request.row(
                id=f"{request.dataset.dataset}-{short}-{depth}",
                question=record["question"].strip(),
                answers=record["answers"],
                docs=fitted[0],
                gold_pids=gold,
                cluster=f"{request.dataset.dataset}-{short}",
                source=pool.identity,
                length_tokens=fitted[1],
            )
        )
    return made


def _measure(request: Request, documents: Sequence[Document], costs: dict[str, int]) -> None:
    """Add the tokens of passages not measured yet; a word follows them, as in the prompt."""
    meter, _ = request.fitted
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
    fitters: Sequence[Fitter],
) -> tuple[list[Document], int] | None:
    """The documents to show and their total, or None if they cannot keep the length."""
    others = [document for document in documents if document["pid"] not in gold]

    known: dict[tuple[int, ...], list[int]] = {}  # a fitter that cannot do better makes the same choice again

    def totals(chosen: list[int]) -> list[int]:
        if (setting := tuple(chosen)) not in known:
            arranged = shown(documents, gold, [others[index]["pid"] for index in chosen])
            known[setting] = request.totals(arranged, [question])
        return known[setting]

    estimates = [costs[document["pid"]] for document in others]
    limit = request.fitted[1]
    if sum(estimates) < limit and totals([*range(len(others))])[0] < Contract.promised(limit).floor:
        return None
    for fitter in fitters:
        fitted = fitter.fit(estimates, totals)
        if fitted is not None:
            chosen, (total,) = fitted
            return shown(documents, gold, [others[index]["pid"] for index in chosen]), total
    return None


def shown(documents: Sequence[Document], gold: Sequence[str], kept: Sequence[str]) -> list[Document]:
    """The gold and the kept documents in their order, each gold one at the share of the others that it has in all."""
    golds, others = set(gold), set(kept)
    made = [document for document in documents if document["pid"] in others]
    before = inserted = 0
    for document in documents:
        if document["pid"] in golds:
            place = round(before * len(others) / max(len(documents) - len(golds), 1))
            made.insert(place + inserted, document)
            inserted += 1
        else:
            before += 1
    return made


def packed(capacity: int, costs: Sequence[int]) -> list[int]:
    """Pieces from the first on, as many as fit; the last few are those of the next that fill the rest best.

    Passages are all about as long, so that a single last one would leave up to its length; among a dozen there are
    mostly four or five that fill it to a few tokens.
    """
    if sum(costs) <= capacity:
        return [*range(len(costs))]
    reserve, rest = 4 * median(costs), max(capacity, 0)
    chosen: list[int] = []
    for index, cost in enumerate(costs):
        if rest - cost < reserve:
            break
        chosen.append(index)
        rest -= cost
    window = range(len(chosen), min(len(chosen) + _WINDOW, len(costs)))
    best, filled = tuple[int, ...](), 0
    for size in range(1, _LAST + 1):
        for some in combinations(window, size):
            if filled < (total := sum(map(costs.__getitem__, some))) <= rest:
                best, filled = some, total
    return [*chosen, *best]
