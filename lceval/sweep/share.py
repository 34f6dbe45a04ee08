"""Groups for several workers: which one a worker takes next, so that models are loaded seldom and nobody idles."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from lceval.sweep.plan import Cell


def split(groups: Sequence[Sequence[Cell]], workers: int) -> list[list[Cell]]:
    """A group for every worker, as far as there are cells.

    Where there are too few groups the largest are halved by recipe, and both halves read its contexts.
    """
    found = [list(group) for group in groups]
    while len(found) < workers and (largest := max(found, key=len, default=[]))[1:]:
        at, half = found.index(largest), len(largest) // 2
        found[at : at + 1] = [largest[:half], largest[half:]]
    return found


def threads(workers: int) -> int:
    """CPU threads for each of so many workers of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


class Queue:
    """Groups that wait for a worker."""

    def __init__(self, groups: Sequence[Sequence[Cell]]) -> None:
        self._waiting: dict[object, list[Sequence[Cell]]] = {}
        for group in groups:
            self._waiting.setdefault(group[0].owner, []).append(group)
        self._at_work: Counter[object] = Counter()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self, owner: object = None) -> Sequence[Cell] | None:
        """The next group for a worker whose last one was of `owner`, None if none is left.

        One that needs the same model; else one of the model that has most groups left for each worker it has.
        """
        self._at_work[owner] -= 1
        if not self._waiting:
            return None
        if owner not in self._waiting:
            owner = max(self._waiting, key=lambda one: len(self._waiting[one]) / (1 + self._at_work[one]))
        self._at_work[owner] += 1
        group = self._waiting[owner].pop(0)
        if not self._waiting[owner]:
            del self._waiting[owner]
        return group
