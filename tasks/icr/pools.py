"""Rows of datasets that are pools of passages with questions on them: nqopen, hotpotpool, musique, squad.

A context holds the gold passages of four questions, whole and spread over it, among hard negatives (the distractors
that the source names, then what BM25 finds for the questions) and random passages of the pool. No passage but a
question's own gold contains a normalised answer of any question asked there. Which questions share a context depends on
the seed alone, so every length and every tokenizer draws the same groups in the same order; one is passed over where
its passages do not fit or its questions differ too much in length.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.compose import Contract, Fitter, spread
from lceval.tasks.icr.hub_pools import read_pool
from lceval.tasks.leakage import LeakIndex
from lceval.tasks.parsing import normalize
from lceval.tasks.prompts import block
from lceval.tasks.retrieval import bm25_order
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, by_key, joint_identity

QUESTIONS_PER_CONTEXT = 4
HARD_PER_QUESTION = 5
_MOST_CONTEXTS = {64: 50, 128: 25}  # by length in K: a row of 128k tokens is a megabyte
_USUAL_CONTEXTS = 100
_NEIGHBOURS = 32  # how far down the list of similar lengths a partner for a context is looked for


@dataclass(frozen=True)
class Question:
    """A question that can be asked: its answers survive normalisation and stand in its gold passages."""

    id: str
    text: str
    answers: tuple[str, ...]
    normalized: tuple[str, ...]
    gold: tuple[int, ...]
    negatives: tuple[int, ...]


def rows(request: Request) -> Plan:
    """All rows of one length: as many whole contexts as can be had, at most 100 (50 at 64k, 25 at 128k)."""
    questions, passages, fill = read_pool(request)
    source = joint_identity([questions, passages, *fill])
    return Plan({"source": source}, lambda: _build(request, questions, [passages, *fill], source))


def _build(request: Request, questions: SourceFile, pools: Sequence[SourceFile], source: str) -> list[Row]:
    meter, limit = request.fitted
    name = request.dataset.dataset
    pool = _Pool(request, pools)
    asked = askable(name, questions, {d["pid"]: n for n, d in enumerate(pool.documents)}, pool.leaks)
    groups = group_questions(asked, pool.leaks, random.Random(f"{name} {request.seed}"))
    fitter = Fitter(Contract.preferred(limit, meter))
    made: list[Row] = []
    most = _MOST_CONTEXTS.get(limit // 1024, _USUAL_CONTEXTS) * QUESTIONS_PER_CONTEXT
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
                cluster=f"{name}-{limit // 1024}k-{number:03d}",
                source=source,
                length_tokens=total,
            )
            for question, total in zip(group, totals, strict=True)
        ]
        if len(made) == most:
            break
    if not made:
        raise UserError(
            f"{request.task} can place no {QUESTIONS_PER_CONTEXT} questions in {limit} tokens of this tokenizer with "
            f"the {len(pool.documents)} passages of its pool ({source}): choose another length or a larger pool."
        )
    return made


class _Pool:
    """The passages that contexts are made of."""

    def __init__(self, request: Request, pools: Sequence[SourceFile]) -> None:
        for pool in pools:
            by_key(pool, "pid")  # refuses one that is there twice
        records = {record["pid"]: record for pool in pools for record in pool.records}
        self.documents = [
            Document(pid=pid, title=record["title"], text=record["text"].strip()) for pid, record in records.items()
        ]
        texts = [document["text"] for document in self.documents]
        layout = request.dataset.layout
        self.leaks = LeakIndex(texts)
        self._costs = request.fitted[0].pieces([f"{block(layout, [text])}\n\n" for text in texts])
        self._index = bm25_order(texts)

    def context(
        self, request: Request, group: Sequence[Question], fitter: Fitter, rng: random.Random
    ) -> tuple[list[Document], list[int]] | None:
        """The documents of a context in order and the questions' totals, or None if none keeps the contract."""
        golds = [passage for question in group for passage in question.gold]
        barred = self.leaks.holders(answer for question in group for answer in question.normalized).union(golds)
        hard = [*dict.fromkeys(passage for passage in self._hard(group) if passage not in barred)]
        rest = [passage for passage in range(len(self.documents)) if passage not in barred.union(hard)]
        rng.shuffle(rest)
        candidates = [*hard, *rest]
        order_seed = rng.getrandbits(64)

        def arrange(chosen: list[int]) -> list[Document]:
            order = random.Random(order_seed)
            fillers = [candidates[index] for index in chosen]
            order.shuffle(fillers)
            return [self.documents[passage] for passage in spread(golds, fillers, order)]

        fitted = fitter.fit(
            [self._costs[passage] for passage in candidates],
            lambda chosen: request.totals(arrange(chosen), [question.text for question in group]),
        )
        return None if fitted is None else (arrange(fitted[0]), fitted[1])

    def _hard(self, group: Sequence[Question]) -> Iterator[int]:
        """Hard negatives of the questions in turn: each one's named distractors, then what BM25 ranks first for it."""
        found = []
        for question in group:
            ranked = self._index.ranked(question.text, 4 * HARD_PER_QUESTION)
            wrong = [n for n in dict.fromkeys([*question.negatives, *ranked]) if n not in question.gold]
            found.append(wrong[:HARD_PER_QUESTION])
        for place in range(HARD_PER_QUESTION):
            for wrong in found:
                yield from wrong[place : place + 1]


