"""Several processes, as under `accelerate launch`: their jobs are pooled and dealt out by context.

lm-eval deals out documents one by one before it asks the model, so each process would prefill nearly every context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from lceval.models.prefix import J, by_context

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: the number of this one.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    def dealt(self, jobs: Sequence[J]) -> list[J]:
        """The jobs of this process, of those of all: whole contexts, each to the process with the fewest tokens so far.

        Their indices count the requests of all processes.
        """
        if self.count == 1:
            return list(jobs)
        pooled = [
            job.renumbered(partial(self._number, rank))
            for rank, of_rank in enumerate(self._gathered(list(jobs)))
            for job in of_rank
        ]
        load, own = [0] * self.count, []
        for group in sorted(by_context(pooled), key=lambda group: -len(group[0].context)):
            rank = load.index(min(load))
            load[rank] += len(group[0].context) + sum(job.room for job in group)
            own += group if rank == self.rank else []
        return own

    def returned(self, responses: Mapping[int, T]) -> dict[int, T]:
        """The responses to the requests of this process, by their index, of those that all processes have."""
        if self.count == 1:
            return dict(responses)
        return {
            index // self.count: response
            for of_rank in self._gathered(dict(responses))
            for index, response in of_rank.items()
            if index % self.count == self.rank
        }

    def summed(self, counts: Mapping[str, int]) -> Counter[str]:
        """Counts of all processes together."""
        return sum((Counter(of_rank) for of_rank in self._gathered(dict(counts))), Counter())

    def _number(self, rank: int, index: int) -> int:
        return index * self.count + rank

    def _gathered(self, own: T) -> list[T]:
        if self.count == 1:
            return [own]
        gathered: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(gathered, own)
        return gathered
