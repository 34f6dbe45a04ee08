"""`lceval train` on the packaged model: the loss falls, a killed run resumes, lcft loads the adapter."""

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

from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.training import dry_run, precision
from lceval.training.config import Config, parse, read
from lceval.training.packing import Packing, QAPair, pack
from lceval.training.train import train

pytestmark = [pytest.mark.model, pytest.mark.slow]
STEPS = 3


def recipe(output: Path, rows: Path, **more: Any) -> dict[str, Any]:
    """Compression-aware training with self-distillation, one context per step."""
    return {
        "output": str(output),
        "model": {"dtype": "float32"},
        "rows": str(rows),
        "lora": {"r": 4, "alpha": 8},
        "optim": {
            "learning_rate": 3e-3,
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
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, short_rows: Path) -> tuple[Path, dict[str, Any]]:
    """Output folder and record of a run without interruption."""
    output = tmp_path_factory.mktemp("train") / "uninterrupted"
    return output, train(parse(recipe(output, short_rows), "test"))


def test_a_run_killed_at_a_step_resumes_with_the_same_losses(
    uninterrupted: tuple[Path, dict[str, Any]], short_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, file = tmp_path / "killed", tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(output, short_rows)))
    command = ["train", str(file), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from lceval.cli import main; main()", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(output.glob("checkpoints/checkpoint-1/trainer_state.json")):
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert json.loads((output / "train.json").read_text())["status"] == "running"
    capsys.readouterr()
    assert invoke(command) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert f"step 1 of {STEPS}" not in printed.err
    assert record["losses"] == uninterrupted[1]["losses"]
    assert len(record["losses"]) == STEPS


def test_the_loss_falls_and_the_record_describes_the_data(uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    output, record = uninterrupted
    losses = [loss for _, loss in record["losses"]]
    assert min(losses) < losses[0] / 2
    assert record["data"]["questions"] == 4
    card = (output / "README.md").read_text()
    assert record["data"]["digest"] in card
    assert not list(output.glob("*.bin"))
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == record["recipe"]["model"]["pretrained"]


def test_a_finished_run_is_not_repeated_and_another_recipe_in_its_folder_is_an_error(
    uninterrupted: tuple[Path, dict[str, Any]], short_rows: Path
) -> None:
    output, record = uninterrupted
    before = time.perf_counter()
    assert train(parse(recipe(output, short_rows), "test")) == record
    assert time.perf_counter() - before < 1
    with pytest.raises(UserError, match="different seed"):
        train(parse(recipe(output, short_rows, seed=7), "test"))


def test_lcft_loads_the_adapter_and_its_logits_differ_from_the_base(
    uninterrupted: tuple[Path, dict[str, Any]], smollm2: str
) -> None:
    from lceval.models.lcft import LCFT

    tuned = LCFT(smollm2, peft=str(uninterrupted[0]), device="cpu")
    ids = torch.tensor([tuned.tok_encode("Profit of the year was")])
    with torch.no_grad():
        logits = tuned.model(input_ids=ids).logits
        with tuned.model.disable_adapter():
            base_logits = tuned.model(input_ids=ids).logits
    assert (logits - base_logits).abs().max() > 0.1


def test_training_on_the_neighbourhoods_of_a_table_lowers_the_loss(tmp_path: Path) -> None:
    """The shipped recipe on one local set with two queries."""
    overrides = ["neighbourhoods.datasets=[iris]", "neighbourhoods.sets=1", "neighbourhoods.context_rows=4"]
    overrides += ["model.dtype=float32", "neighbourhoods.queries=2"]
    overrides += ["optim.max_steps=3", "optim.contexts_per_step=1", "optim.learning_rate=1e-3", "optim.warmup=0"]
    record = train(read("tabular_sft", [*overrides, f"output={tmp_path / 'run'}"]))
    losses = [loss for _, loss in record["losses"]]
    assert record["data"]["questions"] == 2
    assert min(losses) < losses[0] / 2
    assert "iris" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(("dtype", "lora"), [("bfloat16", True), ("bfloat16", False), ("float32", False)])
def test_the_estimate_counts_the_tensors_saved_for_backward(smollm2: str, dtype: str, lora: bool) -> None:
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from lceval.models import attention
    from lceval.models.geometry import Geometry
    from lceval.training import sft

    values: dict[str, Any] = {"output": "unused", "model": {"dtype": dtype}}
    training: Config = parse(values if lora else {**values, "lora": None}, "test")
    config = AutoConfig.from_pretrained(smollm2)
    config.num_hidden_layers = 4  # without bfloat16 instructions a CPU takes a second per product
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.set_attn_implementation(attention.register())
    geometry = Geometry.of(model)
    tuned = get_peft_model(model, sft.lora(training)) if lora else model
    weights = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    packed = {key: torch.tensor([row]) for key, row in pack(range(10, 410), [QAPair((5, 6, 7), (8, 9))]).items()}
    saved: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        tuned(
            input_ids=packed["input_ids"],
            position_ids=packed["position_ids"],
            packing=Packing(packed["block"], packed["kind"], geometry),
            logits_to_keep=1,
            use_cache=False,
        )
    estimate = dry_run.activations(model.config, training, packed["block"].shape[1])
    # Measured: 0.99, 1.02 and 0.93 of the estimate.
    assert sum(saved.values()) == pytest.approx(estimate, rel=0.1)


def test_longlora_trains_on_texts_and_saves_a_model_with_a_longer_window(tmp_path: Path, smollm2: str) -> None:
    from transformers import AutoModelForCausalLM

    lines = [
        {"book": str(n % 2), "text": f"Page {n}. " + "The ledger of the harbour was kept in ink. " * 30}
        for n in range(8)
    ]
    file = tmp_path / "books.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "output": str(tmp_path / "long"),
        "texts": {"files": [str(file)], "group": "book", "tokens": 64},
        "longlora": {"window_tokens": 16384},
        "optim": {"max_steps": 2, "contexts_per_step": 1, "learning_rate": 1e-3, "warmup": 0.0},
        "model": {"dtype": "float32"},
    }
    record = train(parse(values, "test"))
    losses = [loss for _, loss in record["losses"]]
    assert losses[1] < losses[0]
    # An adapter cannot specify a longer window, so the output is a model.
    assert record["loads_as"] == "pretrained"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long" / "model")
    assert model.config.max_position_embeddings == 16384
    assert f"pretrained={tmp_path / 'long' / 'model'}" in (tmp_path / "long" / "README.md").read_text()


def test_bfloat16_weights_are_trained_and_recorded(tmp_path: Path) -> None:
    """Two steps of 16 tokens: a CPU without bfloat16 instructions trains on about one token per second."""
    file = tmp_path / "text.txt"
    file.write_text("The ledger of the harbour was kept in ink. " * 8)
    overrides = [
        "texts.tokens=16",
        "optim.max_steps=2",
        "optim.contexts_per_step=1",
        "optim.warmup=0",
        "optim.learning_rate=1e-3",
    ]
    output = tmp_path / "run"
    record = train(read("ao_sft", ["model.dtype=bfloat16", f"texts.files=[{file}]", f"output={output}", *overrides]))
    losses = [loss for _, loss in record["losses"]]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    assert "weights in bfloat16" in (output / "README.md").read_text()
    assert json.loads((output / "train.json").read_text())["recipe"]["model"]["dtype"] == "bfloat16"


def test_auto_is_recorded_as_the_dtype_that_was_used(
    uninterrupted: tuple[Path, dict[str, Any]], short_rows: Path
) -> None:
    """`auto` matches a finished run if it resolves to the dtype of that run."""
    output, record = uninterrupted
    with_auto = recipe(output, short_rows)
    del with_auto["model"]
    if precision.fast_dtype() == "float32":
        assert train(parse(with_auto, "test")) == record
    else:
        with pytest.raises(UserError, match="different model"):
            train(parse(with_auto, "test"))
