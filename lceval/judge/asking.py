"""A judge ready to be asked, its replies filed: what `lceval judge`, a run that judges itself and a reward all open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lceval.judge import judges
from lceval.judge.client import Client, Limits, Progress
from lceval.judge.judges import Judge
from lceval.judge.rubrics import MAX_CHARACTERS
from lceval.judge.store import Store, alone, default_path

TIMEOUT_S = 120.0


@contextmanager
def asking(
    spec: str | None,
    what: str | None,
    *,
    replies: Path | None = None,
    timeout: float = TIMEOUT_S,
    max_tokens: int | None = None,
    max_characters: int = MAX_CHARACTERS,
    limits: Limits | None = None,
    wait: bool = False,
) -> Iterator[tuple[Judge, Client]]:
    """A judge and the client that asks it.

    Args:
        spec: the judge; None: the one that LCEVAL_JUDGE names.
        what: for the progress bar; None shows none.
        replies: their file; None: the one in the cache, where every command finds them.
        wait: for another process that asks the same judge, instead of refusing.

    Raises:
        UserError: there is no such judge, or another process asks it.
    """
    file = replies or default_path()
    judge = judges.make(judges.chosen(spec), timeout=timeout, max_tokens=max_tokens)
    try:
        with (
            alone(file, judge.name, wait=wait),
            Store(file) as store,
            Progress(f"{what} by {judge.label}") if what else nullcontext() as progress,
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
