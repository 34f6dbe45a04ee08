"""Rows of datasets built from passage pools: nqopen, hotpotpool, musique, squad.

A context has the complete gold passages of four questions (`questions=` sets another number), spread over the context,
among hard negatives (the distractors of the source, then passages ranked by BM25 or `negatives=`) and random passages
of the pool. Apart from a question's own gold passages, no passage contains a normalised answer of any question on the
context. Groups of questions depend on the seed alone, so all lengths and tokenizers have the same groups in the same
order; a group is skipped if its passages do not fit or its questions differ too much in length. With more than four
questions, some may share gold passages if the length has no room for others. `split=` restricts a context, with all its
passages, to the source documents of one split (splits.sides).
"""

import random
from collections.abc import Iterator, Sequence, Set

from lceval.core.errors import UserError
from lceval.tasks.compose import TOLERANCE, Contract, Fitter, fill, fill_length_matched, spread
from lceval.tasks.icr.hub_pools import read_pool
from lceval.tasks.icr.questions import PoolQuestion, group_questions, pack_questions, usable_questions
from lceval.tasks.icr.splits import sides
from lceval.tasks.leakage import LeakIndex
from lceval.tasks.parsing import normalize
from lceval.tasks.prompts import block
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.retrievers import order_by
from lceval.tasks.rows import Document, Row, by_context
from lceval.tasks.sources import SourceFile, by_key, joint_identity

HARD_PER_QUESTION = 5
_MOST_CONTEXTS = {64: 50, 128: 25}  # by length in K: a row of 128k tokens is a megabyte
_USUAL_CONTEXTS = 100
_WIDER = 4  # times as many hard negatives as candidates if lengths are matched
_DISTINCT = 4  # up to this many questions on a context have distinct gold passages
_CHARACTERS_PER_TOKEN = 4


def rows(request: Request) -> RowPlan:
    """All rows of one length, on at most 100 contexts (50 at 64k, 25 at 128k)."""
    questions, pools = read_pool(request)
    source = joint_identity([questions, *pools])
    return RowPlan({"source": source}, lambda: _build(request, questions, pools, source))


