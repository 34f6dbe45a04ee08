"""Recipes of `lceval train`: what is refused, what is drawn, what a plan says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lceval.cli import invoke
from lceval.errors import UserError
from lceval.training import compression_aware, config, precision
from lceval.training.config import CompressionAware, parse, read


@pytest.mark.parametrize("name", config.shipped())
def test_a_shipped_recipe_is_whole(name: str) -> None:
    made = read(name)
    assert made.output == Path("runs") / name
    if made.compression_aware is not None:
        compression_aware.check(made.compression_aware)


def test_changes_reach_into_sections() -> None:
    made = read("ao_sft", ["optim.learning_rate=1e-4", "lora=null", "data.datasets=[nqopen]", "output=elsewhere"])
    assert made.optim.learning_rate == 1e-4
    assert made.lora is None
    assert made.data.datasets == ("nqopen",)
    assert made.output == Path("elsewhere")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["optim.lr=1"], "unknown key optim.lr; one of learning_rate"),
        (["lora.rank=8"], "unknown key lora.rank"),
        (["data.lenght_k=2"], "did you mean length_k"),
        (["optim.max_steps=0"], "optim.max_steps: input should be greater than 0"),
        (["compression_aware.evictors=[snapkv]", "compression_aware.keep=[0.9, 0.2]"], "0 < lower <= upper <= 1"),
        (["optim.learning_rate"], "expected KEY=VALUE"),
        (["longlora.r=8"], "longlora learns from texts"),
        (["texts.files=[a.txt]", "texts.tokens=64", "eval_contexts=2"], "texts go with neither"),
        (["rows=a.jsonl", "neighbourhoods.sets=2"], "rows and neighbourhoods exclude each other"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line(changes: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        read("ao_sft", changes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "onednn", "expected"),
    [
        (True, False, True, "bfloat16"),
        (False, True, True, "bfloat16"),
        (False, False, True, "float32"),  # AVX-512 alone: oneDNN accepts bfloat16 and is slower at it
        (True, True, False, "float32"),  # forbidden by ONEDNN_MAX_CPU_ISA
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, avx512_bf16: bool, amx: bool, onednn: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(precision, "_onednn_multiplies_bfloat16", lambda: onednn)
    assert precision.fast_dtype() == expected
    assert precision.resolve(read("ao_sft")).model.dtype == expected
    assert precision.resolve(read("ao_sft", ["model.dtype=float16"])).model.dtype == "float16"


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(UserError, match="ao_sft"):
        read("nonesuch")


@pytest.mark.parametrize(
    ("evictor", "said"),
    [("int4", "evicts nothing"), ("snapvk", "did you mean"), ("kvzip", "not in training"), ("fier", "evicts nothing")],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_loaded(evictor: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compression_aware.check(CompressionAware(evictors=[evictor]))


@given(st.integers(0, 2**32), st.floats(0, 1), st.booleans())
def test_what_is_drawn_keeps_a_share_between_the_bounds(seed: int, progress: float, curriculum: bool) -> None:
    said = CompressionAware(
        evictors=["snapkv:window=32", "random", "adakv:of=knorm"], keep=(0.2, 0.6), curriculum=curriculum
    )
    drawn = compression_aware.draw(said, random.Random(seed), progress)
    again = compression_aware.draw(said, random.Random(seed), progress)
    assert drawn == again
    if drawn is not None:
        low = 0.6 - 0.4 * min(1, 2 * progress) if curriculum else 0.2
        assert low - 1e-4 <= drawn.amount.value <= 0.6 + 1e-4


def test_the_full_cache_is_drawn_as_often_as_said() -> None:
    said = CompressionAware(evictors=["knorm"], full=0.3)
    drawn = [compression_aware.draw(said, random.Random(seed), 0) for seed in range(2000)]
    # Three standard deviations of a share of 0.3 among 2,000.
    assert abs(sum(d is None for d in drawn) / 2000 - 0.3) < 0.031


def test_the_plan_of_the_papers_setting_fits_a_gpu_of_80_gb(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["train", "paper_ao_sft", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 7_615_616_512  # as its model card counts
    # r (in + out) of seven projections in 28 layers.
    assert report["trained_parameters"] == 161_480_704
    assert report["longest_context_tokens"] == 32_768
    assert report["total_gib"] < 0.9 * 80e9 / 2**30


def test_the_model_of_a_recipe_without_shape_must_be_at_hand(tmp_path: Path) -> None:
    from lceval.training.dry_run import estimate

    made = parse({"output": "unused", "model": {"pretrained": str(tmp_path)}}, "test")
    with pytest.raises(UserError, match=r"model\.shape"):
        estimate(made)


DOC = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def test_the_page_on_training_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for name in config.shipped():
        assert f"`{name}`" in DOC
    for section in config.Config.model_fields:
        assert f"`{section}`" in DOC
    assert invoke(["train", "paper_ao_sft", "--dry-run"]) == 0
    assert f"{float(capsys.readouterr().out.rpartition('about ')[2].split()[0])} GiB" in DOC


def test_the_pages_recipes_can_be_read() -> None:
    import re

    import yaml

    for block in re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL):
        parse({"output": "unused", **yaml.safe_load(block)}, "training.md")
    lines = [line.split()[2:] for line in re.findall(r"^lceval train [^e].*", DOC, re.MULTILINE)]
    assert lines
    for name, *changes in lines:
        read(name, [change for change in changes if "=" in change])


def test_texts_are_cut_into_sequences_and_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    from lceval.training.texts import Texts, sequences

    file = tmp_path / "pages.jsonl"
    file.write_text(
        '{"doc": "a", "text": "one two"}\n{"doc": "b", "text": "six"}\n{"doc": "a", "text": "three four"}\n'
    )

    def encode(text: str) -> list[int]:
        return [len(word) for word in text.split()]

    found = sequences(Texts(files=[file], group="doc", tokens=2), encode)
    assert sorted(found) == [(3, 3), (5, 4)]  # one two, three four; six is too short
    with pytest.raises(UserError, match="no document has 9 tokens"):
        sequences(Texts(files=[file], tokens=9), encode)
    with pytest.raises(UserError, match=r"pages.jsonl:1: no document"):
        sequences(Texts(files=[file], field="body", tokens=2), encode)
    with pytest.raises(UserError, match="cannot read"):
        sequences(Texts(files=[tmp_path / "none.txt"], tokens=2), encode)
