"""Questions of a passage pool, and their grouping into shared contexts."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from lceval.core.errors import UserError
from lceval.tasks.leakage import LeakIndex
from lceval.tasks.parsing import normalize
from lceval.tasks.sources import SourceFile

_NEIGHBOURS = 32  # candidates of similar length that are considered for a context


@dataclass(frozen=True)
class PoolQuestion:
    """A usable question: its answers do not normalise to nothing, and one is in its gold passages."""

    id: str
    text: str
    answers: tuple[str, ...]
    normalized: tuple[str, ...]
    gold: tuple[int, ...]
    negatives: tuple[int, ...]


def usable_questions(
    name: str, questions: SourceFile, numbers: Mapping[str, int], leaks: LeakIndex, excluded: Set[str] = frozenset()
) -> list[PoolQuestion]:
    """Usable questions, in file order.

    Left out are duplicates, questions without an answer in their gold passages, and questions with an answer that is
    yes, no (meaningless as a substring) or normalises to nothing.

    Args:
        name: dataset name, the prefix of ids.
        questions: records of hub_pools.QUESTION.
        numbers: pid -> index in the pool.
        leaks: index of the pool.
        excluded: pids of passages outside of the pool; questions on them are left out.
    """
    by_text: dict[str, PoolQuestion] = {}
    for line, record in enumerate(questions.records):
        if not excluded.isdisjoint(record["gold_pids"]):
            continue
        unknown = [pid for pid in record["gold_pids"] if pid not in numbers]
        if unknown:
            raise UserError(f"{questions.name}: unknown gold_pids={unknown}: not among the passages.")
        gold = tuple(numbers[pid] for pid in record["gold_pids"])
        normalized = tuple(normalize(answer) for answer in record["answers"])
        stated = any(answer in leaks.normalized[passage] for answer in normalized for passage in gold)
        if (
            all(normalized)
            and not {"yes", "no"}.intersection(normalized)
            and stated
            and record["question"] not in by_text
        ):
            by_text[record["question"]] = PoolQuestion(
                id=f"{name}-{line:05d}",
                text=record["question"].strip(),
                answers=tuple(record["answers"]),
                normalized=normalized,
                gold=gold,
                negatives=tuple(numbers[pid] for pid in record.get("distractor_pids") or () if pid in numbers),
            )
    return list(by_text.values())


def group_questions(
    questions: Sequence[PoolQuestion], leaks: LeakIndex, rng: random.Random, size: int = 4
) -> list[list[PoolQuestion]]:
    """Groups of questions of similar length, on different passages, that may share a context, in random order.

    Similar lengths keep the prompts on one context within a few tokens of each other. Lengths are in words and
    characters, so that groups do not depend on the tokenizer.
    """
    waiting = rng.sample(list(questions), len(questions))
    waiting.sort(key=lambda question: (len(question.text.split()), len(question.text)))
    groups: list[list[PoolQuestion]] = []
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
    questions: Sequence[PoolQuestion],
    leaks: LeakIndex,
    rng: random.Random,
    *,
    size: int,
    gold_characters: int,
    apart_characters: int,
) -> list[list[PoolQuestion]]:
    """Groups of more questions than a short context has room for gold passages: questions may share a passage.

    The number of questions per passage is as small as the room for gold passages allows.

    Args:
        questions: candidates; questions without a group are left out.
        leaks: index of the pool.
        rng: determines the order.
        size: questions per group.
        gold_characters: maximum total length of the gold passages of a group.
        apart_characters: maximum difference in length between the questions of a group.
    """
    lengths = [len(text) for text in leaks.normalized]
    mean_length = sum(lengths[g] for q in questions for g in q.gold) / max(len(questions), 1)
    per_passage = -(-size // max(1, min(size, int(gold_characters / max(mean_length, 1)))))  # questions per passage
    waiting = rng.sample(list(questions), len(questions))
    groups: list[list[PoolQuestion]] = []
    while waiting:
        group: list[PoolQuestion] = []
        questions_on: Counter[tuple[int, ...]] = Counter()
        for maximum in (per_passage, size):  # second pass: further questions on the passages already selected
            for candidate in waiting:
                count = questions_on[candidate.gold]
                room = sum(lengths[gold] for gold in {*candidate.gold}.union(*questions_on))
                if (
                    len(group) < size
                    and candidate not in group
                    and count < maximum
                    and (count or room <= gold_characters or not group)
                    and all(abs(len(candidate.text) - len(q.text)) <= apart_characters for q in group)
                    and all(_may_share(candidate, q, leaks, same=True) for q in group)
                ):
                    group.append(candidate)
                    questions_on[candidate.gold] += 1
        taken = {question.id for question in group} if len(group) == size else {waiting[0].id}
        if len(group) == size:
            groups.append(group)
        waiting = [question for question in waiting if question.id not in taken]
    rng.shuffle(groups)
    return groups


def _may_share(one: PoolQuestion, other: PoolQuestion, leaks: LeakIndex, *, same: bool = False) -> bool:
    """Whether no gold passage contains an answer of the other question; `same` allows identical gold passages."""
    if one.gold == other.gold:
        return same
    if set(one.gold) & set(other.gold):
        return False
    pairs = [(passage, answer) for passage in one.gold for answer in other.normalized]
    pairs += [(passage, answer) for passage in other.gold for answer in one.normalized]
    return not any(answer in leaks.normalized[passage] for passage, answer in pairs)
