"""Ctrl-C and SIGTERM: a run finishes and stores the sample in progress, then stops; a second signal stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\nlceval: stopping after the current sample; press Ctrl-C again to stop now\n"
_received: list[int] = []


class Stopped(BaseException):
    """The process was told to stop. Not an Exception: no recovery from a failed sample or cell may continue the run.

    exit_code: 128 + the signal's number, as shells report it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def stop_on(*numbers: signal.Signals) -> None:
    """Let signals raise `Stopped`, so that temporary files are deleted on the way out."""
    for number in numbers:
        signal.signal(number, _stop)


@contextmanager
def finishing_samples() -> Iterator[None]:
    """Within the block the first signal is only noted, until the next `check`; a second one raises `Stopped`.

    Outside the main thread, where signals cannot be handled, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        if _received:
            _stop(number, frame)
        _received.append(number)
        os.write(2, _NOTE)  # print is not reentrant

    handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in handled}
    try:
        yield
        check()
    finally:
        _received.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def check() -> None:
    """Stop here if a signal was noted: between two samples.

    Raises:
        Stopped: it was.
    """
    if _received:
        raise Stopped(_received[0])
