"""`lceval train` in several processes, as under `accelerate launch`, gives the adapter of a single process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from lceval.training.config import parse, shipped
from lceval.training.train import train

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = ROOT / "training" / "accelerate"


def recipe(output: Path, rows: Path) -> dict[str, Any]:
    """Two steps of two contexts each."""
    return {
        "output": str(output),
        "model": {"dtype": "float32"},
        "rows": str(rows),
        "optim": {"max_steps": 2, "contexts_per_step": 2, "warmup": 0.0},
        "save_steps": 2,
    }


def launch(output: Path, rows: Path, *options: str, configuration: str = "ddp") -> subprocess.CompletedProcess[str]:
    file = output.parent / f"{output.name}.yaml"
    file.write_text(json.dumps(recipe(output, rows)))
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGURATIONS / f"{configuration}.yaml"), ""])
    # accelerate starts only one process without devices; torchrun starts several.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "lceval"] if configuration == "ddp" else [str(Path(__file__).with_name("sharded.py"))]
    command += ["train", str(file), "--json", *options]
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory, short_rows: Path) -> Path:
    """Output folder of a run in a single process."""
    output = tmp_path_factory.mktemp("single") / "run"
    train(parse(recipe(output, short_rows), "test"))
    return output


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("configuration", "saved"), [("ddp", "optimizer.pt"), ("fsdp2", "pytorch_model_fsdp.bin")])
def test_two_processes_give_the_losses_and_adapter_of_one(
    single_process: Path, short_rows: Path, tmp_path: Path, configuration: str, saved: str
) -> None:
    output = tmp_path / "two"
    completed = launch(output, short_rows, configuration=configuration)
    assert completed.returncode == 0, completed.stderr[-3000:]
    losses = json.loads((single_process / "train.json").read_text())["losses"]
    assert json.loads(completed.stdout)["losses"] == [[step, pytest.approx(loss, abs=2e-3)] for step, loss in losses]
    weights = load_file(output / "adapter_model.safetensors")
    for name, weight in load_file(single_process / "adapter_model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=0)
    assert (output / "checkpoints" / "checkpoint-2" / saved).is_file()
    assert json.loads((output / "train.json").read_text())["status"] == "finished"


def test_contexts_per_step_must_be_divisible_by_the_number_of_processes(tmp_path: Path, short_rows: Path) -> None:
    completed = launch(tmp_path / "odd", short_rows, "--set", "optim.contexts_per_step=3")
    assert completed.returncode != 0
    assert "optim.contexts_per_step=3 is not divisible by the number of processes (2)" in completed.stderr


def test_the_documented_accelerate_command_is_valid() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    (line,) = re.findall(r"^accelerate launch (.*)$", page, re.MULTILINE)
    arguments = launch_command_parser().parse_args(line.split())
    assert (ROOT / arguments.config_file).is_file()
    assert arguments.module
    assert [arguments.training_script, *arguments.training_script_args[:-1]] == ["lceval", "train"]
    assert arguments.training_script_args[-1] in shipped()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_loads_the_configurations(name: str) -> None:
    config = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    assert config.num_processes == 8
    assert config.mixed_precision == "no"
