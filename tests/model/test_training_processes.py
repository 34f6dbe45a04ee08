"""`lceval train` started as several processes, as `accelerate launch` does with devices: they learn what one does."""

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
from lceval.training.run import train

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = ROOT / "training" / "accelerate"


def recipe(output: Path) -> dict[str, Any]:
    """Two steps of two contexts."""
    return {
        "output": str(output),
        "model": {"dtype": "float32"},
        "data": {"datasets": ["filings"], "split": "all", "limit": 16, "seeds": [1234]},
        "optim": {"max_steps": 2, "contexts_per_step": 2, "warmup": 0.0},
        "save_steps": 2,
    }


def launch(output: Path, *options: str, configuration: str = "ddp") -> subprocess.CompletedProcess[str]:
    file = output.parent / f"{output.name}.yaml"
    file.write_text(json.dumps(recipe(output)))
    said = launch_command_parser().parse_args(["--config_file", str(CONFIGURATIONS / f"{configuration}.yaml"), ""])
    # accelerate starts several processes only where there are devices for them; torchrun starts them anyway.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "lceval"] if configuration == "ddp" else [str(Path(__file__).with_name("sharded.py"))]
    command += ["train", str(file), "--json", *options]
    environment = prepare_multi_gpu_env(_validate_launch_command(said)[0])
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what one process learns."""
    output = tmp_path_factory.mktemp("one") / "run"
    train(parse(recipe(output), "test"))
    return output


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("configuration", "saved"), [("ddp", "optimizer.pt"), ("fsdp2", "pytorch_model_fsdp.bin")])
def test_two_processes_learn_what_one_does(one: Path, tmp_path: Path, configuration: str, saved: str) -> None:
    output = tmp_path / "two"
    ran = launch(output, configuration=configuration)
    assert ran.returncode == 0, ran.stderr[-3000:]
    losses = json.loads((one / "train.json").read_text())["losses"]
    assert json.loads(ran.stdout)["losses"] == [[step, pytest.approx(loss, abs=2e-3)] for step, loss in losses]
    weights = load_file(output / "adapter_model.safetensors")
    for name, weight in load_file(one / "adapter_model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=0)
    assert (output / "checkpoints" / "checkpoint-2" / saved).is_file()
    assert json.loads((output / "train.json").read_text())["status"] == "finished"


def test_contexts_that_cannot_be_dealt_out_are_refused(tmp_path: Path) -> None:
    ran = launch(tmp_path / "odd", "--set", "optim.contexts_per_step=3")
    assert ran.returncode != 0
    assert "optim.contexts_per_step=3 cannot be dealt out to 2 processes: choose a multiple" in ran.stderr


def test_the_page_starts_several_processes_as_accelerate_understands_it() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    (line,) = re.findall(r"^accelerate launch (.*)$", page, re.MULTILINE)
    said = launch_command_parser().parse_args(line.split())
    assert (ROOT / said.config_file).is_file()
    assert said.module
    assert [said.training_script, *said.training_script_args[:-1]] == ["lceval", "train"]
    assert said.training_script_args[-1] in shipped()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_reads_the_configurations(name: str) -> None:
    found = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    assert found.num_processes == 8
    assert found.mixed_precision == "no"
