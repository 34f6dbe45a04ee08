"""Relabel false negatives as gold: fuzzy match to a gold passage, then optionally a judge.

A near-duplicate of a gold passage is not a negative, and a model that cites it should not be penalized. Stage one finds
passages whose similarity to a gold passage is at least 0.6. The similarity is the maximum of word Jaccard, character F1
(aligned characters) and trigram containment (share of the shorter text's word trigrams in the other). Stage two asks a
judge whether the passage is relevant to the question.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from difflib import SequenceMatcher
from functools import cache

from lceval.tasks.parsing import normalize
from lceval.tasks.rows import Row

THRESHOLD = 0.6
_MIN_OVERLAP = 0.2  # word overlap below which the character F1 does not reach the threshold


@dataclass(frozen=True)
class Match:
    """A passage similar to a gold passage of a question."""

    question: str
    answers: tuple[str, ...]
    passage: str


Judge = Callable[[Sequence[Match]], Sequence[bool | None]]
"""Whether passages are relevant to their questions; None: no verdict."""


@dataclass(frozen=True)
class Promotion:
    """Counts of negatives, as pairs of question and passage.

    Attributes:
        compared: compared with the gold passages.
        matched: similar to a gold passage.
        refused: matched, and rejected by the judge.
        unjudged: matched, without a verdict; remain negatives.
    """

    compared: int
    matched: int
    refused: int
    unjudged: int = 0

    @property
    def promoted(self) -> int:
        """Number of negatives relabelled as gold."""
        return self.matched - self.refused - self.unjudged

    def __add__(self, other: "Promotion") -> "Promotion":
        return Promotion(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


def similarity(one: str, other: str) -> float:
    """Maximum of word Jaccard, character F1 and trigram containment of the normalised texts, in [0, 1]."""
    words, other_words = normalize(one).split(), normalize(other).split()
    if not words or not other_words:
        return 0.0
    jaccard = len({*words} & {*other_words}) / len({*words} | {*other_words})
    shorter, longer = sorted((_trigrams(words), _trigrams(other_words)), key=len)
    contained = len(shorter & longer) / len(shorter) if shorter else 0.0
    aligned = 0.0
    if max(jaccard, contained) >= _MIN_OVERLAP:
        first, second = sorted((" ".join(words), " ".join(other_words)))  # the alignment is not symmetric
        aligned = SequenceMatcher(None, first, second, autojunk=False).ratio()
    return max(jaccard, contained, aligned)


def _trigrams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def promote(
    rows: Sequence[Row], threshold: float = THRESHOLD, judge: Judge | None = None
) -> tuple[list[Row], Promotion]:
    """The rows with false negatives added to their gold_pids, and counts.

    Args:
        rows: rows of any task; those without a gold document in their context are unchanged.
        threshold: minimum similarity to a gold passage.
        judge: rejects false positives; None promotes every match. A passage without a verdict remains a negative.
    """
    similarity_of = cache(similarity)
    compared = 0
    keys: list[tuple[int, str]] = []  # index of the row, pid
    matches: list[Match] = []
    for index, row in enumerate(rows):
        golds = [document["text"] for document in row["docs"] if document["pid"] in row["gold_pids"]]
        for document in row["docs"]:
            if document["pid"] in row["gold_pids"]:
                continue
            compared += 1
            if max((similarity_of(gold, document["text"]) for gold in golds), default=0.0) >= threshold:
                keys.append((index, document["pid"]))
                matches.append(Match(row["question"], tuple(row["answers"]), document["text"]))
    verdicts = [True] * len(matches) if judge is None else judge(matches)
    promoted: dict[int, list[str]] = defaultdict(list)
    for (index, pid), verdict in zip(keys, verdicts, strict=True):
        if verdict:
            promoted[index].append(pid)
    relabelled: list[Row] = list(rows)
    for index, pids in promoted.items():
        relabelled[index] = {**rows[index], "gold_pids": [*rows[index]["gold_pids"], *pids]}
    refused, unjudged = (sum(verdict is value for verdict in verdicts) for value in (False, None))
    return relabelled, Promotion(compared, len(matches), refused, unjudged)
