"""Which source documents of a pool are for training and which for testing.

A passage belongs to a side with everything that must not be torn apart: passages of the same title (one article), of
the same words, and the gold passages of one question, or of questions in the same words. A hash of such a component's
first title decides its side, so a document keeps it whatever else the pool holds, unless something ties it to others.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lceval.tasks.parsing import normalize

TEST_SHARE = 1 / 3
_SALT = "lceval split 1"


def sides(passages: Sequence[Mapping[str, Any]], questions: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """`train` or `test` for the pid of every passage.

    Args:
        passages: records with pid, title and text; a passage without a title is a document of its own.
        questions: records with question and gold_pids.
    """
    ties = _Ties()
    for passage in passages:
        ties.tie(f"pid {passage['pid']}", f"text {normalize(passage['text'])}")
        if title := normalize(passage["title"].replace("_", " ")):
            ties.tie(f"pid {passage['pid']}", f"article {title}")
    for question in questions:
        for pid in question["gold_pids"]:
            ties.tie(f"pid {pid}", f"question {normalize(question['question'])}")
    lowest: dict[str, str] = {}
    for key in ties.keys:
        if key.startswith(("article ", "text ")):  # a title comes before all words; a pid is a matter of the file
            root = ties.root(key)
            lowest[root] = min(lowest.get(root, key), key)
    side = {root: "test" if _unit(key) < TEST_SHARE else "train" for root, key in lowest.items()}
    return {passage["pid"]: side[ties.root(f"pid {passage['pid']}")] for passage in passages}


def _unit(key: str) -> float:
    """A number of [0, 1) that follows from the key."""
    return int.from_bytes(hashlib.sha256(f"{_SALT}\n{key}".encode()).digest()[:8]) / 2**64


class _Ties:
    """Which keys belong together: union-find with path halving."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    @property
    def keys(self) -> Iterable[str]:
        return self._above.keys()

    def root(self, key: str) -> str:
        self._above.setdefault(key, key)
        while self._above[key] != key:
            self._above[key] = key = self._above[self._above[key]]
        return key

    def tie(self, one: str, other: str) -> None:
        self._above[self.root(one)] = self.root(other)