def _build(request: Request, questions: SourceFile, pools: Sequence[SourceFile], source: str) -> list[Row]:
    meter, limit = request.meter_and_limit
    name, size = request.dataset.dataset, request.setting.questions or request.dataset.per_context
    excluded = _outside_split(request.setting.split, questions, pools)
    pool = _PassagePool(request, pools, excluded)
    numbers = {document["pid"]: number for number, document in enumerate(pool.documents)}
    usable = usable_questions(name, questions, numbers, pool.leaks, excluded)
    groups = _groups(usable, pool.leaks, random.Random(f"{name} {request.seed}"), size, limit)
    # The lengths of many questions differ by more than `preferred` allows on a short context.
    fitter = Fitter(Contract.preferred(limit, meter) if size <= _DISTINCT else Contract.guaranteed(limit))
    built_rows: list[Row] = []
    max_rows = _MOST_CONTEXTS.get(limit // 1024, _USUAL_CONTEXTS) * size
    for number, group in enumerate(groups):
        rng = random.Random(f"{name} {request.seed} {limit} {number}")
        fitted = pool.context(request, group, fitter, rng)
        if fitted is None:
            continue
        documents, totals = fitted
        built_rows += [
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
        if len(built_rows) == max_rows:
            break
    if not built_rows:
        raise UserError(
            f"{request.task} cannot fit {size} questions into {limit} tokens of this tokenizer with "
            f"the {len(pool.documents)} passages of its pool ({source}): choose another length or a larger pool."
        )
    return built_rows


def _outside_split(split: str, questions: SourceFile, pools: Sequence[SourceFile]) -> frozenset[str]:
    """Ids of the passages outside of the split."""
    if not split:
        return frozenset()
    side = sides([record for pool in pools for record in pool.records], questions.records)
    return frozenset(pid for pid, of in side.items() if of != split)


def _groups(
    questions: Sequence[PoolQuestion], leaks: LeakIndex, rng: random.Random, size: int, limit: int
) -> list[list[PoolQuestion]]:
    if size <= _DISTINCT:
        return group_questions(questions, leaks, rng, size)
    # Gold passages may fill half of the context; differences in question length must be within the tolerance.
    characters = limit * _CHARACTERS_PER_TOKEN
    return pack_questions(
        questions,
        leaks,
        rng,
        size=size,
        gold_characters=characters // 2,
        apart_characters=int(0.75 * limit * _CHARACTERS_PER_TOKEN * TOLERANCE),
    )


def _length(limit: int) -> str:
    return f"{limit}t" if limit % 1024 else f"{limit // 1024}k"


def kept_out(request: Request, rows: Sequence[Row]) -> list[int]:
    """Number of passages excluded from each context: not gold, and containing an answer."""
    questions, pools = read_pool(request)
    excluded = _outside_split(request.setting.split, questions, pools)
    passages = [record for pool in pools for record in pool.records if record["pid"] not in excluded]
    leaks = LeakIndex([passage["text"] for passage in passages])
    counts = []
    for context_rows in by_context(rows).values():
        golds = {pid for row in context_rows for pid in row["gold_pids"]}
        answers = [normalize(answer) for row in context_rows for answer in row["answers"]]
        leaking = leaks.containing(answer for answer in answers if answer)
        counts.append(sum(passages[index]["pid"] not in golds for index in leaking))
    return counts


class _PassagePool:
    """Passages from which contexts are built."""

    def __init__(self, request: Request, pools: Sequence[SourceFile], excluded: Set[str]) -> None:
        for pool in pools:
            by_key(pool, "pid")  # raises on duplicates
        records = {r["pid"]: r for pool in pools for r in pool.records if r["pid"] not in excluded}
        self.documents = [
            Document(pid=pid, title=record["title"], text=record["text"].strip()) for pid, record in records.items()
        ]
        texts = [document["text"] for document in self.documents]
        layout = request.dataset.layout
        self.leaks = LeakIndex(texts)
        self._costs = request.meter_and_limit[0].pieces([f"{block(layout, [text])}\n\n" for text in texts])
        self._length_matched, ranker = request.setting.length_matched, request.setting.negatives or "bm25"
        self._order = None if ranker == "random" else order_by(ranker, texts)

    def context(
        self, request: Request, group: Sequence[PoolQuestion], fitter: Fitter, rng: random.Random
    ) -> tuple[list[Document], list[int]] | None:
        """Documents of a context in order and the totals of its questions; None if the contract cannot be met."""
        golds = [*dict.fromkeys(passage for question in group for passage in question.gold)]
        leaking = self.leaks.containing(answer for question in group for answer in question.normalized).union(golds)
        hard = [*dict.fromkeys(passage for passage in self._hard(group) if passage not in leaking)]
        unavailable = leaking.union(hard)
        rest = [passage for passage in range(len(self.documents)) if passage not in unavailable]
        rng.shuffle(rest)
        candidates = [*hard, *rest]
        order_seed = rng.getrandbits(64)

        def arrange(chosen: Sequence[int]) -> tuple[list[Document], list[int]]:
            order = random.Random(order_seed)
            fillers = [candidates[index] for index in chosen]
            order.shuffle(fillers)
            documents = [self.documents[passage] for passage in spread(golds, fillers, order)]
            return documents, request.totals(documents, [question.text for question in group])

        def fill_matched(capacity: int, costs: Sequence[int]) -> list[int]:
            gold_costs = [self._costs[gold] for gold in golds]
            return fill_length_matched(capacity, costs, gold_costs, len(hard), random.Random(order_seed))

        costs = [self._costs[passage] for passage in candidates]
        return fitter.fit(costs, arrange, fill_matched if self._length_matched else fill)

    def _hard(self, group: Sequence[PoolQuestion]) -> Iterator[int]:
        """Hard negatives, round-robin over the questions: distractors of the source, then the top-ranked passages."""
        if self._order is None:
            return
        negatives = []
        most = HARD_PER_QUESTION * (_WIDER if self._length_matched else 1)
        for question in group:
            ranked = self._order(question.text)[: 4 * most]
            candidates = [n for n in dict.fromkeys([*question.negatives, *ranked]) if n not in question.gold]
            negatives.append(candidates[:most])
        for place in range(most):
            for candidates in negatives:
                yield from candidates[place : place + 1]
