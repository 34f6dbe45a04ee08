"""Workers as processes of this machine, each with its own model and its own GPUs, if there are any.

Groups and results go through pipes. If a worker dies, only its group fails; a new worker continues with the rest.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from lceval.core.interrupt import Stopped, stop_on
from lceval.runs.sweep.plan import Cell, is_finished
from lceval.runs.sweep.share import Queue, split, threads
from lceval.runs.sweep.worker import CellResult, Worker


class RunsGroups(Protocol):
    """The work of a process: run a group of cells."""

    def run(self, group: Sequence[Cell], root: Path) -> list[CellResult]: ...


@dataclass
class _WorkerProcess:
    """A worker process: our end of its pipe, its index among the workers and the group it runs."""

    process: BaseProcess
    pipe: Any
    index: int
    group: Sequence[Cell]


def run(
    groups: Sequence[Sequence[Cell]], root: Path, workers: int, make: Callable[[], RunsGroups] = Worker
) -> Iterator[list[CellResult]]:
    """The results of each group, as groups end."""
    groups = split(groups, workers)
    queue, handles = Queue(groups), dict[Any, _WorkerProcess]()
    workers = min(workers, len(groups))
    environments = [environment(index, workers) for index in range(workers)]
    try:
        for index in range(workers):
            _give(handles, _start(index, environments[index], make), queue.take(), root)
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
                        handle if alive else _start(handle.index, environments[handle.index], make),
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
    """The results of a group whose worker died: its unfinished cells failed."""
    lost = {cell.name for cell in group if not is_finished(root / cell.name)}
    return [CellResult(cell.name, why, why) if cell.name in lost else CellResult(cell.name) for cell in group]


def visible_gpus() -> list[str]:
    """The GPUs that this process can use, by their names in CUDA_VISIBLE_DEVICES. Imports torch."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = [str(i) for i in range(count)] if visible is None else [name.strip() for name in visible.split(",")]
    return names[:count]


def environment(index: int, workers: int) -> dict[str, str]:
    """Environment variables of one worker: its GPUs, or its share of the CPU threads."""
    gpus = visible_gpus()
    if not gpus:
        return {"OMP_NUM_THREADS": str(threads(workers))}
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index::workers] or [gpus[index % len(gpus)]])}


def _start(index: int, variables: dict[str, str], make: Callable[[], RunsGroups]) -> _WorkerProcess:
    context = get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end, variables, make), name=f"lceval-worker-{index}")
    process.start()
    child_end.close()
    return _WorkerProcess(process, parent_end, index, [])


def _give(handles: dict[Any, _WorkerProcess], handle: _WorkerProcess, group: Sequence[Cell] | None, root: Path) -> None:
    assert group is not None
    handle.group = group
    handles[handle.pipe] = handle
    with suppress(OSError):  # the process died: receiving from its pipe raises EOFError
        handle.pipe.send((group, root))


def _death(code: int | None) -> str:
    cause = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    return f"the worker process ended {cause} (out of memory?); rerun the same command to resume"


def _serve(pipe: Any, variables: dict[str, str], make: Callable[[], RunsGroups]) -> None:
    """Main function of a worker process: receive groups, send results, until the pipe closes or the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends its workers by SIGTERM
    stop_on(signal.SIGTERM)
    os.environ.update(variables)
    os.dup2(2, 1)  # only the parent's table goes to stdout
    Thread(target=_end_with_parent, daemon=True).start()
    worker = make()
    while True:
        try:
            group, root = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(worker.run(group, root))
        except Stopped as error:
            sys.exit(error.exit_code)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
