"""A loaded judge with its reply cache, shared by `lceval judge`, in-run judging and training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

from lceval.core.paths import cache_dir
from lceval.judge import backends
from lceval.judge.client import Client, Limits
from lceval.judge.replies import Store, alone

_PROGRESS_S = 30.0


@contextmanager
def connect(
    spec: str | None,
    progress_label: str | None,
    limits: Limits | None = None,
    *,
    replies: Path | None = None,
    wait: bool = False,
) -> Iterator[Client]:
    """The client of a judge.

    Args:
        spec: the judge; None: that of LCEVAL_JUDGE.
        progress_label: label of the progress bar; None disables it.
        replies: the reply cache; None: the default one, shared by all commands.
        wait: wait for another process that uses the same judge, instead of raising.

    Raises:
        UserError: no such judge, or another process uses it.
    """
    file, limits = replies or cache_dir("judge") / "replies.sqlite", limits or Limits()
    with (
        closing(backends.make(backends.chosen(spec), timeout=limits.timeout, max_tokens=limits.max_tokens)) as judge,
        alone(file, judge.name, wait=wait),
        Store(file) as store,
        _progress(f"{progress_label} by {judge.label}") if progress_label else nullcontext() as progress,
    ):
        yield Client(judge, store, limits, on_verdict=progress)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr if it is a terminal, else a line every 30 seconds; called with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console, last = Console(stderr=True), time.monotonic()

    def print_line(done: int, total: int) -> None:
        nonlocal last
        if done and time.monotonic() - last >= _PROGRESS_S:
            last = time.monotonic()
            console.print(f"{label}: {done} of {total}", highlight=False)

    if not console.is_terminal:
        yield print_line
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(label)
        yield lambda done, total: bar.update(task, completed=done, total=total)
