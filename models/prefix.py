"""Where a prompt's context ends and its question begins, which prompts share a context, and which fit the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lceval.errors import UserError


@dataclass(frozen=True)
class Job:
    """One prompt, cut at the end of its context.

    Attributes:
        index: its place among the requests, where the response goes.
        ids: the prompt's tokens.
        boundary: how many of them belong to the context; the rest is the question.
        found: whether the doc's context was found in the prompt. If not, there is nothing to compress.
        truncated: whether context tokens were cut away to make the prompt fit.
        answer_tokens: how many tokens may be read after the prompt.
        payload: whatever the caller needs to finish the job.
        prompt, doc: the text, and the row of the task that it was made from.
    """

    index: int
    ids: tuple[int, ...]
    boundary: int
    found: bool
    truncated: bool = False
    answer_tokens: int = 0
    payload: Any = field(default=None, compare=False)
    prompt: str = ""
    doc: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def context(self) -> tuple[int, ...]:
        return self.ids[: self.boundary]

    @property
    def question(self) -> tuple[int, ...]:
        return self.ids[self.boundary :]

    @property
    def room(self) -> int:
        """Tokens that follow the context: the question, and the longest answer that is read after it."""
        return len(self.question) + self.answer_tokens


def find_boundary(
    prompt: str, ids: Sequence[int], context: str | None, encode: Callable[[str], Sequence[int]]
) -> int | None:
    """How many of the prompt's tokens belong to its context and whatever stands before it.

    Tokens may merge across the cut, so the cut goes after the last token that the prompt shares with its own
    beginning. At least one token is left to the question. None if the prompt does not contain `context`.
    """
    at = prompt.rfind(context) if context else -1
    if at < 0 or context is None:
        return None
    shared = 0
    for ours, theirs in zip(encode(prompt[: at + len(context)]), ids, strict=False):
        if ours != theirs:
            break
        shared += 1
    return min(shared, len(ids) - 1)


def cut(ids: Sequence[int], boundary: int, excess: int, where: str) -> tuple[tuple[int, ...], int]:
    """Drop `excess` context tokens at the context's `end` or from its `middle`; returns the ids and the boundary."""
    kept = boundary - excess
    assert kept >= 0, "only context tokens may be cut"
    head = kept if where == "end" else kept - kept // 2
    return (*ids[:head], *ids[head + excess :]), kept


def fit(jobs: Sequence[Job], max_length: int, overlong: str, names: Sequence[str]) -> list[Job]:
    """The jobs that will run, cut to `max_length` tokens where `overlong` says so.

    Args:
        names: the task of each request.

    Raises:
        UserError: some are too long, and none of `skip`, `middle` and `end` was asked for.
    """
    fitting, too_long = [], []
    for job in jobs:
        excess = job.boundary + job.room - max_length
        if excess <= 0:
            fitting.append(job)
        elif overlong in ("middle", "end") and excess <= job.boundary:
            ids, boundary = cut(job.ids, job.boundary, excess, overlong)
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
    """Rows of one length, padded on the left."""
    longest = max(len(row) for row in rows)
    return [[pad] * (longest - len(row)) + list(row) for row in rows]


def by_context(jobs: Iterable[Job]) -> list[list[Job]]:
    """The jobs, those with the same context together, in order of first appearance."""
    groups: dict[tuple[bool, tuple[int, ...]], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.found, job.context), []).append(job)
    return list(groups.values())
