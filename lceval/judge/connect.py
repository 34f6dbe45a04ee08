"""A loaded judge with its reply cache, shared by `lceval judge`, in-run judging and training."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lceval.core.paths import cache_dir
from lceval.judge import backends
from lceval.judge.client import Client, Limits
from lceval.judge.replies import Store, alone


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
        _progress_bar(progress_label and f"{progress_label} by {judge.label}") as bar,
    ):

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield Client(judge, store, limits, on_verdict=show)


def _progress_bar(label: str | None) -> tqdm[Any]:
    """A progress bar on stderr; where that is no terminal, updated every 30 seconds. Disabled without a label."""
    interval_s = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(desc=label, leave=False, disable=label is None, mininterval=interval_s, delay=interval_s)
