"""Learned scores: NVIDIA's layout, the computation, and lcft with a scorer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from scorers import random_scorer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lceval.core.errors import UserError
from lceval.models import scorer
from lceval.models.lcft import LCFT
from lceval.models.policies import Amount
from lceval.models.policies.kvzap import KVzap
from lceval.models.recipe import parse

WIDTH, KV_HEADS, LAYERS = 48, 2, 4
CONTEXT = " ".join(f"w{2 + n * n % 97}" for n in range(200))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Two full-attention layers and two with a sliding window, and a tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 6}
    sliding = {"use_sliding_window": True, "sliding_window": 24, "layer_types": kinds}
    config = AutoConfig.for_model("qwen2", vocab_size=99, num_key_value_heads=KV_HEADS, **shape, **sliding)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, **{f"w{n}": n for n in range(2, 99)}}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def published(folder: Path, hidden: int | None) -> dict[str, Tensor]:
    """A checkpoint as NVIDIA's are, written without `Scorer`; returns its tensors."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(WIDTH, KV_HEADS)] if hidden is None else [(WIDTH, hidden), (hidden, KV_HEADS)]
    tensors = {}
    for layer in range(LAYERS // 2):
        for place, (n, m) in enumerate(sizes):
            name = f"layers.{layer}" + ("" if hidden is None else f".{2 * place}")
            tensors[f"{name}.weight"] = torch.randn(m, n, generator=generator) / 4
            tensors[f"{name}.bias"] = torch.randn(m, generator=generator)
    folder.mkdir()
    config = {"input_dim": WIDTH, "output_dim": KV_HEADS, "n_modules": LAYERS // 2, "hidden_dim": hidden}
    (folder / "config.json").write_text(json.dumps({"architectures": ["KVzapModel"], **config}))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def inputs_of_attention(model: Any, ids: Tensor) -> list[Tensor]:
    """The attention inputs of the full-attention layers: layer norms of the residual stream, by transformers alone."""
    model.set_attn_implementation("eager")
    states = model(ids, output_hidden_states=True).hidden_states
    norms = [layer.input_layernorm for layer in model.model.layers]
    return [norms[index](states[index]) for index in range(LAYERS) if index % 2]


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [0, 70])
@pytest.mark.parametrize("hidden", [None, 16])
def test_a_published_scorer_gives_the_scores_of_a_direct_computation(
    model: tuple[Any, Any], tmp_path: Path, hidden: int | None, chunk: int
) -> None:
    tensors, (lm, tokenizer) = published(tmp_path / "scorer", hidden), model
    ids = tokenizer(CONTEXT)["input_ids"]
    expected = []
    for layer, x in enumerate(inputs_of_attention(lm, torch.tensor([ids]))):
        name = f"layers.{layer}" + ("" if hidden is None else ".0")
        y = x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        if hidden is not None:
            y = torch.nn.functional.gelu(y) @ tensors[f"layers.{layer}.2.weight"].T + tensors[f"layers.{layer}.2.bias"]
        expected.append(y.transpose(1, 2))
    lcft = LCFT(lm, tokenizer=tokenizer, kv="kvzap:0.5", scorer=str(tmp_path / "scorer"), prefill_chunk=chunk)
    prefill = lcft.engine.prefill(ids, lcft.recipe.stats_spec)
    got = [next(iter(layer.stats.learned.values())) for layer in prefill.layers if not layer.is_sliding]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # Nothing of the width of the hidden states is kept.
    sizes = [x.shape for layer in prefill.layers for x in vars(layer.stats).values() if isinstance(x, Tensor)]
    assert all(WIDTH not in shape for shape in sizes)


@pytest.mark.parametrize("hidden", [None, 16])
def test_a_batch_is_scored_as_its_rows(hidden: int | None) -> None:
    maps = random_scorer(WIDTH, KV_HEADS, LAYERS, hidden)
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    together = maps.score(1, x)
    assert together.shape == (3, KV_HEADS, 7)
    torch.testing.assert_close(together, torch.cat([maps.score(1, row[None]) for row in x]))


def test_a_saved_scorer_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    saved = random_scorer(WIDTH, KV_HEADS, LAYERS, 8).half()
    saved.save(tmp_path / "scorer")
    loaded = scorer.load(str(tmp_path / "scorer"))
    assert (loaded.digest, loaded.dimensions) == (saved.digest, saved.dimensions)
    assert str(loaded) == f"scorer@{saved.digest[:6]}"
    assert random_scorer(WIDTH, KV_HEADS, LAYERS).digest != saved.digest
    assert {*load_file(tmp_path / "scorer" / "model.safetensors")} == {
        f"layers.{n}.{m}.{part}" for n in range(LAYERS) for m in (0, 2) for part in ("weight", "bias")
    }


def question(context: str) -> list[Instance]:
    doc = {"context": context, "answers": ["w5"], "docs": [], "gold_pids": []}
    return [Instance("generate_until", doc, (f"{context} w7 w8 w9", {"max_gen_toks": 4}), 0, ("t", 0, 1))]


def test_recipes_and_scorers_share_one_prefill_and_are_told_apart(model: tuple[Any, Any], tmp_path: Path) -> None:
    lm, tokenizer = model
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        scorer.Scorer(WIDTH, KV_HEADS, LAYERS // 2).save(tmp_path / name)
    names = [str(tmp_path / name) for name in ("one", "other")]
    lcft = LCFT(lm, tokenizer=tokenizer, kv="full", scorer=names[0])
    assert "scorer" not in lcft.output_settings
    answers, settings, contexts = [], [], 0
    with lcft.sharing_prefills(["full", "kvzap:0.5", "kvzap:threshold=0.3:recent=5"], names):
        for name in names:
            for kv in ("full", "kvzap:0.5", "kvzap:threshold=0.3:recent=5"):
                lcft.use(kv, scorer=name)
                answers += lcft.generate_until(question(CONTEXT), disable_tqdm=True)
                settings.append((str(lcft.recipe), lcft.output_settings.get("scorer")))
                contexts += lcft.totals["contexts"]
    assert contexts == 1
    assert len({*settings}) == 5  # full has no scorer
    shares = [answer.meta["kv"]["kept_share"] for answer in answers]
    assert shares[0] == shares[3] == 1
    assert shares[2] != shares[5]
    alone = LCFT(lm, tokenizer=tokenizer, kv="kvzap:threshold=0.3:recent=5", scorer=names[1])
    (answer,) = alone.generate_until(question(CONTEXT), disable_tqdm=True)
    assert (str(answer), answer.meta["kv"]["kept_share"]) == (str(answers[5]), shares[5])


def test_a_scorer_that_is_missing_or_does_not_fit_is_one_line(model: tuple[Any, Any], tmp_path: Path) -> None:
    lm, tokenizer = model

    def refused(**arguments: Any) -> str:
        with pytest.raises(UserError) as refusal:
            LCFT(lm, tokenizer=tokenizer, kv="kvzap:0.5", **arguments)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    assert "requires a scorer" in refused()
    assert "lceval train scorer" in refused()
    assert "no such folder" in refused(scorer="/nowhere")
    random_scorer(WIDTH, KV_HEADS, LAYERS).save(tmp_path / "deep")
    assert f"n_modules is {LAYERS}, but qwen2 has {LAYERS // 2}" in refused(scorer=str(tmp_path / "deep"))
    published(tmp_path / "broken", None)
    file = tmp_path / "broken" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "layers.0.bias": torch.zeros(5)}, file)
    assert "layers.0.bias has shape (5,)" in refused(scorer=str(tmp_path / "broken"))
    file.write_bytes(file.read_bytes()[:-9])
    assert "is damaged" in refused(scorer=str(tmp_path / "broken"))
    (tmp_path / "broken" / "config.json").write_text('{"input_dim": 48}')
    assert "needs the integers input_dim, output_dim, n_modules" in refused(scorer=str(tmp_path / "broken"))
    file.unlink()
    published(tmp_path / "empty", None)
    (tmp_path / "empty" / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(scorer=str(tmp_path / "empty"))
    assert "a folder or a hub name" in refused(scorer=7)


def test_a_scope_decides_what_shares_a_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(1, 2, 40, generator=generator) + layer for layer in range(3)]
    counts = {}
    for scope in ("model", "layer", "head"):
        policy = KVzap(amount=Amount(10), scope=scope)
        masks = policy.select([s.clone() for s in scores])
        counts[scope] = [mask.sum(-1).flatten().tolist() for mask in masks]
        assert sum(map(sum, counts[scope])) == 60
    assert counts["head"] == [[10, 10]] * 3
    assert [sum(n) for n in counts["layer"]] == [20] * 3
    assert [sum(n) for n in counts["model"]] == [0, 0, 60]


