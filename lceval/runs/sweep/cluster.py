"""Workers on a Ray cluster: an existing one by its address, or one that is started here and stopped at the end.

Each worker is an actor: a process with its own model, and with CPUs and GPU shares assigned by Ray. If it dies, Ray
restarts it, and its group resumes once. All nodes must see the same folders under the same paths.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lceval.core.errors import InfrastructureError, UserError
from lceval.core.safe_text import echo
from lceval.runs.sweep.plan import Cell
from lceval.runs.sweep.processes import RunsGroups, died, visible_gpus
from lceval.runs.sweep.share import Queue, split, threads
from lceval.runs.sweep.worker import CellResult, Worker

RETRIES = 1
# Environment variables that workers on other nodes need to find the same data.
PASSED = ("LCEVAL_DATA", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
STORE_BYTES = 100 * 2**20  # Ray's object store: only results pass through it
WAIT_S = 60


class WorkerHandle:
    """A worker process on the cluster."""

    def __init__(self, make: Callable[[], RunsGroups], folder: str, variables: dict[str, str]) -> None:
        os.environ.update(variables)
        os.chdir(folder)
        self._worker = make()

    def ready(self) -> None:
        """Returns once the process has its resources."""

    def run(self, group: Sequence[Cell], root: Path) -> list[CellResult]:
        """The results of the group's cells."""
        return self._worker.run(group, root)


def check(address: str | None) -> None:
    """Check that Ray is installed and that something listens at the address.

    Raises:
        UserError: one of the two is not the case.
    """
    _ray(own=address is None)
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: nothing answers there ({error.strerror or error}); `ray status` prints the address, "
            "and without --address a cluster is started on this machine"
        ) from None


def run(
    groups: Sequence[Sequence[Cell]],
    root: Path,
    workers: int | None,
    address: str | None,
    make: Callable[[], RunsGroups] = Worker,
) -> Iterator[list[CellResult]]:
    """The results of each group, as groups end.

    Args:
        workers: number of workers; None is one per GPU of the cluster, or one per node without GPUs.

    Raises:
        UserError: Ray is not installed. InfrastructureError: no cluster at the address.
    """
    ray = _ray(own=address is None)
    with _cluster(ray, address, workers):
        # A head node that only schedules has no CPUs.
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if not nodes:
            raise InfrastructureError("the Ray cluster has no node with a CPU")
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        groups = split(groups, workers or gpus or len(nodes))
        workers = min(workers or gpus or len(nodes), len(groups))
        actor = ray.remote(WorkerHandle).options(
            **_share(workers, gpus, [int(node["CPU"]) for node in nodes]),
            max_restarts=len(groups) * (1 + RETRIES),  # each group may end the process this often
            max_task_retries=RETRIES,
        )
        variables = {name: os.environ[name] for name in PASSED if name in os.environ}
        handles = [actor.remote(make, os.getcwd(), variables) for _ in range(workers)]
        yield from _run(ray, handles, Queue(groups), root.resolve())


def _run(ray: Any, handles: Sequence[Any], queue: Queue, root: Path) -> Iterator[list[CellResult]]:
    """Give groups only to workers that have their resources: one that waits for them must not hold a group back."""
    running: dict[Any, tuple[Any, Sequence[Cell]]] = {handle.ready.remote(): (handle, ()) for handle in handles}
    while queue or any(group for _, group in running.values()):
        ended: list[Any] = []
        while not ended:
            ended, _ = ray.wait(list(running), timeout=WAIT_S)
            if not ended and not any(group for _, group in running.values()):
                echo("waiting for the cluster to give a worker its resources", err=True)
        handle, group = running.pop(ended[0])
        try:
            results = ray.get(ended[0])
        except ray.exceptions.RayError as error:
            if not group:
                echo(f"could not start a worker: {_line(error)}", err=True)
                if not running:
                    raise InfrastructureError(f"no worker could be started: {_line(error)}") from None
                continue
            results = died(
                group,
                root,
                f"the worker process ended {1 + RETRIES} times ({_line(error)}); rerun the same command to resume",
            )
        if group:
            yield results
        if (following := queue.take(group[0].owner if group else None)) is not None:
            running[handle.run.remote(following, root)] = (handle, following)
        else:
            ray.kill(handle)


def _share(workers: int, gpus: int, cpus: Sequence[int]) -> dict[str, float]:
    """The CPUs and GPU share that each worker requests; together they fit the cluster."""
    cpus_each = max(1, min(min(cpus), sum(cpus) // workers))
    # Workers that share a GPU request equal shares, which fit every node.
    return {"num_cpus": cpus_each} | ({"num_gpus": 1 / -(-workers // gpus)} if gpus else {})


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _ray(*, own: bool) -> Any:
    """Import Ray; a cluster of our own gets a random access token that is written to no file."""
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
    """Connect to a Ray cluster or start one; disconnect or stop it afterwards."""
    quiet = {"log_to_driver": False, "logging_level": "error"}
    with tempfile.TemporaryDirectory(prefix="lc", ignore_cleanup_errors=True) as folder:
        try:
            if address is not None:
                ray.init(address=address, **quiet)
            else:
                count = workers or len(visible_gpus()) or 1
                ray.init(
                    address="local",
                    num_cpus=count * threads(count),
                    include_dashboard=False,
                    object_store_memory=STORE_BYTES,
                    _temp_dir=folder,
                    **quiet,
                )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            hint = " (a cluster with a token requires RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here)" if address else ""
            raise InfrastructureError(
                f"no Ray cluster{f' at {address}' if address else ''}: {_line(error)}{hint}"
            ) from None
        try:
            yield
        finally:
            ray.shutdown()
