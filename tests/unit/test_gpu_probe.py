"""The GPU check on a CPU, over tiny shapes, as on a bare machine: without lm-eval and what the command line needs."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lceval

ROOT = Path(lceval.__file__).parents[1]
GPU = Path(__file__).parents[1] / "gpu"
KERNEL_TESTS = sorted(Path(__file__).parent.glob("test_kernels_*.py"))
# What a machine with PyTorch, Triton and transformers need not have. (transformers uses rich where it is installed.)
BLOCKED = ("lm_eval", "pydantic", "typer", "peft", "datasets", "faiss", "plotly", "jsonlines", "gguf")
BLOCKING = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that can import none of BLOCKED; its children inherit it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(BLOCKING)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "LCEVAL_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}


def probe(folder: Path, env: dict[str, str], *args: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, GPU / "probe.py", "--device", "cpu", "--out", folder, *args]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return ran, json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def cut_off(
    bare: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str], dict[str, Any]]:
    """A run whose time was up at once."""
    folder = tmp_path_factory.mktemp("probe")
    return folder, *probe(folder, bare, "--limit", "0")


@pytest.fixture(scope="module")
def resumed(cut_off: Any, bare: dict[str, str]) -> dict[str, Any]:
    """What facts.json has after the same run was resumed."""
    ran, record = probe(cut_off[0], bare, "--resume")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr == ""
    assert ran.stdout.count("versions: ") == 0
    return record


def values(record: dict[str, Any], start: str) -> dict[str, Any]:
    return {name: value for name, value in record["facts"].items() if name.startswith(start)}


@pytest.mark.slow
def test_a_run_out_of_time_keeps_its_facts_and_names_what_it_left_out(cut_off: Any) -> None:
    _, ran, record = cut_off
    assert ran.returncode == 0
    assert [*record["facts"]] == ["versions"]
    assert record["facts"]["versions"]["torch"]
    assert set(record["left_out"].values()) == {"time limit"}
    first = next(iter(record["left_out"]))
    assert first == "figures decode.split"
    assert f"left out (time limit): {first}, " in ran.stdout
    assert f"{len(record['left_out'])} left out" in ran.stdout


@pytest.mark.slow
def test_every_check_runs_on_a_cpu_without_the_packages_of_the_command_line(cut_off: Any, resumed: Any) -> None:
    assert resumed["failed"] == []
    assert resumed["running"] is None
    # No name is lost between those that time cut off and those that ran.
    assert {*cut_off[2]["left_out"]} == {*resumed["facts"], *resumed["left_out"]} - {"versions"}
    assert {*resumed["left_out"].values()} == {
        "needs CUDA",
        "needs faiss",
        "small sizes compile decode.split alone",
    }
    assert values(resumed, "figures decode.split")["figures decode.split"]["bf16 D128"]["spills"] == 0


@pytest.mark.slow
def test_every_recipe_ran_and_full_is_what_transformers_computes(resumed: Any, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    recipes = importlib.import_module("engine_checks").RECIPES
    ran = values(resumed, "recipe ")
    # faiss is blocked, and `retrieval` needs it.
    assert {*ran} == {f"recipe {recipe}" for recipe in recipes} - {"recipe retrieval:0.1"}
    # float32 against float64 over three layers; measured 2e-7.
    full = ran["recipe full"]
    assert 0 < full["error_vs_transformers"] < 2e-6
    assert all(0 < each["question_error"] < 2e-6 and 0 < each["step_error"] < 2e-6 for each in ran.values())
    assert full["kept"] == 1.0
    assert all(each["kept"] == pytest.approx(0.25, abs=0.002) for name, each in ran.items() if name.endswith(":0.25"))
    gold = resumed["facts"]["gold kept (diagnose)"]
    assert 0 < gold["gold_kept"] < 1


@pytest.mark.slow
def test_a_step_reports_its_times_and_how_many_operations_it_has(resumed: Any) -> None:
    steps = values(resumed, "step ")
    assert len(steps) == 1 + 5 * 4
    assert all(step["operations"] > 50 and 0 < step["host_ms"] <= step["wall_ms"] for step in steps.values())
    assert {step["launches"] for step in steps.values()} == {"needs CUDA"}
    assert steps["step 600 full, 1 row"]["operations"] > steps["step 600 transformers SDPA, 1 row"]["operations"]
    assert all(row["us"] > 0 for name, row in values(resumed, "bandwidth ").items() if "tokens" in name)
    assert resumed["facts"]["prefill 600 in chunks of 256"]["key_error"] < 1e-5


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(GPU))
    return importlib.import_module("recording")


def test_a_failed_check_is_a_fact_and_the_next_one_runs(recording: Any, tmp_path: Path) -> None:
    recorder = recording.Recorder(tmp_path, 60.0)
    recorder.run("broken", lambda: [][0])
    recorder.run("outside", lambda: recording.bounded({"error": 0.5, "other": float("nan")}, error=0.1, other=1.0))
    recorder.run("inside", lambda: recording.bounded({"error": 0.05}, error=0.1))
    record = json.loads((tmp_path / "facts.json").read_text())
    assert record["failed"] == ["broken", "outside"]
    assert record["facts"]["broken"] == {"failed": "IndexError: list index out of range"}
    assert record["facts"]["outside"]["failed"] == "error 0.5 above 0.1, other nan above 1"
    assert record["facts"]["inside"] == {"error": 0.05}


def test_a_check_that_took_its_process_down_has_failed_and_is_not_run_again(recording: Any, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        recording.Recorder(tmp_path, 60.0).run("deadly", die)
    recorder = recording.Recorder(tmp_path, 60.0, resume=True)
    recorder.run("deadly", die)
    recorder.run("next", dict)
    assert recorder.failed == ["deadly"]
    assert recorder.facts["deadly"] == {"failed": "the process ended during this check"}
    assert [*recorder.facts] == ["deadly", "next"]


def test_a_worker_that_dies_is_replaced_until_one_ends(recording: Any, tmp_path: Path, monkeypatch: Any) -> None:
    probe_module = importlib.import_module("probe")
    commands = []

    def worker(command: list[str]) -> int:
        commands.append(command)
        recorder = recording.Recorder(tmp_path, 60.0, resume="--resume" in command)
        if len(commands) == 3:
            return 1
        (tmp_path / "facts.json").write_text(
            json.dumps({"facts": recorder.facts, "failed": [], "left_out": {}, "running": f"check {len(commands)}"})
        )
        return -11

    monkeypatch.setattr(probe_module, "_run", worker)
    assert probe_module.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert ["--resume" in command for command in commands] == [False, True, True]


def test_a_worker_that_dies_before_its_first_check_ends_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    probe_module = importlib.import_module("probe")
    monkeypatch.setattr(probe_module, "_run", lambda command: -9)
    assert probe_module.main(["--out", str(tmp_path), "--device", "cpu"]) == 1


@pytest.mark.parametrize("args", [[], ["--out", "x", "--device", "tpu"], ["--out", "x", "--limit", "-1"]])
def test_a_bad_argument_ends_with_status_2(args: list[str], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("probe").main(args)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.slow
def test_the_kernels_gpu_tests_are_collected_without_lm_eval_and_plugins(bare: dict[str, str]) -> None:
    """As tests/gpu/everything.sh collects them: on a bare machine neither xdist nor timeout need be there."""
    script = (GPU / "everything.sh").read_text()
    options = re.search(r"set -- (-m gpu .*) --junitxml", script)
    assert options is not None
    plugins = ["-p", "no:xdist", "-p", "no:timeout", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "--collect-only", *options[1].split(), *plugins, *KERNEL_TESTS]
    ran = subprocess.run(command, env=bare, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    collected = int(re.findall(r"(\d+)/\d+ tests collected", ran.stdout)[-1])
    assert collected >= 50


def test_the_script_runs_every_step_and_reports_failures_and_what_it_left_out(tmp_path: Path) -> None:
    """With a stand-in for Python: the facts fail, and there is no lm-eval."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> "$CALLS"\n'
        'case "$*" in *find_spec*lm_eval*|*find_spec*xdist*) exit 1;; *probe.py*) exit 7;; esac\n'
    )
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "CALLS": str(tmp_path / "calls")}
    ran = subprocess.run(
        ["sh", GPU / "everything.sh", tmp_path / "out"], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert ran.stderr == ""
    _, _, summary = ran.stdout.partition("left out:")
    assert "gpu tests of the benches: they need lm-eval\n" in summary
    assert "lm_eval, table: they need lceval and lm-eval installed\n" in summary
    assert summary.endswith("failed:\n  facts (status 7)\n")
    tests = [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("-m pytest")]
    assert len(tests) == 1
    assert tests[0].split()[-len(KERNEL_TESTS) :] == [f"tests/unit/{file.name}" for file in KERNEL_TESTS]
