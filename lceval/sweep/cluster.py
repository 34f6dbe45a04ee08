"""Workers on a Ray cluster: an existing one by its address, or one that is started here and stopped at the end.

Each worker is an actor: a process with a model of its own, which Ray gives its CPUs or its share of a GPU, and starts
again if it dies; its group is then tried once more, from where it was. Folders are seen by all nodes alike.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lceval.errors import InfrastructureError, UserError
from lceval.sweep.plan import Cell
from lceval.sweep.processes import Runs, died, visible_gpus
from lceval.sweep.share import Queue, split, threads
from lceval.sweep.worker import CellResult, Worker

RETRIES = 1
# Of the environment here, what workers elsewhere need to find the same data.
PASSED = ("LCEVAL_DATA", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
STORE_BYTES = 100 * 2**20  # Ray's object store: only outcomes pass through it
PATIENCE_S = 60


class WorkerHandle:
    """A worker's process on the cluster."""

    def __init__(self, make: Callable[[], Runs], folder: str, variables: dict[str, str]) -> None:
        os.environ.update(variables)
        os.chdir(folder)
        self._worker = make()

    def ready(self) -> None:
        """Answers once the process has its place."""

    def run(self, group: Sequence[Cell], root: Path) -> list[CellResult]:
        """What became of the group's cells."""
        return self._worker.run(group, root)


def check(address: str | None) -> None:
    """Whether there is Ray, and something that listens at the address.

    Raises:
        UserError: there is not, and what to do.
    """
    _ray(own=address is None)
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: nothing answers there ({error.strerror or error}); `ray status` shows the address, "
            "and without --address a cluster of this machine is started"
        ) from None


def run(
    groups: Sequence[Sequence[Cell]],
    root: Path,
    workers: int | None,
    address: str | None,
    make: Callable[[], Runs] = Worker,
) -> Iterator[list[CellResult]]:
    """What became of each group's cells, as groups come to their end.

    Args:
        workers: None is as many as the cluster has GPUs, else one a node.

    Raises:
        UserError: no Ray. InfrastructureError: no cluster at the address.
    """
    ray = _ray(own=address is None)
    with _cluster(ray, address, workers):
        # A head that only schedules has no CPU to give.
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if not nodes:
            raise InfrastructureError("the Ray cluster has no node with a CPU")
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        groups = split(groups, workers or gpus or len(nodes))
        workers = min(workers or gpus or len(nodes), len(groups))
        actor = ray.remote(WorkerHandle).options(
            **_share(workers, gpus, [int(node["CPU"]) for node in nodes]),
            max_restarts=len(groups) * (1 + RETRIES),  # each group may take it down so often
            max_task_retries=RETRIES,
        )
        variables = {name: os.environ[name] for name in PASSED if name in os.environ}
        handles = [actor.remote(make, os.getcwd(), variables) for _ in range(workers)]
        yield from _run(ray, handles, Queue(groups), root.resolve())


def _run(ray: Any, handles: Sequence[Any], queue: Queue, root: Path) -> Iterator[list[CellResult]]:
    """A group goes to a worker that has its place: one that waits for it keeps no group from the others."""
    doing: dict[Any, tuple[Any, Sequence[Cell]]] = {handle.ready.remote(): (handle, ()) for handle in handles}
    while queue or any(group for _, group in doing.values()):
        ended: list[Any] = []
        while not ended:
            ended, _ = ray.wait(list(doing), timeout=PATIENCE_S)
            if not ended and not any(group for _, group in doing.values()):
                print("waiting for the cluster to give a worker its place", file=sys.stderr)
        handle, group = doing.pop(ended[0])
        try:
            results = ray.get(ended[0])
        except ray.exceptions.RayError as error:
            if not group:
                print(f"a worker could not be started: {_line(error)}", file=sys.stderr)
                if not doing:
                    raise InfrastructureError(f"no worker could be started: {_line(error)}") from None
                continue
            results = died(
                group, root, f"the worker process ended {1 + RETRIES} times ({_line(error)}); the same line goes on"
            )
        if group:
            yield results
        if (following := queue.take(group[0].owner if group else None)) is not None:
            doing[handle.run.remote(following, root)] = (handle, following)
        else:
            ray.kill(handle)


def _share(workers: int, gpus: int, cpus: Sequence[int]) -> dict[str, float]:
    """What each worker asks the cluster for; together they fit it."""
    fitting = max(1, min(min(cpus), sum(cpus) // workers))
    # Where several share a GPU each asks for a share of it that adds up on every node.
    return {"num_cpus": fitting} | ({"num_gpus": 1 / -(-workers // gpus)} if gpus else {})


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _ray(*, own: bool) -> Any:
    """Ray; for a cluster of our own its door is locked with a key that no file keeps."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if own and not any(name.startswith("RAY_AUTH_") for name in os.environ):
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'lceval[cluster]'") from None
    return ray


@contextmanager
def _cluster(ray: Any, address: str | None, workers: int | None) -> Iterator[None]:
    """Ray, connected or started; left or stopped afterwards."""
    quiet = {"log_to_driver": False, "logging_level": "error"}
    with tempfile.TemporaryDirectory(prefix="lc", ignore_cleanup_errors=True) as folder:
        try:
            if address is not None:
                ray.init(address=address, **quiet)
            else:
                wanted = workers or len(visible_gpus()) or 1
                ray.init(
                    address="local",
                    num_cpus=wanted * threads(wanted),
                    include_dashboard=False,
                    object_store_memory=STORE_BYTES,
                    _temp_dir=folder,
                    **quiet,
                )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            hint = " (one with a token also wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here)" if address else ""
            raise InfrastructureError(
                f"no Ray cluster{f' at {address}' if address else ''}: {_line(error)}{hint}"
            ) from None
        try:
            yield
        finally:
            ray.shutdown()