def askable(name: str, questions: SourceFile, numbers: dict[str, int], leaks: LeakIndex) -> list[Question]:
    """The questions that can be scored, in file order.

    Left out: answers that normalise to nothing or stand in no gold passage (yes and no among them: as substrings they
    score nothing worth knowing), and questions asked before.
    """
    found: dict[str, Question] = {}
    for line, record in enumerate(questions.records):
        unknown = [pid for pid in record["gold_pids"] if pid not in numbers]
        if unknown:
            raise UserError(f"{questions.name} names gold_pids={unknown} that the passages do not have.")
        gold = tuple(numbers[pid] for pid in record["gold_pids"])
        normalized = tuple(normalize(answer) for answer in record["answers"])
        stated = any(answer in leaks.normalized[passage] for answer in normalized for passage in gold)
        if (
            all(normalized)
            and not {"yes", "no"}.intersection(normalized)
            and stated
            and record["question"] not in found
        ):
            found[record["question"]] = Question(
                id=f"{name}-{line:05d}",
                text=record["question"].strip(),
                answers=tuple(record["answers"]),
                normalized=normalized,
                gold=gold,
                negatives=tuple(numbers[pid] for pid in record.get("distractor_pids") or () if pid in numbers),
            )
    return list(found.values())


def group_questions(questions: Sequence[Question], leaks: LeakIndex, rng: random.Random) -> list[list[Question]]:
    """Fours of questions that may share a context, of similar length, in random order.

    Similar length keeps the four prompts on one context within a few tokens of each other. Measured in
    words and characters, so that the groups do not depend on the tokenizer.
    """
    waiting = rng.sample(list(questions), len(questions))
    waiting.sort(key=lambda question: (len(question.text.split()), len(question.text)))
    groups: list[list[Question]] = []
    while waiting:
        group = [waiting.pop(0)]
        for candidate in waiting[:_NEIGHBOURS]:
            if len(group) < QUESTIONS_PER_CONTEXT and all(_may_share(candidate, q, leaks) for q in group):
                group.append(candidate)
        if len(group) == QUESTIONS_PER_CONTEXT:
            groups.append(group)
            taken = {question.id for question in group}
            waiting = [question for question in waiting if question.id not in taken]
    rng.shuffle(groups)
    return groups


def _may_share(one: Question, other: Question, leaks: LeakIndex) -> bool:
    """Neither question's gold passages contain an answer of the other."""

    if set(one.gold) & set(other.gold):
        return False
    pairs = [(passage, answer) for passage in one.gold for answer in other.normalized]
    pairs += [(passage, answer) for passage in other.gold for answer in one.normalized]
    return not any(answer in leaks.normalized[passage] for passage, answer in pairs)
