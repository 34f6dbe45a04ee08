"""Hard negatives that are really relevant become gold: fuzzy match to a gold passage, then a judge.

A passage that says nearly what a gold passage says is no negative, and a model that names it should not be punished.
Stage one finds passages whose likeness to a gold passage is at least 0.6, the largest of three: Jaccard (words in
common), character F1 (characters in the same order) and n-gram (the shorter one's word trigrams that the other has).
Stage two, where there is one, asks a judge whether such a passage really bears on the question.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from difflib import SequenceMatcher

from lceval.tasks.parsing import normalize
from lceval.tasks.rows import Row

THRESHOLD = 0.6
_WORTH_ALIGNING = 0.2  # of words in common; below that no alignment of characters reaches the threshold


@dataclass(frozen=True)
class Match:
    """A passage that is like a question's gold."""

    question: str
    answers: tuple[str, ...]
    passage: str


Judge = Callable[[Sequence[Match]], Sequence[bool | None]]
"""Whether passages bear on their questions; None where there is no verdict."""


@dataclass(frozen=True)
class Promotion:
    """What became of the negatives: pairs of question and passage.

    Attributes:
        matched: like a gold passage; of these `refused` by a judge, and left as they were for want of a verdict.
    """

    compared: int
    matched: int
    refused: int
    unjudged: int = 0

    @property
    def promoted(self) -> int:
        """Passages that are gold now."""
        return self.matched - self.refused - self.unjudged

    def __add__(self, other: "Promotion") -> "Promotion":
        return Promotion(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


def likeness(one: str, other: str) -> float:
    """From 0 to 1: the largest of Jaccard, character F1 and n-gram, over normalised texts."""
    said, told = normalize(one).split(), normalize(other).split()
    if not said or not told:
        return 0.0
    words, others = set(said), set(told)
    jaccard = len(words & others) / len(words | others)
    shorter, longer = sorted((_trigrams(said), _trigrams(told)), key=len)
    contained = len(shorter & longer) / len(shorter) if shorter else 0.0
    aligned = 0.0
    if max(jaccard, contained) >= _WORTH_ALIGNING:
        first, second = sorted((" ".join(said), " ".join(told)))  # an alignment depends on the order
        aligned = SequenceMatcher(None, first, second, autojunk=False).ratio()
    return max(jaccard, contained, aligned)


def _trigrams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def promote(
    rows: Sequence[Row], threshold: float = THRESHOLD, judge: Judge | None = None
) -> tuple[list[Row], Promotion]:
    """The rows with what is really relevant among their gold_pids, and how many there were.

    Args:
        rows: Of any task; those without a gold document in sight stay as they are.
        threshold: Least likeness to a gold passage.
        judge: Removes false positives; without one every match is promoted. What it gives no verdict on stays a
            negative.
    """
    known: dict[tuple[str, str], float] = {}
    compared = 0
    places: list[tuple[int, str]] = []
    matches: list[Match] = []
    for at, row in enumerate(rows):
        golds = [document["text"] for document in row["docs"] if document["pid"] in row["gold_pids"]]
        for document in row["docs"]:
            if document["pid"] in row["gold_pids"]:
                continue
            compared += 1
            text = document["text"]
            for gold in golds:
                if (gold, text) not in known:
                    known[gold, text] = likeness(gold, text)
            if max((known[gold, text] for gold in golds), default=0.0) >= threshold:
                places.append((at, document["pid"]))
                matches.append(Match(row["question"], tuple(row["answers"]), text))
    verdicts = [True] * len(matches) if judge is None else judge(matches)
    more: dict[int, list[str]] = defaultdict(list)
    for (at, pid), verdict in zip(places, verdicts, strict=True):
        if verdict:
            more[at].append(pid)
    made: list[Row] = list(rows)
    for at, pids in more.items():
        made[at] = {**rows[at], "gold_pids": [*rows[at]["gold_pids"], *pids]}
    refused, unjudged = (sum(verdict is what for verdict in verdicts) for what in (False, None))
    return made, Promotion(compared, len(matches), refused, unjudged)
