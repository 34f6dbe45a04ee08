"""Fit a context to a length: select filler documents so that the rendered prompts reach the limit within 2%.

For every row of a task `Nk`, the rendered prompt (system instruction, task instruction, documents, question) plus the
tokens reserved for the reply come to at most N*1024 tokens and at least 98% of that, with the tokenizer's chat template
applied, if it has one. Without the template the prompt is shorter by the template's tokens: never over the limit, and
still within 2% if the template is small enough (SmolLM2's 30 tokens are from 2k on, not at 1k). A template without a
system turn drops the system instruction: the prompt is then shorter by it.
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
_SPREAD_TOKENS = 8  # the questions on a context differ in length
_GOOD_ENOUGH_TOKENS = 2  # below the limit; a tighter fit does not justify another rendering
_ATTEMPTS = 6
_LENGTH_TOLERANCE = 0.1  # maximum relative difference from the target cost

T = TypeVar("T")


@dataclass(frozen=True)
class Contract:
    """Allowed total tokens of a row: `floor` to `limit`."""

    limit: int
    floor: float

    @classmethod
    def guaranteed(cls, limit: int) -> "Contract":
        """The guaranteed length, with the chat template applied."""
        return cls(limit, (1 - TOLERANCE) * limit)

    @classmethod
    def preferred(cls, limit: int, meter: TokenMeter) -> "Contract":
        """A contract that is also met without the chat template; `guaranteed` if the template is too long for that."""
        floor = (1 - TOLERANCE) * limit + meter.template_tokens
        return cls(limit, floor) if limit - floor >= _SPREAD_TOKENS else cls.guaranteed(limit)

    def allows(self, totals: Sequence[int]) -> bool:
        """Return whether the totals of all questions on a context are allowed."""
        return self.floor <= min(totals) and max(totals) <= self.limit


def fill(capacity: int, costs: Sequence[int]) -> list[int]:
    """Select candidates in order, then the one that best fills the remainder.

    Args:
        capacity: Tokens to fill.
        costs: Tokens of each candidate, in order of preference.

    Returns:
        Indices of the selected candidates; the sum of their costs is at most `capacity`.
    """
    reserve = median(costs) if costs else 0
    chosen: dict[int, None] = {}
    rest = capacity
    for index, cost in enumerate(costs):
        # One to two median costs are left for the last candidate: most candidates are of about that length.
        if rest <= 2 * reserve:
            break
        if cost <= rest - reserve:
            chosen[index] = None
            rest -= cost
    fitting = (index for index, cost in enumerate(costs) if cost <= rest and index not in chosen)
    last = max(fitting, key=costs.__getitem__, default=None)
    return [*chosen] if last is None else [*chosen, last]


def fill_length_matched(
    capacity: int, costs: Sequence[int], reference_costs: Sequence[int], preferred: int, rng: random.Random
) -> list[int]:
    """Select candidates whose costs follow the distribution of `reference_costs`.

    The number is what fits at the mean reference cost. Targets are rescaled to the remaining capacity after each
    selection, so that the last candidate fills the remainder.

    Args:
        capacity: Tokens to fill.
        costs: Tokens of each candidate, in order of preference.
        reference_costs: Costs to match; at least one.
        preferred: The first `preferred` candidates are used before the others if their cost is close to the target.
        rng: Draws the targets.

    Returns:
        Indices of the selected candidates; the sum of their costs is at most `capacity`.
    """
    sizes = np.array(costs)
    free = np.ones(len(sizes), bool)
    count = max(1, round(capacity * len(reference_costs) / sum(reference_costs)))
    repeats = -(-count // len(reference_costs))
    targets = [cost for _ in range(repeats) for cost in rng.sample(list(reference_costs), len(reference_costs))][:count]
    chosen: list[int] = []
    for position, cost in enumerate(targets):
        target = cost * capacity / sum(targets[position:])
        fitting = free & (sizes <= capacity)
        if not fitting.any():
            break
        difference = np.where(fitting, np.abs(sizes - target), np.inf)
        close = difference <= _LENGTH_TOLERANCE * target
        if position == len(targets) - 1:
            index = int(np.where(fitting, sizes, -1).argmax())
        elif close[:preferred].any():
            index = int(close[:preferred].argmax())
        else:
            index = int(close.argmax()) if close.any() else int(difference.argmin())
        chosen.append(index)
        free[index] = False
        capacity -= costs[index]
    return chosen


class Fitter:
    """Selects documents so that the rendered prompts on a context meet a contract, the first that can be met.

    Token counts of single documents do not add up exactly to those of a prompt (tokens merge, document numbers grow).
    The error is measured on a rendered prompt and corrected for until the selection fits; the next context starts from
    the last error.
    """

    def __init__(self, *contracts: Contract) -> None:
        self._contracts = contracts
        # By contract: tokens by which the costs exceed what the documents add to a prompt.
        self._errors = [0] * len(contracts)

    @classmethod
    def preferred(cls, limit: int, meter: TokenMeter) -> "Fitter":
        """A fitter that falls back to the guaranteed length where the preferred one cannot be met."""
        return cls(Contract.preferred(limit, meter), Contract.guaranteed(limit))

    def fit(
        self,
        costs: Sequence[int],
        arrange: Callable[[Sequence[int]], tuple[T, list[int]]],
        choose: Callable[[int, Sequence[int]], list[int]] = fill,
    ) -> tuple[T, list[int]] | None:
        """Select candidates for one context.

        Args:
            costs: Estimated tokens of each candidate, in order of preference.
            arrange: Returns the context with the candidates of the given indices, and the exact total of each question
                on it.
            choose: `(capacity, costs) -> indices`.

        Returns:
            The context and its totals; None if no selection was found that meets a contract.
        """
        empty = max(arrange([])[1])
        for number, contract in enumerate(self._contracts):
            room = contract.limit - empty
            best: tuple[T, list[int]] | None = None
            for _ in range(_ATTEMPTS if room >= 0 else 0):
                chosen = choose(room + self._errors[number], costs)
                context, measured = arrange(chosen)
                self._errors[number] = sum(costs[index] for index in chosen) + empty - max(measured)
                if contract.allows(measured) and (best is None or max(measured) > max(best[1])):
                    best = context, measured
                if best is not None and contract.limit - max(best[1]) <= _GOOD_ENOUGH_TOKENS:
                    break
            if best is not None:
                return best
        return None


def spread(golds: Sequence[T], fillers: Sequence[T], rng: random.Random) -> list[T]:
    """Place each gold document at a random position of its own segment of the context, in random order.

    With n documents and k golds the context is divided into k segments of n/k documents, so that all depths are
    equally frequent.
    """
    count = len(golds) + len(fillers)
    segment_starts = [count * segment // len(golds) for segment in range(len(golds) + 1)]
    positions = [rng.randrange(start, end) for start, end in pairwise(segment_starts)]
    gold_at = dict(zip(positions, rng.sample(list(golds), len(golds)), strict=True))
    remaining = iter(fillers)
    return [gold_at[position] if position in gold_at else next(remaining) for position in range(count)]
