"""lcft over models with states, sinks, caps, chunks and shared keys, in folders, against `--model hf`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from answers import QUESTIONS, answered, assert_equal
from lm_eval.models.huggingface import HFLM
from tiny_models import save_tokenizer

from lceval.cli import invoke
from lceval.models import attention
from lceval.models.lcft import LCFT

FAMILIES = ["qwen3_5_text", "nemotron_h", "falcon_h1", "lfm2", "gpt_oss", "gemma2", "gemma3n_text", "llama4_text"]
FAMILIES += ["deepseek_v3", "kimi_linear"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("models") / request.param
    families.model(request.param).save_pretrained(path)
    return save_tokenizer(path)


@pytest.mark.parametrize("method", ["generate_until", "loglikelihood"])
def test_full_answers_as_hf_in_batches_of_different_questions_and_contexts(folder: str, method: str) -> None:
    hf = answered(HFLM(folder, device="cpu", dtype="float32", batch_size=1), method)
    for batch_size in (1, 3):
        ours = answered(LCFT(folder, kv="full", device="cpu", dtype="float32", batch_size=batch_size), method)
        assert_equal(ours, hf, method)


@pytest.mark.parametrize(
    ("kv", "more"),
    [
        ("snapkv:0.5:window=8", {"diagnose": "gold"}),
        ("snapkv:0.5:window=8", {"query_aware": True}),
        ("kvzip:0.5+int4:residual=0", {}),
        ("knorm:0.5:when=chunk:chunk=16", {}),
        ("knorm:4:when=decode:every=2", {}),
        ("streaming:40:when=always", {}),
    ],
)
def test_a_batch_answers_as_its_questions_do_alone(folder: str, kv: str, more: dict[str, Any]) -> None:
    if "when=always" in kv and "gemma3n" in folder:
        pytest.skip("refused: layers share keys")
    alone, together = (
        answered(LCFT(folder, kv=kv, device="cpu", dtype="float32", batch_size=size, **more), "generate_until")
        for size in (1, 3)
    )
    assert_equal(together, alone, "generate_until")
    for one, other in zip(alone, together, strict=True):
        assert one.meta["kv_bytes"] == other.meta["kv_bytes"]
        assert (one.meta["kv"]["state_bytes"] > 0) == has_states(folder)
        if "diagnose" in more:
            assert other.meta["gold_nll"] == pytest.approx(one.meta["gold_nll"], abs=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("family", families.MULTIMODAL)
def test_the_text_model_of_a_multimodal_checkpoint_answers(family: str, tmp_path: Path) -> None:
    whole = families.multimodal(family)
    whole.save_pretrained(tmp_path)
    # Apart: transformers knows the tokenizer of some of these models by the model's type.
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    model = LCFT(str(tmp_path), tokenizer=tokenizer, kv="snapkv:0.5:window=8", device="cpu", dtype="float32")
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    model.base.set_attn_implementation("eager")
    decoder = whole.get_decoder()
    states = getattr(decoder, "model", decoder)(input_ids=ids).last_hidden_state
    expected = whole.get_output_embeddings()(states)
    torch.testing.assert_close(model.base(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.base.set_attn_implementation(attention.NAME)
    answers = answered(model, "generate_until")
    assert len(answers) == len(QUESTIONS)
    assert all(answer.meta["kv"]["status"] == "ok" for answer in answers)
    assert all(0.4 < answer.meta["kv"]["kept_share"] < 1 for answer in answers)


def command_line(whole: Any, folder: Path) -> list[str]:
    """The arguments of a run of a multimodal model, which is saved in `folder`."""
    whole.save_pretrained(folder / "model")
    # The contexts are longer than these small models' positions.
    arguments = f"pretrained={folder / 'model'},tokenizer={save_tokenizer(folder / 'tokenizer')},max_length=4096"
    line = ["--model", "lcft", "--model_args", f"{arguments},kv=snapkv:0.5", "--tasks", "lc_filings_ao_1k"]
    return [*line, "--limit", "2", "--gen_kwargs", "max_gen_toks=8", "--device", "cpu", "--output_path"]


def responses(folder: Path) -> list[Any]:
    (file,) = folder.rglob("samples_*.jsonl")
    return [json.loads(line)["resps"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize("family", families.MULTIMODAL)
def test_a_multimodal_checkpoint_runs_from_its_folder(family: str, tmp_path: Path, capfd: Any) -> None:
    line = command_line(families.multimodal(family), tmp_path)
    assert invoke(["run", *line, str(tmp_path / "run")]) == 0
    assert len(responses(tmp_path / "run")) == 2
    assert "snapkv:0.5" in capfd.readouterr().out


@pytest.mark.slow
def test_lm_eval_itself_runs_a_multimodal_checkpoint_from_its_folder(tmp_path: Path) -> None:
    line = command_line(families.multimodal("gemma3"), tmp_path)
    command = [sys.executable, "-m", "lm_eval", *line, str(tmp_path / "run"), "--log_samples"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(responses(tmp_path / "run")) == 2


def has_states(folder: str) -> bool:
    return any(name in folder for name in ("qwen3_5", "nemotron", "falcon", "lfm2", "kimi"))
