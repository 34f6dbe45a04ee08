"""Ctrl-C and SIGTERM are noted, and stop between two samples."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from threading import Thread

import pytest

from lceval.core import interrupt
from lceval.core.interrupt import Stopped, check, finishing_samples


@pytest.fixture(autouse=True)
def _default_handler() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_waits_for_the_sample_and_the_second_stops_at_once(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before, reached = signal.getsignal(number), []

    def run(signals: int) -> None:
        with finishing_samples():
            for n in range(signals):
                os.kill(os.getpid(), number)
                reached.append(n)
            check()

    with pytest.raises(Stopped) as stopped:
        run(1)
    assert stopped.value.exit_code == code
    assert "stopping after the current sample" in capfd.readouterr().err
    with pytest.raises(Stopped):
        run(2)
    assert reached == [0, 0]
    assert signal.getsignal(number) is before
    check()  # nothing is left over


def test_a_signal_during_the_last_sample_stops_after_it() -> None:
    with pytest.raises(Stopped), finishing_samples():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_is_no_failure_of_a_sample() -> None:
    """Recovery from failed samples and cells catches Exception."""
    assert not issubclass(Stopped, Exception)


def test_signals_are_left_alone_where_they_cannot_be_handled() -> None:
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with finishing_samples():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, ignored)
    ran = []

    def elsewhere() -> None:
        with finishing_samples():
            ran.append(True)

    thread = Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ran == [True]
    assert not interrupt._received
