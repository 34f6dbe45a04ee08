"""Questions of a passage pool, and which of them may share a context."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from lceval.errors import UserError
from lceval.tasks.leakage import LeakIndex
from lceval.tasks.parsing import normalize
from lceval.tasks.sources import SourceFile

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


def askable(
    name: str, questions: SourceFile, numbers: Mapping[str, int], leaks: LeakIndex, elsewhere: Set[str] = frozenset()
) -> list[Question]:
    """The questions that can be scored, in file order.

    Args:
        name: the dataset's, of which ids are made.
        questions: records of hub_pools.QUESTION.
        numbers: place in the pool by pid.
        leaks: over the pool.
        elsewhere: pids of passages that the pool leaves out, with the questions on them.

    Left out: answers that normalise to nothing or stand in no gold passage (yes and no among them: as substrings they
    score nothing worth knowing), and questions asked before.
    """
    found: dict[str, Question] = {}
    for line, record in enumerate(questions.records):
        if not elsewhere.isdisjoint(record["gold_pids"]):
            continue
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


def group_questions(
    questions: Sequence[Question], leaks: LeakIndex, rng: random.Random, size: int = 4
) -> list[list[Question]]:
    """Groups of questions on different passages that may share a context, of similar length, in random order.

    Similar length keeps the prompts on one context within a few tokens of each other. Measured in
    words and characters, so that the groups do not depend on the tokenizer.
    """
    waiting = rng.sample(list(questions), len(questions))
    waiting.sort(key=lambda question: (len(question.text.split()), len(question.text)))
    groups: list[list[Question]] = []
    while waiting:
        group = [waiting.pop(0)]
        for candidate in waiting[: size * _NEIGHBOURS // 4]:
            if len(group) < size and all(_may_share(candidate, q, leaks) for q in group):
                group.append(candidate)
        if len(group) == size:
            groups.append(group)
            taken = {question.id for question in group}
            waiting = [question for question in waiting if question.id not in taken]
    rng.shuffle(groups)
    return groups


def pack_questions(
    questions: Sequence[Question],
    leaks: LeakIndex,
    rng: random.Random,
    *,
    size: int,
    gold_characters: int,
    apart_characters: int,
) -> list[list[Question]]:
    """Groups of more questions than a short context has room for passages: those on one passage may share.

    Each passage is asked about as rarely as the room for gold passages allows.

    Args:
        questions: to be grouped; those that find no group are left out.
        leaks: over the pool.
        rng: decides the order.
        size: questions in a group.
        gold_characters: room for the passages of a group.
        apart_characters: by how much the questions of a group may differ in length.
    """
    lengths = [len(text) for text in leaks.normalized]
    usual = sum(lengths[g] for q in questions for g in q.gold) / max(len(questions), 1)
    each = -(-size // max(1, min(size, int(gold_characters / max(usual, 1)))))  # questions on a passage
    waiting = rng.sample(list(questions), len(questions))
    groups: list[list[Question]] = []
    while waiting:
        group: list[Question] = []
        asked: Counter[tuple[int, ...]] = Counter()
        for most in (each, size):  # what no other passage has room for goes to those that are there
            for candidate in waiting:
                known = asked[candidate.gold]
                room = sum(lengths[gold] for gold in {*candidate.gold}.union(*asked))
                if (
                    len(group) < size
                    and candidate not in group
                    and known < most
                    and (known or room <= gold_characters or not group)
                    and all(abs(len(candidate.text) - len(q.text)) <= apart_characters for q in group)
                    and all(_may_share(candidate, q, leaks, same=True) for q in group)
                ):
                    group.append(candidate)
                    asked[candidate.gold] += 1
        taken = {question.id for question in group} if len(group) == size else {waiting[0].id}
        if len(group) == size:
            groups.append(group)
        waiting = [question for question in waiting if question.id not in taken]
    rng.shuffle(groups)
    return groups


def _may_share(one: Question, other: Question, leaks: LeakIndex, *, same: bool = False) -> bool:
    """Neither question's gold passages contain an answer of the other, or (`same`) they are the same passages."""
    if one.gold == other.gold:
        return same
    if set(one.gold) & set(other.gold):
        return False
    pairs = [(passage, answer) for passage in one.gold for answer in other.normalized]
    pairs += [(passage, answer) for passage in other.gold for answer in one.normalized]
    return not any(answer in leaks.normalized[passage] for passage, answer in pairs)
