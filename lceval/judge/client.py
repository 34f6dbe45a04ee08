"""Asks a judge many things: in parallel, with retries, within a budget, and never twice for the same reply.

What cannot be had is counted, with its reason, and never scored: a call that failed to the end, a budget that is spent,
a reply that cannot be read.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from lceval.errors import UserError
from lceval.judge import verdicts
from lceval.judge.judges import Judge, RefusedError, TryAgainError
from lceval.judge.rubrics import MAX_CHARACTERS, Case, Label, Prompt, Rubric, render
from lceval.judge.store import Key, Reply, Store

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LONGEST_ASKED_WAIT_S = 120.0  # what a server may ask for
_CHARACTERS_A_TOKEN = 3  # a cautious guess, for what a call will cost before it is made
_HOPELESS = 3  # times the concurrency: calls that failed to the end, none having succeeded between


@dataclass(frozen=True)
class Limits:
    """How a judge may be asked.

    Attributes:
        concurrency: calls at a time.
        retries: further attempts at a call that failed.
        calls: attempts altogether, in this run of the command; None for any number.
        tokens: of prompts and replies altogether; a call is made only if its prompt (guessed) and the longest
            reply fit.
        first_wait: seconds before the first retry, doubled each time up to half a minute; the wait is drawn between
            half of that and all of it.
    """

    concurrency: int = 16
    retries: int = 6
    calls: int | None = None
    tokens: int | None = None
    first_wait: float = _FIRST_WAIT_S

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0), ("calls", 0), ("tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} {value}: expected {least} or more")


@dataclass(frozen=True)
class Verdict:
    """What became of one case.

    Attributes:
        grades: by field; None where it is unjudged.
        reason: why it is unjudged: "unparsable", "empty", "cut", "budget", "stopped" or what the call failed with.
        clipped: characters that the judge was not shown.
    """

    grades: dict[str, Label | float] | None
    reason: str
    reply: str
    prompt: str
    clipped: int
    repeat: int = 0


@dataclass
class Spent:
    """What asking took: calls made and replies reused, tokens as the judge counts them, who served."""

    calls: int = 0
    reused: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    retried: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Ask:
    key: Key
    case: Case
    prompt: Prompt


class Client:
    """Asks one judge; its budget is for all that it is asked."""

    def __init__(
        self,
        judge: Judge,
        store: Store,
        limits: Limits | None = None,
        *,
        max_characters: int = MAX_CHARACTERS,
        max_tokens: int | None = None,
        on_verdict: Callable[[int, int], None] | None = None,
    ) -> None:
        """
        Args:
            max_characters: of a block that the judge is shown.
            max_tokens: of a reply, where the judge was not made with the rubrics' own limits.
            on_verdict: called with (done, total) as replies come.
        """
        self.judge, self.limits, self.spent = judge, limits or Limits(), Spent()
        self._store, self._max_characters, self._on_verdict = store, max_characters, on_verdict
        self._lock = threading.Lock()
        self._reserved, self._max_tokens = 0, max_tokens
        self._stop = threading.Event()
        self._failed_in_a_row = 0

    def judge_all(self, rubric: Rubric, cases: Sequence[Case], *, repeat: int = 0) -> list[Verdict]:
        """A verdict a case, in their order. Equal prompts are asked once.

        Raises:
            UserError: no call can succeed (a wrong key, an unknown model).
        """
        asks = []
        for case in cases:
            prompt = render(rubric, case, repeat=repeat, limit=self._max_characters)
            asks.append(_Ask(Key(self.judge.name, self.judge.revision, rubric.key, prompt.hash, repeat), case, prompt))
        replies: dict[Key, Reply | str] = {}
        missing: dict[Key, _Ask] = {}
        for ask in asks:
            if ask.key not in replies and (kept := self._store.get(ask.key)) is not None:
                replies[ask.key] = kept
                self.spent.reused += 1
            elif ask.key not in replies:
                missing[ask.key] = ask
        self._ask_all(rubric, list(missing.values()), replies, len(replies) + len(missing))
        return [self._verdict(rubric, ask, replies[ask.key], repeat) for ask in asks]

    def _ask_all(self, rubric: Rubric, asks: list[_Ask], replies: dict[Key, Reply | str], total: int) -> None:
        self._tell(len(replies), total)
        if not self.judge.parallel or self.limits.concurrency == 1:
            for ask in asks:
                replies[ask.key] = self._ask(rubric, ask)
                self._tell(len(replies), total)
            return
        pool = ThreadPoolExecutor(self.limits.concurrency, thread_name_prefix="judge")
        try:
            pending = {pool.submit(self._ask, rubric, ask): ask.key for ask in asks}
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    replies[pending.pop(future)] = future.result()
                self._tell(len(replies), total)
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _tell(self, done: int, total: int) -> None:
        if self._on_verdict is not None:
            self._on_verdict(done, total)

    def _ask(self, rubric: Rubric, ask: _Ask) -> Reply | str:
        """The reply, on disk when it is returned; or why there is none."""
        written = len(ask.prompt.system) + len(ask.prompt.user)
        worth = written // _CHARACTERS_A_TOKEN + (self._max_tokens or rubric.max_tokens)
        for attempt in range(self.limits.retries + 1):
            if self._stop.is_set():
                return "stopped"
            if not self._reserve(worth):
                return "budget"
            counted = 0
            try:
                reply = self.judge.ask(rubric, ask.case, ask.prompt)
                self._store.put(ask.key, reply)
                counted = reply.tokens_in + reply.tokens_out or worth
            except TryAgainError as error:
                reason, pause = str(error), self._pause(attempt, error.after)
            except RefusedError as error:
                return f"refused: {error}"
            else:
                self._succeeded(reply)
                return reply
            finally:
                self._settle(worth, counted)
            with self._lock:
                self.spent.retried[reason] += 1
            if attempt < self.limits.retries:
                self._stop.wait(pause)
        self._gave_up()
        return f"failed: {reason}"

    def _pause(self, attempt: int, asked: float | None) -> float:
        longest = min(self.limits.first_wait * 2**attempt, _LONGEST_WAIT_S)
        drawn = random.uniform(longest / 2, longest)  # of no consequence for any result
        return max(drawn, min(asked, _LONGEST_ASKED_WAIT_S)) if asked is not None else drawn

    def _reserve(self, worth: int) -> bool:
        """Whether one more call is within the budget, for all that are on their way to cost what they may."""
        if not self.judge.priced:
            return True
        with self._lock:
            if self.limits.calls is not None and self.spent.calls >= self.limits.calls:
                return False
            if self.limits.tokens is not None and self._reserved + worth > self.limits.tokens:
                return False
            self.spent.calls += 1
            self._reserved += worth
            return True

    def _settle(self, worth: int, counted: int) -> None:
        with self._lock:
            self._reserved += counted - worth

    def _succeeded(self, reply: Reply) -> None:
        with self._lock:
            self._failed_in_a_row = 0
            self.spent.tokens_in += reply.tokens_in
            self.spent.tokens_out += reply.tokens_out
            self.spent.served[reply.served] += 1

    def _gave_up(self) -> None:
        """An endpoint that answers nothing at all is not asked to the end."""
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= _HOPELESS * self.limits.concurrency:
                self._stop.set()

    def _verdict(self, rubric: Rubric, ask: _Ask, reply: Reply | str, repeat: int) -> Verdict:
        clipped = ask.prompt.clipped
        if isinstance(reply, str):
            return Verdict(None, reply, "", ask.prompt.hash, clipped, repeat)
        grades = verdicts.parse(rubric, reply.text)
        reason = "" if grades else "cut" if reply.cut else "unparsable" if reply.text.strip() else "empty"
        return Verdict(grades, reason, reply.text, ask.prompt.hash, clipped, repeat)


class Progress:
    """A bar on stderr where that is a terminal, else a line now and then."""

    def __init__(self, what: str, every_s: float = 30.0) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True)
        self._what, self._every_s, self._last = what, every_s, time.monotonic()
        self._bar = Bar(console=self._console, transient=True) if self._console.is_terminal else None
        self._task = self._bar.add_task(what) if self._bar else None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif done and time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self._console.print(f"{self._what}: {done} of {total}", highlight=False)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
