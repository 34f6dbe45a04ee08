"""Fit a context to a length: choose filler so that the rendered prompts just reach the limit.

A task named `Nk` promises, for every row, that the rendered prompt (instruction, documents, question)
plus the room for the answer takes at most N*1024 tokens of the model and at least 98% of that. The promise
is kept with the tokenizer's chat template applied, if it has one. Without the template the same prompt is
shorter by the template's tokens: never over the limit, and still within the 2% wherever the template is
small enough to leave room for both (SmolLM2's 30 tokens: yes from 2k on, no at 1k). A system instruction
given on the command line comes on top and is not counted.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TypeVar

import numpy as np

from lceval.tasks.tokens import TokenMeter

TOLERANCE = 0.02
_SPREAD_TOKENS = 8  # room that the questions on one context need: they differ in length
_GOOD_ENOUGH_TOKENS = 2  # below the limit; a tighter fit is not worth another rendering
_ATTEMPTS = 6
_ALIKE = 0.1  # by which a piece may differ from the cost it imitates

T = TypeVar("T")


@dataclass(frozen=True)
class Contract:
    """The totals that a row may have: at most `limit` tokens, at least `floor`."""

    limit: int
    floor: float

    @classmethod
    def promised(cls, limit: int) -> "Contract":
        """What the task's name promises, with the chat template applied."""
        return cls(limit, (1 - TOLERANCE) * limit)

    @classmethod
    def preferred(cls, limit: int, meter: TokenMeter) -> "Contract":
        """What also holds without the chat template; the promised one where there is no room for both."""
        floor = (1 - TOLERANCE) * limit + meter.template_tokens
        return cls(limit, floor) if limit - floor >= _SPREAD_TOKENS else cls.promised(limit)

    def holds(self, totals: Sequence[int]) -> bool:
        """Whether the totals of all questions on a context are allowed."""
        return self.floor <= min(totals) and max(totals) <= self.limit


def fill(capacity: int, costs: Sequence[int]) -> list[int]:
    """Choose pieces in the given order, then the one that best fills the rest.

    Args:
        capacity: Tokens to fill.
        costs: Tokens of each candidate, in the order in which they are to be considered.

    Returns:
        Indices of the chosen candidates; the sum of their costs is at most `capacity`.
    """
    reserve = median(costs) if costs else 0
    chosen: dict[int, None] = {}
    rest = capacity
    for index, cost in enumerate(costs):
        # Between one and two median pieces are left for the last: there most candidates are on offer.
        if rest <= 2 * reserve:
            break
        if cost <= rest - reserve:
            chosen[index] = None
            rest -= cost
    fitting = (index for index, cost in enumerate(costs) if cost <= rest and index not in chosen)
    last = max(fitting, key=costs.__getitem__, default=None)
    return [*chosen] if last is None else [*chosen, last]


def fill_alike(capacity: int, costs: Sequence[int], like: Sequence[int], first: int, rng: random.Random) -> list[int]:
    """Choose pieces whose costs are distributed as those of `like`.

    As many as fit at their mean; each takes its share of what is left, so that the last fills the rest.

    Args:
        capacity: Tokens to fill.
        costs: Tokens of each candidate, in the order in which they are to be considered.
        like: The costs to imitate; at least one.
        first: So many candidates are preferred to the others where their cost is about right.
        rng: Which costs are imitated.

    Returns:
        Indices of the chosen candidates; the sum of their costs is at most `capacity`.
    """
    size = np.array(costs)
    free = np.ones(len(size), bool)
    count = max(1, round(capacity * len(like) / sum(like)))
    wanted = [cost for _ in range(-(-count // len(like))) for cost in rng.sample(list(like), len(like))][:count]
    chosen: list[int] = []
    for place, cost in enumerate(wanted):
        target = cost * capacity / sum(wanted[place:])
        fitting = free & (size <= capacity)
        if not fitting.any():
            break
        off = np.where(fitting, np.abs(size - target), np.inf)
        good = off <= _ALIKE * target
        if place == len(wanted) - 1:
            at = int(np.where(fitting, size, -1).argmax())
        elif good[:first].any():
            at = int(good[:first].argmax())
        else:
            at = int(good.argmax()) if good.any() else int(off.argmin())
        chosen.append(at)
        free[at] = False
        capacity -= costs[at]
    return chosen


class Fitter:
    """Chooses pieces so that the rendered prompts on a context keep a contract.

    Costs of pieces measured one by one do not add up exactly to the tokens of a prompt (pieces merge,
    document numbers grow). The error is measured in a rendered prompt and corrected for until the choice
    fits; the next context starts from the error of the last.
    """

    def __init__(self, contract: Contract, choose: Callable[[int, Sequence[int]], list[int]] = fill) -> None:
        """`choose` is `fill`, or another function that fills a capacity."""
        self._contract = contract
        self._choose = choose
        self._error = 0  # tokens by which costs overstate what their pieces add to a prompt

    def fit(
        self,
        costs: Sequence[int],
        totals: Callable[[list[int]], list[int]],
        choose: Callable[[int, Sequence[int]], list[int]] | None = None,
    ) -> tuple[list[int], list[int]] | None:
        """Choose pieces.

        Args:
            costs: Estimated tokens of each candidate, in order of preference.
            totals: The exact totals of the questions on a context that has the pieces of the given indices.
            choose: Another function than the usual one, for this choice.

        Returns:
            The chosen indices and their totals, or None if no choice was found that keeps the contract.
        """
        limit = self._contract.limit
        room = limit - max(totals([]))
        if room < 0:
            return None
        best: tuple[list[int], list[int]] | None = None
        for _ in range(_ATTEMPTS):
            chosen = (choose or self._choose)(room + self._error, costs)
            reached = totals(chosen)
            self._error = sum(costs[index] for index in chosen) + limit - room - max(reached)
            if self._contract.holds(reached) and (best is None or max(reached) > max(best[1])):
                best = chosen, reached
            if best is not None and limit - max(best[1]) <= _GOOD_ENOUGH_TOKENS:
                break
        return best


def spread(golds: Sequence[T], fillers: Sequence[T], rng: random.Random) -> list[T]:
    """Interleave: each gold at a random place of its own stretch of the context, in random order.

    With n documents and k golds the context is cut into k stretches of n/k documents, so that every depth
    is asked for equally often.
    """
    count = len(golds) + len(fillers)
    edges = [count * stretch // len(golds) for stretch in range(len(golds) + 1)]
    places = [rng.randrange(start, end) for start, end in pairwise(edges)]
    placed = dict(zip(places, rng.sample(list(golds), len(golds)), strict=True))
    rest = iter(fillers)
    return [placed[place] if place in placed else next(rest) for place in range(count)]
