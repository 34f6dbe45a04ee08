"""The protocol of judges: what a backend implements, and how it reports a failure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lceval.judge.replies import Reply
from lceval.judge.rubrics import Case, Prompt, Rubric


class TryAgainError(Exception):
    """A transient failure: a timeout, a rate limit, a server error.

    after: `Retry-After` of the server in seconds, or None.
    """

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class RefusedError(Exception):
    """A permanent failure for this prompt."""


class Judge(Protocol):
    """Protocol of judges.

    Attributes:
        name: the requested name; part of the cache key of replies.
        revision: version of the judge, also part of the key; "" if unknown.
        label: its name in tables.
        parallel: whether `ask` is thread-safe.
        priced: whether calls and tokens count against a budget.
    """

    name: str
    revision: str
    parallel: bool
    priced: bool

    @property
    def label(self) -> str: ...

    def ask(self, rubric: Rubric, case: Case, prompt: Prompt) -> Reply:
        """One reply.

        Raises:
            TryAgainError, RefusedError: a transient or permanent failure.
            UserError: no call can succeed (a wrong key, an unknown model).
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class JudgeName:
    """A parsed judge name."""

    kind: str
    model: str = ""
    revision: str = ""
    url: str = ""

    def __str__(self) -> str:
        """The name without the revision, which is a separate part of the key."""
        return self.kind + (f":{self.model}" if self.model else "") + (f"@{self.url}" if self.url else "")
