"""`lceval train` on the packaged model: a loss that falls, a run that resumes, an adapter that lcft loads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lceval.errors import UserError
from lceval.training import dry_run, precision
from lceval.training.config import Config, parse, read
from lceval.training.packing import Packing, QAPair, pack
from lceval.training.run import train

pytestmark = [pytest.mark.model, pytest.mark.slow]
STEPS = 4


def recipe(output: Path, **more: Any) -> dict[str, Any]:
    """Four steps of one context on the shipped filings, seen through evictors."""
    return {
        "output": str(output),
        "model": {"dtype": "float32"},
        "data": {"datasets": ["filings"], "split": "all", "limit": 9, "seeds": [1234]},
        "optim": {
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "contexts_per_step": 1,
            "warmup": 0.0,
            "schedule": "constant",
        },
        "compression_aware": {"evictors": ["snapkv", "random"], "full": 0.2, "self_distillation": 1.0},
        "save_steps": 1,
        **more,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run without interruption."""
    output = tmp_path_factory.mktemp("train") / "whole"
    return output, train(parse(recipe(output), "test"))


def start(output: Path) -> subprocess.Popen[str]:
    """The same run in a process of its own."""
    file = output.parent / "recipe.yaml"
    file.write_text(json.dumps(recipe(output)))
    command = [sys.executable, "-c", "from lceval.cli import main; main()", "train", str(file), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_killed_at_a_step_goes_on_with_the_same_losses(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    process = start(output)
    until = time.monotonic() + 300
    while not list(output.glob("checkpoints/checkpoint-2/trainer_state.json")):
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert json.loads((output / "train.json").read_text())["status"] == "running"
    again = start(output)
    said, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors[-2000:]
    record = json.loads(said)
    assert record["losses"] == whole[1]["losses"]
    assert len(record["losses"]) == STEPS


def test_the_loss_falls_and_the_record_says_what_was_learned(whole: tuple[Path, dict[str, Any]]) -> None:
    output, record = whole
    losses = [loss for _, loss in record["losses"]]
    assert min(losses) < losses[0] / 2
    assert record["data"]["questions"] <= 9
    card = (output / "README.md").read_text()
    assert record["data"]["digest"] in card
    assert not list(output.glob("*.bin"))


def test_a_finished_run_is_found_and_another_recipe_refused_its_folder(whole: tuple[Path, dict[str, Any]]) -> None:
    output, record = whole
    before = time.perf_counter()
    assert train(parse(recipe(output), "test")) == record
    assert time.perf_counter() - before < 1
    with pytest.raises(UserError, match="other seed"):
        train(parse(recipe(output, seed=7), "test"))


def test_lcft_loads_the_adapter_and_answers_otherwise(whole: tuple[Path, dict[str, Any]], smollm2: str) -> None:
    from lceval.models.lcft import LCFT

    tuned = LCFT(smollm2, peft=str(whole[0]), device="cpu")
    ids = torch.tensor([tuned.tok_encode("Profit of the year was")])
    with torch.no_grad():
        ours = tuned.model(input_ids=ids).logits
        with tuned.model.disable_adapter():
            theirs = tuned.model(input_ids=ids).logits
    assert (ours - theirs).abs().max() > 0.1


def test_a_tables_neighbourhoods_are_learned(tmp_path: Path) -> None:
    """The shipped recipe, smaller: one local set with two queries, until it is known."""
    small = ["neighbourhoods.datasets=[cancer]", "neighbourhoods.sets=1", "neighbourhoods.context_rows=4"]
    small += ["model.dtype=float32", "neighbourhoods.queries=2"]
    few = ["optim.max_steps=4", "optim.contexts_per_step=1", "optim.learning_rate=1e-3", "optim.warmup=0"]
    record = train(read("tabular_sft", [*small, *few, f"output={tmp_path / 'run'}"]))
    losses = [loss for _, loss in record["losses"]]
    assert record["data"]["questions"] == 2
    assert min(losses) < losses[0] / 2
    assert "cancer" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(("dtype", "lora"), [("bfloat16", True), ("bfloat16", False), ("float32", False)])
def test_the_plan_counts_what_backward_remembers(smollm2: str, dtype: str, lora: bool) -> None:
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from lceval.models import attention
    from lceval.models.geometry import Geometry
    from lceval.training import sft

    said: dict[str, Any] = {"output": "unused", "model": {"dtype": dtype}}
    made: Config = parse(said if lora else {**said, "lora": None}, "test")
    config = AutoConfig.from_pretrained(smollm2)
    config.num_hidden_layers = 4  # bfloat16 products take a second each on a CPU that has no instructions for them
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.set_attn_implementation(attention.register())
    geometry = Geometry.of(model)
    tuned = get_peft_model(model, sft.lora(made)) if lora else model
    weights = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    packed = {key: torch.tensor([row]) for key, row in pack(range(10, 410), [QAPair((5, 6, 7), (8, 9))]).items()}
    saved: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        tuned(
            input_ids=packed["input_ids"],
            position_ids=packed["position_ids"],
            packing=Packing(packed["block"], packed["kind"], geometry),
            logits_to_keep=1,
            use_cache=False,
        )
    counted = dry_run.activations(model.config, made, packed["block"].shape[1])
    # Measured: 0.99, 1.02 and 0.93 of the count.
    assert sum(saved.values()) == pytest.approx(counted, rel=0.1)


def test_texts_are_learned_with_shifted_attention_for_a_longer_window(tmp_path: Path, smollm2: str) -> None:
    from transformers import AutoModelForCausalLM

    lines = [
        {"book": str(n % 2), "text": f"Page {n}. " + "The ledger of the harbour was kept in ink. " * 30}
        for n in range(8)
    ]
    file = tmp_path / "books.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = {
        "output": str(tmp_path / "long"),
        "texts": {"files": [str(file)], "group": "book", "tokens": 256},
        "longlora": {"window_tokens": 16384},
        "optim": {"max_steps": 2, "contexts_per_step": 1, "learning_rate": 1e-3, "warmup": 0.0},
        "model": {"dtype": "float32"},
    }
    record = train(parse(said, "test"))
    losses = [loss for _, loss in record["losses"]]
    assert losses[1] < losses[0]
    # A longer window is no adapter's to say: a whole model, which knows it.
    assert record["loads_as"] == "pretrained"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long" / "model")
    assert model.config.max_position_embeddings == 16384
    assert f"pretrained={tmp_path / 'long' / 'model'}" in (tmp_path / "long" / "README.md").read_text()


def test_bfloat16_weights_are_trained_and_recorded(tmp_path: Path) -> None:
    """Two steps of 16 tokens: a CPU without bfloat16 instructions computes about a token a second."""
    file = tmp_path / "text.txt"
    file.write_text("The ledger of the harbour was kept in ink. " * 8)
    small = [
        "texts.tokens=16",
        "optim.max_steps=2",
        "optim.contexts_per_step=1",
        "optim.warmup=0",
        "optim.learning_rate=1e-3",
    ]
    output = tmp_path / "run"
    record = train(read("ao_sft", ["model.dtype=bfloat16", f"texts.files=[{file}]", f"output={output}", *small]))
    losses = [loss for _, loss in record["losses"]]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    assert "weights in bfloat16" in (output / "README.md").read_text()
    assert json.loads((output / "train.json").read_text())["recipe"]["model"]["dtype"] == "bfloat16"


def test_auto_is_recorded_as_the_dtype_that_was_used(whole: tuple[Path, dict[str, Any]]) -> None:
    """A finished run in the machine's own dtype is found again under `auto`, and only there."""
    output, record = whole
    spelled = recipe(output)
    del spelled["model"]
    if precision.fast_dtype() == "float32":
        assert train(parse(spelled, "test")) == record
    else:
        with pytest.raises(UserError, match="other model"):
            train(parse(spelled, "test"))
