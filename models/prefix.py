"""Splits prompts into context and question, groups them by context, and fits them to the model's length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

from lceval.core.answers import Score, Text
from lceval.core.errors import UserError

# Generation arguments under which a row's output (or its distribution) depends on its own prompt only, so that rows can
# share a batch.
BATCHED = {"do_sample", "temperature", "top_p", "top_k", "min_p"}


@dataclass(frozen=True)
class Job:
    """One prompt, split at the end of its context.

    Attributes:
        index: index of the request, and of its response.
        ids: tokens of the prompt.
        boundary: number of context tokens; the rest is the question.
        has_context: whether the end of a context was found. If not, the prompt runs uncompressed.
        truncated: whether context tokens were removed to fit the model's length.
        prompt, doc: the text, and the task's row it was rendered from.
    """

    index: int
    ids: tuple[int, ...]
    boundary: int
    has_context: bool
    truncated: bool = False
    prompt: str = ""
    doc: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def context(self) -> tuple[int, ...]:
        return self.ids[: self.boundary]

    @property
    def question(self) -> tuple[int, ...]:
        return self.ids[self.boundary :]

    @property
    def answer_tokens(self) -> int:
        """The maximum number of tokens that are fed after the prompt."""
        return 0

    @property
    def room(self) -> int:
        """Maximum number of tokens after the context: question and answer."""
        return len(self.question) + self.answer_tokens

    def renumbered(self, number: Callable[[int], int]) -> Self:
        """The same prompt with other indices of its requests."""
        return replace(self, index=number(self.index))

    def can_share_batch(self, other: Job) -> bool:
        """Whether both can be rows of one batch."""
        return type(self) is type(other)

    def unanswered(self, meta: dict[str, Any]) -> list[tuple[int, Any]]:
        """The index of each request with the response that stands for no answer."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GenerateJob(Job):
    """A prompt to continue.

    Attributes:
        until: stop sequences.
        max_new_tokens: maximum tokens of the answer; 0 measures only.
        sampling: all other generation arguments.
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer_tokens(self) -> int:
        return self.max_new_tokens

    def can_share_batch(self, other: Job) -> bool:
        return (
            isinstance(other, GenerateJob)
            and (self.until, self.max_new_tokens, self.sampling) == (other.until, other.max_new_tokens, other.sampling)
            and {*self.sampling} <= BATCHED
        )

    def unanswered(self, meta: dict[str, Any]) -> list[tuple[int, Text]]:
        return [(self.index, Text("", meta))]


@dataclass(frozen=True)
class Choice:
    """A continuation to score: the index of its request, and its tokens."""

    index: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreJob(Job):
    """A prompt with all of its continuations, which are scored together."""

    choices: tuple[Choice, ...]

    def renumbered(self, number: Callable[[int], int]) -> Self:
        choices = tuple(replace(choice, index=number(choice.index)) for choice in self.choices)
        return replace(super().renumbered(number), choices=choices)

    @property
    def answer_tokens(self) -> int:
        # The last token of a continuation is scored but never fed to the model.
        return max(len(choice.tokens) for choice in self.choices) - 1

    def unanswered(self, meta: dict[str, Any]) -> list[tuple[int, Score]]:
        return [(choice.index, Score((-math.inf, False), meta)) for choice in self.choices]


J = TypeVar("J", bound=Job)


def truncate(ids: Sequence[int], boundary: int, excess: int, where: str) -> tuple[tuple[int, ...], int]:
    """Remove `excess` context tokens from the context's `end` or `middle`; returns the ids and the new boundary."""
    kept = boundary - excess
    assert kept >= 0, "only context tokens may be removed"
    head = kept if where == "end" else kept - kept // 2
    return (*ids[:head], *ids[head + excess :]), kept


def fit(jobs: Sequence[J], max_length: int, overlong: str, names: Sequence[str]) -> list[J]:
    """The jobs that will run, truncated to `max_length` tokens under overlong=middle and overlong=end.

    Args:
        names: task name of each request.

    Raises:
        UserError: some do not fit, and `overlong` is `error`, or their question alone is too long to truncate.
    """
    fitting, too_long = [], []
    for job in jobs:
        excess = job.boundary + job.room - max_length
        if excess <= 0:
            fitting.append(job)
        elif overlong in ("middle", "end") and excess <= job.boundary:
            ids, boundary = truncate(job.ids, job.boundary, excess, overlong)
            fitting.append(replace(job, ids=ids, boundary=boundary, truncated=True))
        else:
            too_long.append((names[job.index], job.boundary + job.room))
    if too_long and overlong != "skip":
        tasks = Counter(name for name, _ in too_long)
        named = ", ".join(
            f"{name} ({n}x, longest {max(t for m, t in too_long if m == name)})" for name, n in tasks.items()
        )
        raise UserError(
            f"{len(too_long)} of {len(jobs)} prompts do not fit the model's {max_length} tokens: {named}; "
            "choose a shorter length, or pass overlong=skip, overlong=middle or overlong=end in --model_args"
        )
    return fitting


def padded(rows: Sequence[Sequence[int]], pad: int) -> list[list[int]]:
    """Rows padded on the left to the same length."""
    longest = max(len(row) for row in rows)
    return [[pad] * (longest - len(row)) + list(row) for row in rows]


def whole_rows(jobs: Iterable[Job], length: int, pad: int) -> list[tuple[list[int], list[int]]]:
    """Per job its context, padding and question in `length` tokens, and the mask that is 0 on the padding."""
    return [
        (
            [*job.context, *[pad] * (length - len(job.ids)), *job.question],
            [*[1] * job.boundary, *[0] * (length - len(job.ids)), *[1] * len(job.question)],
        )
        for job in jobs
    ]


def by_context(jobs: Iterable[J]) -> list[list[J]]:
    """The jobs grouped by context, in order of first appearance."""
    groups: dict[tuple[bool, tuple[int, ...]], list[J]] = {}
    for job in jobs:
        groups.setdefault((job.has_context, job.context), []).append(job)
    return list(groups.values())
