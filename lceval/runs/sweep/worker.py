"""Run groups of cells in one process, with one loaded model and one prefill per context for all recipes.

A group's cells differ only in their recipe. A killed sweep resumes at the sample, and so does `lceval run` in any of
its folders.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lceval.core.credentials import without_secrets
from lceval.core.errors import LcevalError
from lceval.runs.folder import OpenRun, opened
from lceval.runs.runner import Runner
from lceval.runs.sweep.plan import Cell


@dataclass(frozen=True)
class CellResult:
    """The result of a cell: finished, or failed with a one-line error and a traceback.

    contexts: number of contexts prefilled for this cell, without those that another recipe had prefilled.
    """

    cell: str
    error: str = ""
    trace: str = ""
    contexts: int = 0


class Worker:
    """Runs groups one after another and keeps the model while it stays the same."""

    def __init__(self) -> None:
        self._runner = Runner()

    def run(self, group: Sequence[Cell], root: Path) -> list[CellResult]:
        """The results of a group; a failing cell does not stop the others.

        Folders stay locked until the group is done. Finished folders are opened too: they count only if their identity
        (weights, adapter, versions) is this run's.
        """
        results: dict[str, CellResult] = {}
        runs: dict[str, OpenRun] = {}
        cells = {cell.name: cell for cell in group}
        with ExitStack() as folders:
            for name, cell in cells.items():
                try:
                    runs[name] = folders.enter_context(opened(cell.argv(root / name)))
                except Exception as error:
                    results[name] = failed(cell, error)
            for name, outcome in zip(runs, self._runner.evaluate([*runs.values()]), strict=True):
                if isinstance(outcome, Exception):
                    results[name] = failed(cells[name], outcome)
                else:
                    results[name] = CellResult(name, contexts=outcome.contexts)
        return [results[name] for name in cells]


def failed(cell: Cell, error: BaseException) -> CellResult:
    """The result of a failed cell, with secrets removed from error and traceback."""
    text = (str(error).strip() or "no message").splitlines()[0]
    message = text if isinstance(error, LcevalError) else f"{type(error).__name__}: {text}"
    return CellResult(cell.name, without_secrets(message), without_secrets("".join(traceback.format_exception(error))))
