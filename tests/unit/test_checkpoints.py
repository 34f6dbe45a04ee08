"""Checkpoints as they come, on each kind of attention: adapters, shards, tied heads, quantized and 16-bit weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from answers import answered, assert_equal
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from tiny_models import save_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from lceval.models.lcft import LCFT

# Plain attention, sinks, caps, latents, latents beside states, states, chunks, shared keys.
FAMILIES = ["llama", "gpt_oss", "gemma2", "deepseek_v3", "kimi_linear", "qwen3_5_text", "llama4_text", "gemma3n_text"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_b_proj", "kv_b_proj", "in_proj_qkv")
ADAPTERS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["k_proj", "kv_b_proj"]},
}
METHOD = "loglikelihood"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """Saves a model with its tokenizer and returns the folder's name."""

    def save(model: Any, **options: Any) -> str:
        model.save_pretrained(tmp_path / "model", **options)
        return save_tokenizer(tmp_path / "model")

    return save


def scores(cls: type[HFLM], folder: str, dtype: str = "float32", **arguments: Any) -> list[Any]:
    return answered(cls(folder, device="cpu", dtype=dtype, **arguments), METHOD)


def assert_as_hf(folder: str, **arguments: Any) -> list[Any]:
    """Scores of lcft in batches equal those of hf, which are returned."""
    theirs = scores(HFLM, folder, **arguments)
    assert_equal(scores(LCFT, folder, kv="full", batch_size=3, **arguments), theirs, METHOD)
    return theirs


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_on_the_attention_scores_as_hf(
    family: str, adapter: str, saved: Callable[..., str], tmp_path: Path
) -> None:
    model = families.model(family)
    folder = saved(model)
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is nn.Linear}
    options = {**ADAPTERS[adapter]}
    whole = [name for name in options.get("modules_to_save", []) if name in linear]
    if "modules_to_save" in options:
        options["modules_to_save"] = whole
    targets = [name for name in ATTENTION if name in linear and name not in whole]
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # families whose experts are no modules
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = assert_as_hf(folder, peft=str(tmp_path / "adapter"))
    plain = scores(HFLM, folder)
    assert max(abs(a - b) for (a, _), (b, _) in zip(theirs, plain, strict=True)) > 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_shards_with_tied_and_untied_heads_score_as_hf(family: str, tied: bool, saved: Callable[..., str]) -> None:
    folder = saved(families.model(family, tie_word_embeddings=tied), max_shard_size="60KB")
    assert len([*Path(folder).glob("*.safetensors")]) > 2
    assert_as_hf(folder)


# lm-eval passes the configuration that the checkpoint has.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_quantized_weights_score_as_hf(family: str, saved: Callable[..., str], tmp_path: Path) -> None:
    # No part of the dev extra: it prints what it could not load into every process that imports transformers.
    quantization = pytest.importorskip("torchao.quantization")
    saved(families.model(family))
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    kinds = {type(parameter).__name__ for parameter in quantized.parameters()}
    assert "Int8Tensor" in kinds
    theirs = assert_as_hf(saved(quantized), dtype="auto")
    # Every head's values, through a projection that is quantized too.
    if "deepseek" not in family and "kimi" not in family:
        answers = scores(LCFT, str(tmp_path / "model"), dtype="auto", kv="criticalkv:0.9")
        assert answers != theirs


def test_bfloat16_is_as_far_from_float32_as_hf_is(family: str, saved: Callable[..., str]) -> None:
    folder = saved(families.model(family))
    exact = scores(HFLM, folder)
    theirs, ours = (
        torch.tensor([a - b for (a, _), (b, _) in zip(scores(cls, folder, "bfloat16", **more), exact, strict=True)])
        for cls, more in ((HFLM, {}), (LCFT, {"kv": "full", "batch_size": 3}))
    )
    assert ours.abs().mean() < 2 * theirs.abs().mean()
