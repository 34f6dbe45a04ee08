"""Rows of datasets that are pools of passages with questions on them: nqopen, hotpotpool, musique, squad.

A context holds the gold passages of four questions (`questions=` asks for another number), whole and spread over it,
among hard negatives (the distractors that the source names, then what BM25 or `negatives=` finds for the questions) and
random passages of the pool. No passage but a question's own gold contains a normalised answer of any question asked
there. Which questions share a context depends on the seed alone, so every length and every tokenizer draws the same
groups in the same order; one is passed over where its passages do not fit or its questions differ too much in length.
Of more than four questions some may be on the same passages, where the length has room for no others. `split=` keeps a
context, with all its passages, to the source documents of one side (splits.sides).
"""

import random
from collections.abc import Iterator, Sequence, Set

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.compose import TOLERANCE, Contract, Fitter, fill_alike, spread
from lceval.tasks.icr.hub_pools import read_pool
from lceval.tasks.icr.questions import Question, askable, group_questions, pack_questions
from lceval.tasks.icr.splits import sides
from lceval.tasks.leakage import LeakIndex
from lceval.tasks.parsing import normalize
from lceval.tasks.prompts import block
from lceval.tasks.retrieval import order_by
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, by_key, joint_identity

HARD_PER_QUESTION = 5
_MOST_CONTEXTS = {64: 50, 128: 25}  # by length in K: a row of 128k tokens is a megabyte
_USUAL_CONTEXTS = 100
_WIDER = 4  # times as many hard negatives to choose from where they must be of a length
_DISTINCT = 4  # the most questions of a context that must all be on passages of their own
_CHARACTERS_PER_TOKEN = 4


def rows(request: Request) -> Plan:
    """All rows of one length: as many whole contexts as can be had, at most 100 (50 at 64k, 25 at 128k)."""
    questions, passages, fill = read_pool(request)
    source = joint_identity([questions, passages, *fill])
    return Plan({"source": source}, lambda: _build(request, questions, [passages, *fill], source))


