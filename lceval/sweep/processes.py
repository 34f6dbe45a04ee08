"""Several workers on this machine: a process each, with a model of its own and, where there are GPUs, its own of them.

Groups and outcomes go through pipes. A worker that dies takes down its group alone: a new one goes on with the rest.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from lceval.sweep.plan import Cell, is_finished
from lceval.sweep.share import Queue, split, threads
from lceval.sweep.worker import CellResult, Worker


class Runs(Protocol):
    """What a process does to a group."""

    def run(self, group: Sequence[Cell], root: Path) -> list[CellResult]: ...


@dataclass
class _Hand:
    """A process, our end of its pipe, its place among the workers and the group it runs."""

    process: BaseProcess
    pipe: Any
    place: int
    group: Sequence[Cell]


def run(
    groups: Sequence[Sequence[Cell]], root: Path, workers: int, make: Callable[[], Runs] = Worker
) -> Iterator[list[CellResult]]:
    """What became of each group's cells, as groups come to their end."""
    groups = split(groups, workers)
    queue, handles = Queue(groups), dict[Any, _Hand]()
    workers = min(workers, len(groups))
    environments = [environment(place, workers) for place in range(workers)]
    try:
        for place in range(workers):
            _give(handles, _start(place, environments[place], make), queue.take(), root)
        while handles:
            for pipe in connection.wait(list(handles)):
                handle = handles.pop(pipe)
                try:
                    results = handle.pipe.recv()
                except (EOFError, OSError):
                    handle.pipe.close()
                    handle.process.join()
                    results = died(handle.group, root, _death(handle.process.exitcode))
                yield results
                if (group := queue.take(handle.group[0].owner)) is not None:
                    alive = handle.process.exitcode is None
                    _give(
                        handles,
                        handle if alive else _start(handle.place, environments[handle.place], make),
                        group,
                        root,
                    )
                else:
                    handle.pipe.close()
                    handle.process.join()
    finally:
        for handle in handles.values():
            handle.process.terminate()
            handle.process.join()


def died(group: Sequence[Cell], root: Path, why: str) -> list[CellResult]:
    """What became of the cells of a worker that can no longer say it."""
    lost = {cell.name for cell in group if not is_finished(root / cell.name)}
    return [CellResult(cell.name, why, why) if cell.name in lost else CellResult(cell.name) for cell in group]


def visible_gpus() -> list[str]:
    """The GPUs that a process here may use, as CUDA_VISIBLE_DEVICES names them. Imports torch."""
    import torch

    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())] if said is None else [n.strip() for n in said.split(",")]
    return names[: torch.cuda.device_count()]


def environment(place: int, workers: int) -> dict[str, str]:
    """The environment of one of the workers: its GPUs, or, without any, its share of the CPUs."""
    gpus = visible_gpus()
    if not gpus:
        return {"OMP_NUM_THREADS": str(threads(workers))}
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[place::workers] or [gpus[place % len(gpus)]])}


def _start(place: int, variables: dict[str, str], make: Callable[[], Runs]) -> _Hand:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, variables, make), name=f"lceval-worker-{place}")
    process.start()
    theirs.close()
    return _Hand(process, ours, place, [])


def _give(handles: dict[Any, _Hand], handle: _Hand, group: Sequence[Cell] | None, root: Path) -> None:
    assert group is not None
    handle.group = group
    handles[handle.pipe] = handle
    with suppress(OSError):  # it died: reading from it will say so
        handle.pipe.send((group, root))


def _death(code: int | None) -> str:
    how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    return f"the worker process ended {how} (out of memory?); the same line goes on from here"


def _serve(pipe: Any, variables: dict[str, str], make: Callable[[], Runs]) -> None:
    """A worker's life: groups in, outcomes out, until the pipe closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends its workers
    os.environ.update(variables)
    os.dup2(2, 1)  # stdout is the table's
    Thread(target=_end_with_parent, daemon=True).start()
    worker = make()
    while True:
        try:
            group, root = pipe.recv()
        except EOFError:
            return
        pipe.send(worker.run(group, root))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
