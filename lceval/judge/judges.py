"""Judges and their names: `openai:MODEL[#REVISION]@BASE_URL`, `hf:NAME[#REVISION]`, `rule`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from lceval.errors import UserError
from lceval.judge.rubrics import Case, Prompt, Rubric
from lceval.judge.store import Reply

VARIABLE = "LCEVAL_JUDGE"
NAME_FORMATS = "openai:MODEL@BASE_URL, hf:NAME or rule"


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
class Spec:
    """A parsed judge name."""

    kind: str
    model: str = ""
    revision: str = ""
    url: str = ""

    def __str__(self) -> str:
        """The name without the revision, which is a separate part of the key."""
        return self.kind + (f":{self.model}" if self.model else "") + (f"@{self.url}" if self.url else "")


def parse(text: str) -> Spec:
    """Parse a judge name.

    Raises:
        UserError: the name is invalid, or its address contains credentials.
    """
    kind, _, rest = text.strip().partition(":")
    if kind == "rule" and not rest:
        return Spec("rule")
    if kind == "hf" and rest:
        model, _, revision = rest.partition("#")
        return Spec("hf", model, revision)
    model, at, url = rest.partition("@http")
    if kind == "openai" and model and at:
        parts = urlsplit(f"http{url}")
        if parts.username or parts.password or parts.query:
            raise UserError(
                "the judge's address must not contain user, password or query: set LCEVAL_JUDGE_KEY instead"
            )
        if parts.scheme in ("http", "https") and parts.hostname:
            model, _, revision = model.partition("#")
            return Spec("openai", model, revision, f"http{url}".rstrip("/"))
    # The value may be a misplaced key, so it is not printed.
    hint = f" ({kind}:…)" if kind in ("openai", "hf", "rule") else ""
    raise UserError(f"cannot read the judge's name{hint}: expected {NAME_FORMATS}")


def chosen(spec: str | None) -> str:
    """The given judge name, else that of LCEVAL_JUDGE.

    Raises:
        UserError: neither is set.
    """
    if name := spec or os.environ.get(VARIABLE):
        return name
    raise UserError(f"no judge: pass --judge or set {VARIABLE} ({NAME_FORMATS})")


def make(spec: str, *, timeout: float, max_tokens: int | None = None) -> Judge:
    """Create a judge by name; a local model is loaded here.

    Args:
        timeout: timeout of an endpoint call in seconds.
        max_tokens: maximum tokens of a reply; None: the rubric's limit.
    """
    parsed = parse(spec)
    if parsed.kind == "rule":
        from lceval.judge.rule import RuleJudge

        return RuleJudge()
    if parsed.kind == "hf":
        from lceval.judge.local import LocalJudge

        return LocalJudge(parsed, max_tokens=max_tokens)
    from lceval.judge.endpoint import EndpointJudge

    return EndpointJudge(parsed, timeout=timeout, max_tokens=max_tokens)
