"""Groups on several workers: distribution, failures and resuming, with real processes and a fake model."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Event

import pytest

from lceval.cli import invoke
from lceval.core.credentials import without_secrets
from lceval.core.errors import LcevalError, UserError
from lceval.runs.sweep import cluster, processes
from lceval.runs.sweep.execution import sweep
from lceval.runs.sweep.grid import Grid
from lceval.runs.sweep.plan import Cell, SweepPlan, plan
from lceval.runs.sweep.share import Queue, split
from lceval.runs.sweep.worker import CellResult, failed

ALL = ["full", "int8", "int4", "snapkv:0.5"]


def planned(
    recipes: Sequence[str] = ALL, models: Sequence[str] = ("m",), adapters: Sequence[str | None] = (None,)
) -> SweepPlan:
    tasks = ["lc_filings_ao_1k", "lc_filings_id_1k"]
    return plan(Grid(models=[*models], adapters=[*adapters], tasks=tasks, recipes=[*recipes]))


class Files:
    """A fake worker that finishes a cell by writing its run.json.

    `int4` of the first task kills its process every time; `int8` only the first time, and its folder remains.
    """

    def run(self, group: Sequence[Cell], root: Path) -> list[CellResult]:
        for cell in group:
            folder = root / cell.name
            again = folder.is_dir()
            folder.mkdir(exist_ok=True)
            if cell.task == "lc_filings_ao_1k" and (cell.recipe == "int4" or (cell.recipe == "int8" and not again)):
                os.kill(os.getpid(), 9)
            record = {"status": "finished", "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}
            (folder / "run.json").write_text(json.dumps(record))
        return [CellResult(cell.name, contexts=1) for cell in group]


def test_a_worker_prefers_groups_of_its_model_and_then_the_model_with_most_groups_left() -> None:
    groups = planned(models=["a", "b"], adapters=[None, "x", "y"]).groups()
    queue = Queue([group for group in groups if group[0].model == "a" or group[0].adapter is None])
    first, second = queue.take(), queue.take()
    assert first is not None
    assert second is not None
    assert first[0].owner != second[0].owner
    owners = [first[0].owner]
    while (group := queue.take(owners[-1])) is not None:
        owners.append(group[0].owner)
    assert not queue
    # The one worker that continues loads each model once.
    assert sum(a != b for a, b in pairwise(owners)) == len({*owners}) - 1
    assert len(owners) == 2 * 4 - 1


@pytest.mark.parametrize(
    ("workers", "sizes"), [(1, [4, 4]), (2, [4, 4]), (3, [2, 2, 4]), (5, [1, 1, 2, 2, 2]), (99, [1] * 8)]
)
def test_groups_are_split_only_if_workers_would_idle(workers: int, sizes: list[int]) -> None:
    whole = planned().groups()
    parts = split(whole, workers)
    assert sorted(map(len, parts)) == sorted(sizes)
    assert [cell for part in parts for cell in part] == [cell for group in whole for cell in group]
    assert all(len({cell.group for cell in part}) == 1 for part in parts)


def test_a_dying_worker_fails_only_its_cells_and_the_same_command_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = planned()
    engine = partial(processes.run, workers=3, make=Files)
    outcome = sweep(grid, tmp_path, engine)
    # With three workers the first task is two groups: full and int8, of which only full was finished, and the rest.
    lost = [cell for cell in grid.cells if cell.task == "lc_filings_ao_1k" and cell.recipe != "full"]
    assert set(outcome.failed) == {cell.name for cell in lost}
    assert len(outcome.folders) == len(grid.cells) - 3
    pids = {json.loads((folder / "run.json").read_text())["pid"] for folder in outcome.folders}
    assert os.getpid() not in pids
    assert len(pids) >= 2
    message = "the worker process ended by SIGKILL (out of memory?); rerun the same command to resume"
    assert set(outcome.failed.values()) == {message}
    status = json.loads((tmp_path / "sweep.json").read_text())
    assert status["cells"][lost[0].name] == message
    assert (tmp_path / status["errors"][lost[0].name]).read_text() == message
    assert capsys.readouterr().err.count("failed: ") == 3

    # The fake run.json has no identity, which `opened` requires, so only the unfinished cells are planned again.
    rest = SweepPlan(tuple(cell for cell in lost if cell.recipe != "int4"), ())
    again = sweep(rest, tmp_path, engine)
    assert again.failed == {}
    assert [folder.name for folder in again.folders] == [cell.name for cell in rest.cells]
    assert not (tmp_path / status["errors"][lost[0].name]).exists()


class Blocks:
    """A fake worker that locks a folder like a run, prints that it did, and never returns."""

    def run(self, group: Sequence[Cell], root: Path) -> list[CellResult]:
        with (root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            print("locked", flush=True)
            Event().wait()
        return []


def test_workers_of_a_killed_sweep_end_and_unlock_their_folders(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from test_sweep_workers import Blocks, planned, processes\n"
        "next(processes.run(planned().groups()[:1], Path(sys.argv[1]), 1, make=Blocks))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        # A worker's stdout goes to stderr, because only the table goes to stdout.
        assert process.stderr.readline() == "locked\n"
        with (tmp_path / ".lock").open("w") as lock:
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process.kill()
            fcntl.flock(lock, fcntl.LOCK_EX)


def test_every_worker_gets_its_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["0", "1", "GPU-c"])
    assert [processes.environment(i, 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["0,GPU-c", "1"]
    assert [processes.environment(i, 4)["CUDA_VISIBLE_DEVICES"] for i in range(4)] == ["0", "1", "GPU-c", "0"]
    monkeypatch.setattr(processes, "visible_gpus", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    assert [processes.environment(0, workers) for workers in (2, 9)] == [
        {"OMP_NUM_THREADS": "3"},
        {"OMP_NUM_THREADS": "1"},
    ]


@pytest.mark.parametrize(
    ("workers", "gpus", "cpus", "share"),
    [
        (2, 0, [4], {"num_cpus": 2}),
        (3, 0, [8, 2], {"num_cpus": 2}),
        (9, 0, [4], {"num_cpus": 1}),
        (2, 4, [64], {"num_cpus": 32, "num_gpus": 1}),
        (5, 2, [64], {"num_cpus": 12, "num_gpus": 1 / 3}),
    ],
)
def test_the_resources_that_workers_request_fit_the_cluster(
    workers: int, gpus: int, cpus: list[int], share: dict[str, float]
) -> None:
    assert cluster._share(workers, gpus, cpus) == share


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--address", "auto"], "--address auto requires --engine ray"),
        (["--workers", "0"], "Invalid value for '--workers'"),
        (["--engine", "slurm"], "Invalid value for '--engine'"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "--address 127.0.0.1:1: nothing answers there"),
    ],
)
def test_bad_engine_options_give_one_line_and_exit_2(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["sweep", "--preset", "mini", "--output_path", str(tmp_path), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_without_ray_the_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'lceval\[cluster\]'"):
        cluster.check(None)


HF_KEY = "hf_" + "ABcd" * 8


def test_errors_contain_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abcd-efgh-ijkl")
    text = f"abcd-efgh-ijkl {HF_KEY} Bearer x.y.z https://me:pass@host/ sk-{'0' * 20} skim-1234567890"
    assert (
        without_secrets(text) == "[HF_TOKEN] [secret] Bearer [secret] https://[secret]@host/ [secret] skim-1234567890"
    )
    cell = planned().cells[0]
    assert failed(cell, OSError(f"401 for {HF_KEY}")).error == "OSError: 401 for [secret]"
    assert failed(cell, LcevalError("no disk")).error == "no disk"


# A cluster, and a sweep on it by its address; in child processes, because Ray's warnings are errors in pytest.
SCRIPT = """
import sys, tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
import ray
from test_sweep_workers import Files, planned
from lceval.runs.sweep import cluster
from lceval.runs.sweep.execution import sweep

