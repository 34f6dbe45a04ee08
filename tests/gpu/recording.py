"""Facts of a check, kept on disk as they are measured: a run that is cut off leaves what it has.

    facts.json = {"facts": {name: value}, "failed": [name], "left_out": {name: why}, "running": name or null}

A failed check is a fact too: its value has the key `failed`, one line that says why.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEEDS_CUDA = "needs CUDA"
# A line of the log is for reading along; facts.json has all of it.
MOST_CHARACTERS = 300


class LeftOutError(Exception):
    """A check that this machine or setting cannot run; the message says what it needs."""


class Recorder:
    """Runs checks one after the other and writes facts.json around each of them.

    Args:
        folder: where facts.json goes.
        limit_s: seconds from now after which no further check begins. The first check always runs.
        resume: continue after the facts that the folder has. A check that was running when its process died failed.
    """

    def __init__(self, folder: Path, limit_s: float, *, resume: bool = False) -> None:
        self._file = folder / "facts.json"
        self._start = time.perf_counter()
        self._limit_s = limit_s
        self.facts: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self._running: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if resume and self._file.exists():
            earlier = json.loads(self._file.read_text())
            self.facts = earlier["facts"]
            if earlier["running"] is not None:
                self._add(earlier["running"], {"failed": "the process ended during this check"})

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, value in self.facts.items() if isinstance(value, dict) and "failed" in value]

    def run(self, name: str, check: Callable[[], Any]) -> None:
        """Run one check, unless its fact is there already or time is up."""
        if name in self.facts:
            return
        if self.facts and time.perf_counter() - self._start >= self._limit_s:
            self._leave_out(name, "time limit")
            return
        self._running = name
        self._write()
        try:
            value = check()
        except LeftOutError as reason:
            self._leave_out(name, str(reason))
        # A check may end in any way, an assertion of ours or an error of CUDA, and the next one still runs.
        except Exception as error:
            self._add(name, {"failed": one_line(error)})
        else:
            self._add(name, value)

    def _add(self, name: str, value: Any) -> None:
        self._running = None
        self.facts[name] = value
        self._print(name, json.dumps(_rounded(value), default=str))
        self._write()

    def _leave_out(self, name: str, why: str) -> None:
        self._running = None
        self.left_out[name] = why
        self._print(name, f"left out: {why}")
        self._write()

    def _print(self, name: str, text: str) -> None:
        short = text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 4] + " ..."
        print(f"[{time.perf_counter() - self._start:6.1f} s] {name}: {short}", flush=True)

    def _write(self) -> None:
        """Replace the file in one step: whoever reads it, or kills this process, finds a whole one."""
        record = {"facts": self.facts, "failed": self.failed, "left_out": self.left_out, "running": self._running}
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1, default=str) + "\n")
        os.replace(partial, self._file)


def bounded(values: dict[str, Any], **most: float) -> dict[str, Any]:
    """`values`, marked as failed where one of them exceeds its bound (NaN does)."""
    broken = [f"{key} {values[key]:.3g} above {bound:.3g}" for key, bound in most.items() if not values[key] <= bound]
    return {**values, "failed": ", ".join(broken)} if broken else values


def one_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:MOST_CHARACTERS]}"


def _rounded(value: Any) -> Any:
    """Three significant digits, for a line of the log."""
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
