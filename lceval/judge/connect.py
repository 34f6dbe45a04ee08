"""A loaded judge with its reply cache, shared by `lceval judge`, in-run judging and training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lceval.judge import backends
from lceval.judge.client import Client, Limits, ProgressBar
from lceval.judge.protocol import Judge
from lceval.judge.replies import Store, alone, default_path
from lceval.judge.rubrics import MAX_CHARACTERS

TIMEOUT_S = 120.0


@contextmanager
def connect(
    spec: str | None,
    progress_label: str | None,
    *,
    replies: Path | None = None,
    timeout: float = TIMEOUT_S,
    max_tokens: int | None = None,
    max_characters: int = MAX_CHARACTERS,
    limits: Limits | None = None,
    wait: bool = False,
) -> Iterator[tuple[Judge, Client]]:
    """A judge and its client.

    Args:
        spec: the judge; None: that of LCEVAL_JUDGE.
        progress_label: label of the progress bar; None disables it.
        replies: the reply cache; None: the default one, shared by all commands.
        wait: wait for another process that uses the same judge, instead of raising.

    Raises:
        UserError: no such judge, or another process uses it.
    """
    file = replies or default_path()
    judge = backends.make(backends.chosen(spec), timeout=timeout, max_tokens=max_tokens)
    try:
        with (
            alone(file, judge.name, wait=wait),
            Store(file) as store,
            ProgressBar(f"{progress_label} by {judge.label}") if progress_label else nullcontext() as progress,
        ):
            client = Client(
                judge,
                store,
                limits or Limits(),
                max_characters=max_characters,
                max_tokens=max_tokens,
                on_verdict=progress,
            )
            yield judge, client
    finally:
        judge.close()