@pytest.mark.parametrize("kv", ["snapkv:0.5:window=4", "adakv:0.5:of=knorm", "kvzip:0.5", "streaming:20"])
def test_with_a_total_budget_the_question_is_inside_it(model: tuple[Any, Any], kv: str) -> None:
    lm, tokenizer = model
    kept = {}
    for budget in ("context", "total"):
        lcft = LCFT(lm, tokenizer=tokenizer, kv=kv, query_aware=True, budget=budget)
        (answer,) = lcft.generate_until(question(CONTEXT), disable_tqdm=True)
        kept[budget] = sum(layer["mean"] for layer in answer.meta["kv"]["kept_tokens"]) / 2
    # 200 tokens of context, 3 of the question: 100 or (203 / 2 rounded) - 3.
    expected = (20, 17) if kv == "streaming:20" else (100, 99)
    assert (kept["context"], kept["total"]) == expected


def test_a_total_budget_requires_a_budget_and_a_question(model: tuple[Any, Any]) -> None:
    lm, tokenizer = model
    with pytest.raises(UserError, match=r"budget=total .* requires query_aware=true"):
        LCFT(lm, tokenizer=tokenizer, kv="snapkv:0.5", budget="total")
    with pytest.raises(UserError, match="kv=knorm:threshold=-4 has a threshold, not a budget"):
        LCFT(lm, tokenizer=tokenizer, kv="knorm:threshold=-4", query_aware=True, budget="total")
    assert parse("snapkv:0.5").within(100, 10) == parse("snapkv:45")
