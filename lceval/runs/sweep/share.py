"""Distribute groups over workers such that models are rarely reloaded and no worker idles."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from lceval.runs.sweep.plan import Cell


def split(groups: Sequence[Sequence[Cell]], workers: int) -> list[list[Cell]]:
    """At least one group per worker, as far as there are enough cells.

    If there are too few groups, the largest are split in halves by recipe; both halves prefill its contexts.
    """
    parts = [list(group) for group in groups]
    while len(parts) < workers and (largest := max(parts, key=len, default=[]))[1:]:
        at, half = parts.index(largest), len(largest) // 2
        parts[at : at + 1] = [largest[:half], largest[half:]]
    return parts


def threads(workers: int) -> int:
    """CPU threads per worker, with this many workers on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


class Queue:
    """Groups waiting for a worker."""

    def __init__(self, groups: Sequence[Sequence[Cell]]) -> None:
        self._waiting: dict[object, list[Sequence[Cell]]] = {}
        for group in groups:
            self._waiting.setdefault(group[0].owner, []).append(group)
        self._at_work: Counter[object] = Counter()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self, owner: object = None) -> Sequence[Cell] | None:
        """The next group for a worker whose last group had this `owner`; None if none is left.

        A group of the same model is preferred, then one of the model with the most groups left per worker.
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
