"""Judges and their names: `openai:MODEL[#REVISION]@BASE_URL`, `hf:NAME[#REVISION]`, `rule`."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from lceval.core.errors import UserError
from lceval.judge.protocol import Judge, JudgeName

VARIABLE = "LCEVAL_JUDGE"
NAME_FORMATS = "openai:MODEL@BASE_URL, hf:NAME or rule"


def parse(text: str) -> JudgeName:
    """Parse a judge name.

    Raises:
        UserError: the name is invalid, or its address contains credentials.
    """
    kind, _, rest = text.strip().partition(":")
    if kind == "rule" and not rest:
        return JudgeName("rule")
    if kind == "hf" and rest:
        model, _, revision = rest.partition("#")
        return JudgeName("hf", model, revision)
    model, at, url = rest.partition("@http")
    if kind == "openai" and model and at:
        parts = urlsplit(f"http{url}")
        if parts.username or parts.password or parts.query:
            raise UserError(
                "the judge's address must not contain user, password or query: set LCEVAL_JUDGE_KEY instead"
            )
        if parts.scheme in ("http", "https") and parts.hostname:
            model, _, revision = model.partition("#")
            return JudgeName("openai", model, revision, f"http{url}".rstrip("/"))
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
        from lceval.judge.backends.rule import RuleJudge

        return RuleJudge()
    if parsed.kind == "hf":
        from lceval.judge.backends.hf import LocalJudge

        return LocalJudge(parsed, max_tokens=max_tokens)
    from lceval.judge.backends.openai import EndpointJudge

    return EndpointJudge(parsed, timeout=timeout, max_tokens=max_tokens)