if sys.argv[1] == "head":
    with tempfile.TemporaryDirectory(prefix="lc", ignore_cleanup_errors=True) as folder:
        context = ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20,
            _temp_dir=folder, logging_level="error",
        )
        print(context.address_info["gcs_address"], flush=True)
        sys.stdin.read()
        ray.shutdown()
else:
    with redirect_stdout(sys.stderr):  # as in the command: Ray prints there that a worker died
        outcome = sweep(planned(), Path(sys.argv[2]), partial(cluster.run, workers=3, address=sys.argv[1], make=Files))
    print(len(outcome.folders), *sorted(outcome.failed.values()), sep="\\n")
"""


@pytest.mark.slow
def test_a_cluster_retries_a_group_once_after_its_worker_died_and_fails_only_that_group(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-c", SCRIPT]
    head = subprocess.Popen([*command, "head"], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert head.stdin is not None
    assert head.stdout is not None
    try:
        address = head.stdout.readline().strip()
        cluster.check(address)
        ran = subprocess.run([*command, address, str(tmp_path)], env=env, text=True, capture_output=True)
    finally:
        head.stdin.close()
        head.wait()
        head.stdout.close()
    assert ran.returncode == 0, ran.stderr
    count, *errors = ran.stdout.splitlines()
    # The retry finished full and int8; int4 failed, and with it snapkv of the same group.
    assert int(count) == len(planned().cells) - 2
    assert len(errors) == 2
    assert errors[0].startswith("the worker process ended 2 times (Actor")
