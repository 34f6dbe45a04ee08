"""Train/test split of a pool by source document.

Connected components of passages stay together: passages with the same title (one article) or the same text, and the
gold passages of one question or of identical questions. The hash of a component's first title determines its split, so
a document keeps its split when the pool grows, unless new passages join its component to another.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lceval.tasks.parsing import normalize

TEST_SHARE = 1 / 3
_SALT = "lceval split 1"


def sides(passages: Sequence[Mapping[str, Any]], questions: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return `train` or `test` by pid.

    Args:
        passages: records with pid, title and text; a passage without a title is a separate document.
        questions: records with question and gold_pids.
    """
    components = _Components()
    for passage in passages:
        components.join(f"pid {passage['pid']}", f"text {normalize(passage['text'])}")
        if title := normalize(passage["title"].replace("_", " ")):
            components.join(f"pid {passage['pid']}", f"article {title}")
    for question in questions:
        for pid in question["gold_pids"]:
            components.join(f"pid {pid}", f"question {normalize(question['question'])}")
    lowest: dict[str, str] = {}
    for key in components.keys:
        if key.startswith(("article ", "text ")):  # titles sort before texts; pids depend on the file
            root = components.root(key)
            lowest[root] = min(lowest.get(root, key), key)
    side = {root: "test" if _unit(key) < TEST_SHARE else "train" for root, key in lowest.items()}
    return {passage["pid"]: side[components.root(f"pid {passage['pid']}")] for passage in passages}


def _unit(key: str) -> float:
    """Deterministic number in [0, 1) of a key."""
    return int.from_bytes(hashlib.sha256(f"{_SALT}\n{key}".encode()).digest()[:8]) / 2**64


class _Components:
    """Connected components of keys: union-find with path halving."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    @property
    def keys(self) -> Iterable[str]:
        return self._parent.keys()

    def root(self, key: str) -> str:
        self._parent.setdefault(key, key)
        while self._parent[key] != key:
            self._parent[key] = key = self._parent[self._parent[key]]
        return key

    def join(self, one: str, other: str) -> None:
        self._parent[self.root(one)] = self.root(other)
