"""Splits prompts into context and question, groups them by context, and fits them to the model's length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lceval.errors import UserError


@dataclass(frozen=True)
class Job:
    """One prompt, split at the end of its context.

    Attributes:
        index: index of the request, and of its response.
        ids: tokens of the prompt.
        boundary: number of context tokens; the rest is the question.
        has_context: whether the doc's context is part of the prompt. If not, the prompt runs uncompressed.
        truncated: whether context tokens were removed to fit the model's length.
        answer_tokens: the maximum number of tokens that are fed after the prompt.
        payload: data of the caller: generation arguments, or the choices to score.
        prompt, doc: the text, and the task's row it was rendered from.
    """

    index: int
    ids: tuple[int, ...]
    boundary: int
    has_context: bool
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
        """Maximum number of tokens after the context: question and answer."""
        return len(self.question) + self.answer_tokens


def find_boundary(
    prompt: str, ids: Sequence[int], context: str | None, encode: Callable[[str], Sequence[int]]
) -> int | None:
    """The number of prompt tokens up to the end of its context, including everything before the context.

    Tokens may merge across the boundary, so it lies after the last token that the prompt shares with its own text up
    to the end of the context. At least one token is left for the question. None if the prompt does not contain
    `context`.
    """
    at = prompt.rfind(context) if context else -1
    if at < 0 or context is None:
        return None
    shared = 0
    for prefix_id, prompt_id in zip(encode(prompt[: at + len(context)]), ids, strict=False):
        if prefix_id != prompt_id:
            break
        shared += 1
    return min(shared, len(ids) - 1)


def truncate(ids: Sequence[int], boundary: int, excess: int, where: str) -> tuple[tuple[int, ...], int]:
    """Remove `excess` context tokens from the context's `end` or `middle`; returns the ids and the new boundary."""
    kept = boundary - excess
    assert kept >= 0, "only context tokens may be removed"
    head = kept if where == "end" else kept - kept // 2
    return (*ids[:head], *ids[head + excess :]), kept


def fit(jobs: Sequence[Job], max_length: int, overlong: str, names: Sequence[str]) -> list[Job]:
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


def by_context(jobs: Iterable[Job]) -> list[list[Job]]:
    """The jobs grouped by context, in order of first appearance."""
    groups: dict[tuple[bool, tuple[int, ...]], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.has_context, job.context), []).append(job)
    return list(groups.values())
