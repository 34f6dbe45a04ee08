"""What can be a judge, and how one is named: `openai:MODEL[#REVISION]@BASE_URL`, `hf:NAME[#REVISION]`, `rule`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from lceval.errors import UserError
from lceval.judge.rubrics import Case, Prompt, Rubric
from lceval.judge.store import Reply

VARIABLE = "LCEVAL_JUDGE"
OUTPUT_FORMATS = "openai:MODEL@BASE_URL, hf:NAME or rule"


class TryAgainError(Exception):
    """This call failed and another may not: a timeout, a limit on calls, a fault of the server.

    after: seconds that the server asks to wait, None where it does not say.
    """

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class RefusedError(Exception):
    """This prompt will not be answered however often it is sent."""


class Judge(Protocol):
    """Answers prompts.

    Attributes:
        name: as it was asked for; part of what replies are filed under.
        revision: what else tells its replies from those of another with that name; "" where nothing is known.
        label: its name in tables.
        parallel: whether `ask` may be called from several threads at once.
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
            TryAgainError, RefusedError: as they say.
            UserError: no prompt will be answered (a wrong key, an unknown model).
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Spec:
    """A judge's name, taken apart."""

    kind: str
    model: str = ""
    revision: str = ""
    url: str = ""

    def __str__(self) -> str:
        """Without the revision, which is filed apart."""
        return self.kind + (f":{self.model}" if self.model else "") + (f"@{self.url}" if self.url else "")


def parse(text: str) -> Spec:
    """A judge's name taken apart.

    Raises:
        UserError: it is none, or its address holds a password.
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
            raise UserError("the judge's address must hold no user, password or query: keys come from LCEVAL_JUDGE_KEY")
        if parts.scheme in ("http", "https") and parts.hostname:
            model, _, revision = model.partition("#")
            return Spec("openai", model, revision, f"http{url}".rstrip("/"))
    # What was given may be a key in the wrong place: it is not repeated.
    known = f"{kind}:…" if kind in ("openai", "hf", "rule") else "what was given"
    raise UserError(f"cannot read the judge's name ({known}): expected {OUTPUT_FORMATS}")


def chosen(spec: str | None) -> str:
    """The judge asked for, else that of LCEVAL_JUDGE.

    Raises:
        UserError: neither names one.
    """
    if found := spec or os.environ.get(VARIABLE):
        return found
    raise UserError(f"no judge: pass --judge or set {VARIABLE} ({OUTPUT_FORMATS})")


def make(spec: str, *, timeout: float, max_tokens: int | None = None) -> Judge:
    """A judge by name; a local model is loaded here.

    Args:
        timeout: seconds that an endpoint may take for one reply.
        max_tokens: of a reply; None takes the rubric's.
    """
    asked = parse(spec)
    if asked.kind == "rule":
        from lceval.judge.rule import RuleJudge

        return RuleJudge()
    if asked.kind == "hf":
        from lceval.judge.local import LocalJudge

        return LocalJudge(asked, max_tokens=max_tokens)
    from lceval.judge.endpoint import EndpointJudge

    return EndpointJudge(asked, timeout=timeout, max_tokens=max_tokens)
