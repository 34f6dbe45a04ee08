"""Client of a judge: parallel calls with retries, a budget, and a reply cache.

A case without a verdict is counted with its reason and never scored: all retries failed, the budget is exhausted, or
the reply is unparsable.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from lceval.core.errors import UserError
from lceval.judge import verdicts
from lceval.judge.backends.rule import RuleJudge
from lceval.judge.protocol import Judge, RefusedError, TryAgainError
from lceval.judge.replies import Key, Reply, Store
from lceval.judge.rubrics import MAX_CHARACTERS, Case, Label, Prompt, Rubric, render

_LONGEST_WAIT_S = 30.0
_LONGEST_RETRY_AFTER_S = 120.0  # limit on a server's Retry-After
_CHARACTERS_A_TOKEN = 3  # low estimate, to bound the tokens of a call in advance
_GIVE_UP_AFTER = 3  # times the concurrency: consecutive calls that failed all retries


@dataclass(frozen=True)
class Limits:
    """Limits on calls.

    Attributes:
        concurrency: parallel calls.
        retries: maximum retries of a failed call.
        calls: maximum calls of this command, retries included; None: unlimited.
        tokens: maximum total tokens of prompts and replies; a call is made only if its estimated prompt and the
            longest reply fit.
        first_wait: seconds before the first retry, doubled each time up to 30 s, with a jitter of 50 to 100%.
        timeout: seconds of a call to an endpoint.
        max_tokens: maximum tokens of a reply; None: the rubric's limit.
        max_characters: maximum characters of a block of the prompt.
    """

    concurrency: int = 16
    retries: int = 6
    calls: int | None = None
    tokens: int | None = None
    first_wait: float = 0.5
    timeout: float = 120.0
    max_tokens: int | None = None
    max_characters: int = MAX_CHARACTERS

    def __post_init__(self) -> None:
        for name, minimum in (("concurrency", 1), ("retries", 0), ("calls", 0), ("tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"--{name} {value}: expected {minimum} or more")


@dataclass(frozen=True)
class Verdict:
    """The verdict on one case.

    Attributes:
        grades: by field; None if unjudged.
        reason: why it is unjudged: "unparsable", "empty", "cut" (truncated reply), "budget", "stopped" or the error of
            the call.
        clipped: number of characters omitted from the prompt.
    """

    grades: dict[str, Label | float] | None
    reason: str
    reply: str
    prompt: str
    clipped: int


@dataclass
class Spent:
    """Usage: calls, reused replies, tokens as counted by the judge, and served models."""

    calls: int = 0
    reused: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    retried: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Request:
    key: Key
    case: Case
    prompt: Prompt


class Client:
    """Client of one judge; the budget applies to all its calls."""

    def __init__(
        self,
        judge: Judge,
        store: Store,
        limits: Limits | None = None,
        *,
        on_verdict: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """on_verdict: called with (done, total) as replies arrive."""
        self.judge, self.limits, self.spent = judge, limits or Limits(), Spent()
        self._store, self._on_verdict = store, on_verdict
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._reserved = self._failed_in_a_row = 0

    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The judge, its results, and the calls and tokens used."""
        return {
            "judge": self.judge.name,
            "label": self.judge.label,
            "revision": self.judge.revision,
            "rule_based": isinstance(self.judge, RuleJudge),
            **results,
            **deepcopy(vars(self.spent)),
        }

    def judge_all(self, rubric: Rubric, cases: Sequence[Case], *, repeat: int = 0) -> list[Verdict]:
        """One verdict per case, in order. Equal prompts are sent once.

        Raises:
            UserError: no call can succeed (a wrong key, an unknown model).
        """
        requests = []
        for case in cases:
            prompt = render(rubric, case, repeat=repeat, limit=self.limits.max_characters)
            key = Key(self.judge.name, self.judge.revision, rubric.key, prompt.hash, repeat)
            requests.append(_Request(key, case, prompt))
        unique = {request.key: request for request in requests}
        replies: dict[Key, Reply | str] = {key: reply for key in unique if (reply := self._store.get(key)) is not None}
        self.spent.reused += len(replies)
        self._call_all(rubric, [request for key, request in unique.items() if key not in replies], replies)
        return [self._verdict(rubric, request, replies[request.key]) for request in requests]

    def _call_all(self, rubric: Rubric, requests: list[_Request], replies: dict[Key, Reply | str]) -> None:
        total = len(replies) + len(requests)
        self._on_verdict(len(replies), total)
        if not self.judge.parallel or self.limits.concurrency == 1:
            for request in requests:
                replies[request.key] = self._call(rubric, request)
                self._on_verdict(len(replies), total)
            return
        pool = ThreadPoolExecutor(self.limits.concurrency, thread_name_prefix="judge")
        try:
            pending = {pool.submit(self._call, rubric, request): request.key for request in requests}
            for future in as_completed(pending):
                replies[pending[future]] = future.result()
                self._on_verdict(len(replies), total)
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _call(self, rubric: Rubric, request: _Request) -> Reply | str:
        """The reply, already stored on disk, or the reason for its absence."""
        characters = len(request.prompt.system) + len(request.prompt.user)
        estimate = characters // _CHARACTERS_A_TOKEN + (self.limits.max_tokens or rubric.max_tokens)
        for attempt in range(self.limits.retries + 1):
            if self._stop.is_set():
                return "stopped"
            if not self._reserve(estimate):
                return "budget"
            counted = 0
            try:
                reply = self.judge.ask(rubric, request.case, request.prompt)
                self._store.put(request.key, reply)
                counted = reply.tokens_in + reply.tokens_out or estimate
                self._succeeded(reply)
                return reply
            except TryAgainError as error:
                reason, pause = str(error), self._pause(attempt, error.after)
            except RefusedError as error:
                return f"refused: {error}"
            finally:
                with self._lock:
                    self._reserved += counted - estimate
            with self._lock:
                self.spent.retried[reason] += 1
            if attempt < self.limits.retries:
                self._stop.wait(pause)
        self._gave_up()
        return f"failed: {reason}"

    def _pause(self, attempt: int, retry_after: float | None) -> float:
        longest = min(self.limits.first_wait * 2**attempt, _LONGEST_WAIT_S)
        drawn = random.uniform(longest / 2, longest)  # does not affect results
        return max(drawn, min(retry_after, _LONGEST_RETRY_AFTER_S)) if retry_after is not None else drawn

    def _reserve(self, estimate: int) -> bool:
        """Reserve the budget of one more call; False if calls in flight and this one may exceed it."""
        if not self.judge.priced:
            return True
        with self._lock:
            if self.limits.calls is not None and self.spent.calls >= self.limits.calls:
                return False
            if self.limits.tokens is not None and self._reserved + estimate > self.limits.tokens:
                return False
            self.spent.calls += 1
            self._reserved += estimate
            return True

    def _succeeded(self, reply: Reply) -> None:
        with self._lock:
            self._failed_in_a_row = 0
            self.spent.tokens_in += reply.tokens_in
            self.spent.tokens_out += reply.tokens_out
            self.spent.served[reply.served] += 1

    def _gave_up(self) -> None:
        """Stop calling an endpoint that no longer answers."""
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= _GIVE_UP_AFTER * self.limits.concurrency:
                self._stop.set()

    def _verdict(self, rubric: Rubric, request: _Request, reply: Reply | str) -> Verdict:
        clipped = request.prompt.clipped
        if isinstance(reply, str):
            return Verdict(None, reply, "", request.prompt.hash, clipped)
        grades = verdicts.parse(rubric, reply.text)
        reason = "" if grades else "cut" if reply.cut else "unparsable" if reply.text.strip() else "empty"
        return Verdict(grades, reason, reply.text, request.prompt.hash, clipped)