def _build(request: Request, questions: SourceFile, pools: Sequence[SourceFile], source: str) -> list[Row]:
    meter, limit = request.fitted
    name, size = request.dataset.dataset, request.questions
    elsewhere = _elsewhere(request.setting.split, questions, pools)
    pool = _Pool(request, pools, elsewhere)
    asked = askable(name, questions, {d["pid"]: n for n, d in enumerate(pool.documents)}, pool.leaks, elsewhere)
    groups = _groups(asked, pool.leaks, random.Random(f"{name} {request.seed}"), size, limit)
    # Many questions differ by more than what `preferred` leaves on a short context.
    fitter = Fitter(Contract.preferred(limit, meter) if size <= _DISTINCT else Contract.promised(limit))
    made: list[Row] = []
    most = _MOST_CONTEXTS.get(limit // 1024, _USUAL_CONTEXTS) * size
    for number, group in enumerate(groups):
        rng = random.Random(f"{name} {request.seed} {limit} {number}")
        fitted = pool.context(request, group, fitter, rng)
        if fitted is None:
            continue
        documents, totals = fitted
        made += [
            request.row(
                id=question.id,
                question=question.text,
                answers=question.answers,
                docs=documents,
                gold_pids=[pool.documents[gold]["pid"] for gold in question.gold],
                cluster=f"{name}-{_length(limit)}-{number:03d}",
                source=source,
                length_tokens=total,
            )
            for question, total in zip(group, totals, strict=True)
        ]
        if len(made) == most:
            break
    if not made:
        raise UserError(
            f"{request.task} can place no {size} questions in {limit} tokens of this tokenizer with "
            f"the {len(pool.documents)} passages of its pool ({source}): choose another length or a larger pool."
        )
    return made


def _elsewhere(split: str, questions: SourceFile, pools: Sequence[SourceFile]) -> frozenset[str]:
    """The passages that are not of the split."""
    if not split:
        return frozenset()
    side = sides([record for pool in pools for record in pool.records], questions.records)
    return frozenset(pid for pid, of in side.items() if of != split)


def _groups(
    asked: Sequence[Question], leaks: LeakIndex, rng: random.Random, size: int, limit: int
) -> list[list[Question]]:
    if size <= _DISTINCT:
        return group_questions(asked, leaks, rng, size)
    # Gold passages may take half of the context, and what the questions differ by must lie within the tolerance.
    room, apart = limit * _CHARACTERS_PER_TOKEN // 2, int(0.75 * limit * _CHARACTERS_PER_TOKEN * TOLERANCE)
    return pack_questions(asked, leaks, rng, size=size, gold_characters=room, apart_characters=apart)


def _length(limit: int) -> str:
    return f"{limit}t" if limit % 1024 else f"{limit // 1024}k"


def kept_out(request: Request, rows: Sequence[Row]) -> list[int]:
    """For each context of the rows, how many passages of the pool it could not have: no gold, and with an answer in."""
    questions, own, fill = read_pool(request)
    pools = [own, *fill]
    elsewhere = _elsewhere(request.setting.split, questions, pools)
    passages = [record for pool in pools for record in pool.records if record["pid"] not in elsewhere]
    leaks = LeakIndex([passage["text"] for passage in passages])
    contexts: dict[str, list[Row]] = {}
    for row in rows:
        contexts.setdefault(row["cluster"], []).append(row)
    found = []
    for of in contexts.values():
        golds = {pid for row in of for pid in row["gold_pids"]}
        holders = leaks.holders(said for row in of for answer in row["answers"] if (said := normalize(answer)))
        found.append(sum(passages[holder]["pid"] not in golds for holder in holders))
    return found


class _Pool:
    """The passages that contexts are made of."""

    def __init__(self, request: Request, pools: Sequence[SourceFile], elsewhere: Set[str]) -> None:
        for pool in pools:
            by_key(pool, "pid")  # refuses one that is there twice
        records = {r["pid"]: r for pool in pools for r in pool.records if r["pid"] not in elsewhere}
        self.documents = [
            Document(pid=pid, title=record["title"], text=record["text"].strip()) for pid, record in records.items()
        ]
        texts = [document["text"] for document in self.documents]
        layout = request.dataset.layout
        self.leaks = LeakIndex(texts)
        self._costs = request.fitted[0].pieces([f"{block(layout, [text])}\n\n" for text in texts])
        self._length_matched, ranker = request.setting.length_matched, request.setting.negatives or "bm25"
        self._order = None if ranker == "random" else order_by(ranker, texts)

    def context(
        self, request: Request, group: Sequence[Question], fitter: Fitter, rng: random.Random
    ) -> tuple[list[Document], list[int]] | None:
        """The documents of a context in order and the questions' totals, or None if none keeps the contract."""
        golds = [*dict.fromkeys(passage for question in group for passage in question.gold)]
        barred = self.leaks.holders(answer for question in group for answer in question.normalized).union(golds)
        hard = [*dict.fromkeys(passage for passage in self._hard(group) if passage not in barred)]
        taken = barred.union(hard)
        rest = [passage for passage in range(len(self.documents)) if passage not in taken]
        rng.shuffle(rest)
        candidates = [*hard, *rest]
        order_seed = rng.getrandbits(64)

        def arrange(chosen: list[int]) -> list[Document]:
            order = random.Random(order_seed)
            fillers = [candidates[index] for index in chosen]
            order.shuffle(fillers)
            return [self.documents[passage] for passage in spread(golds, fillers, order)]

        def length_matched(capacity: int, costs: Sequence[int]) -> list[int]:
            like = [self._costs[gold] for gold in golds]
            return fill_alike(capacity, costs, like, len(hard), random.Random(order_seed))

        fitted = fitter.fit(
            [self._costs[passage] for passage in candidates],
            lambda chosen: request.totals(arrange(chosen), [question.text for question in group]),
            length_matched if self._length_matched else None,
        )
        return None if fitted is None else (arrange(fitted[0]), fitted[1])

    def _hard(self, group: Sequence[Question]) -> Iterator[int]:
        """Hard negatives of the questions in turn: each one's named distractors, then what ranks first for it."""
        if self._order is None:
            return
        found = []
        most = HARD_PER_QUESTION * (_WIDER if self._length_matched else 1)
        for question in group:
            ranked = self._order(question.text)[: 4 * most]
            wrong = [n for n in dict.fromkeys([*question.negatives, *ranked]) if n not in question.gold]
            found.append(wrong[:most])
        for place in range(most):
            for wrong in found:
                yield from wrong[place : place + 1]
