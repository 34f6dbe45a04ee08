"""Recipes of `lceval train`: validation, overrides, random evictors and the dry run."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.training import compression_aware, config, precision
from lceval.training.config import CompressionAware, parse, read
from lceval.training.scorers import spec as scorers


@pytest.mark.parametrize("name", config.shipped())
def test_a_shipped_recipe_is_valid(name: str) -> None:
    recipe = read(name)
    assert recipe.output == Path("runs") / name
    if recipe.compression_aware is not None:
        compression_aware.check(recipe.compression_aware)


def test_overrides_apply_to_sections() -> None:
    recipe = read("ao_sft", ["optim.learning_rate=1e-4", "lora=null", "data.datasets=[nqopen]", "output=elsewhere"])
    assert recipe.optim.learning_rate == 1e-4
    assert recipe.lora is None
    assert recipe.data.datasets == ("nqopen",)
    assert recipe.output == Path("elsewhere")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=1"], "--set optim.lr: unknown key; one of learning_rate"),
        (["lora.rank=8"], "--set lora.rank: unknown key"),
        (["data.lenght_k=2"], "--set data.lenght_k: unknown key; did you mean length_k?"),
        (["data={datasets: []}"], "--set data.datasets: tuple should have at least 1 item"),
        (["optim.max_steps=0"], "--set optim.max_steps: input should be greater than 0 (got 0)"),
        (["compression_aware.evictors=[snapkv]", "compression_aware.keep=[0.9, 0.2]"], "0 < lower <= upper <= 1"),
        (["optim.learning_rate"], "--set optim.learning_rate: expected --set KEY=VALUE"),
        (["data.datasets=[squad"], "--set data.datasets=[squad: invalid YAML"),
        (["longlora.r=8"], "ao_sft: longlora requires texts"),
        (["texts.files=[a.txt]", "texts.tokens=64", "eval_contexts=2"], "texts have no questions"),
        (["rows=a.jsonl", "neighbourhoods.sets=2"], "rows and neighbourhoods are mutually exclusive"),
    ],
)
def test_an_invalid_recipe_is_an_error_of_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        read("ao_sft", overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_invalid_key_of_a_file_is_reported_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 1}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: optim\.lr: unknown key"):
        read(str(file), ["optim.max_steps=2"])


def test_the_command_overrides_keys_with_set_and_the_folder_with_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "paper_ao_sft", "--set", "optim.max_steps=3", "--set", "optim.contexts_per_step=2"]
    assert invoke([*command, "--output", str(tmp_path / "mine"), "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["tokens"]) == (3, 3 * 2 * 32_768)
    assert report["output"] == str(tmp_path / "mine")
    assert invoke([*command, "--set", "optim.lr=1", "--dry-run"]) == 2
    assert "--set optim.lr: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize("position", [2, 3])
def test_a_positional_override_is_an_error_that_names_set(position: int, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "ao_sft", "--dry-run"]
    command.insert(position, "optim.max_steps=2")
    assert invoke(command) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "'optim.max_steps=2': override recipe keys with --set KEY=VALUE" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "onednn", "expected"),
    [
        (True, False, True, "bfloat16"),
        (False, True, True, "bfloat16"),
        (False, False, True, "float32"),  # AVX-512 only: oneDNN accepts bfloat16 but is slower with it
        (True, True, False, "float32"),  # disabled by ONEDNN_MAX_CPU_ISA
    ],
)
def test_auto_is_bfloat16_where_the_cpu_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, avx512_bf16: bool, amx: bool, onednn: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(precision, "_onednn_multiplies_bfloat16", lambda: onednn)
    assert precision.fast_dtype() == expected
    assert precision.resolve(read("ao_sft")).model.dtype == expected
    assert precision.resolve(read("ao_sft", ["model.dtype=float16"])).model.dtype == "float16"


def test_an_unknown_recipe_is_an_error_that_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError, match="ao_sft"):
        read("nonesuch")


@pytest.mark.parametrize(
    ("evictor", "message"),
    [
        ("int4", "does not evict"),
        ("snapvk", "did you mean"),
        ("kvzip", "not supported in training"),
        ("fier", "does not evict"),
    ],
)
def test_an_unsupported_evictor_is_an_error_before_anything_is_loaded(evictor: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compression_aware.check(CompressionAware(evictors=[evictor]))


@given(st.integers(0, 2**32), st.floats(0, 1), st.booleans())
def test_a_drawn_evictor_keeps_a_share_between_the_bounds(seed: int, progress: float, curriculum: bool) -> None:
    section = CompressionAware(
        evictors=["snapkv:window=32", "random", "adakv:of=knorm"], keep=(0.2, 0.6), curriculum=curriculum
    )
    drawn = compression_aware.draw(section, random.Random(seed), progress)
    repeated = compression_aware.draw(section, random.Random(seed), progress)
    assert drawn == repeated
    if drawn is not None:
        low = 0.6 - 0.4 * min(1, 2 * progress) if curriculum else 0.2
        assert low - 1e-4 <= drawn.amount.value <= 0.6 + 1e-4


def test_the_full_cache_is_drawn_with_its_probability() -> None:
    section = CompressionAware(evictors=["knorm"], full=0.3)
    drawn = [compression_aware.draw(section, random.Random(seed), 0) for seed in range(2000)]
    # Three standard deviations of a proportion of 0.3 with n = 2,000.
    assert abs(sum(d is None for d in drawn) / 2000 - 0.3) < 0.031


def test_the_estimate_of_the_papers_setting_fits_an_80_gb_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["train", "paper_ao_sft", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 7_615_616_512  # from its model card
    # r (in + out) of seven projections in 28 layers.
    assert report["trained_parameters"] == 161_480_704
    assert report["longest_context_tokens"] == 32_768
    assert report["total_gib"] < 0.9 * 80e9 / 2**30


def test_a_recipe_without_shape_requires_a_local_model(tmp_path: Path) -> None:
    from lceval.training.dry_run import estimate

    recipe = parse({"output": "unused", "model": {"pretrained": str(tmp_path)}}, "test")
    with pytest.raises(UserError, match=r"model\.shape"):
        estimate(recipe)


DOC = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def test_the_page_documents_every_recipe_and_section(capsys: pytest.CaptureFixture[str]) -> None:
    for name in config.shipped():
        assert f"`{name}`" in DOC
    for section, field in config.Config.model_fields.items():
        assert f"`{section}`" in DOC
        if section in ("lora", "optim", "compression_aware"):
            (model,) = (
                kind for kind in (field.annotation, *get_args(field.annotation)) if hasattr(kind, "model_fields")
            )
            assert all(f"`{key}" in DOC for key in model.model_fields), section
    assert invoke(["train", "paper_ao_sft", "--dry-run"]) == 0
    assert f"{float(capsys.readouterr().out.rpartition('about ')[2].split()[0])} GiB" in DOC


def test_the_recipes_and_overrides_of_the_page_are_valid() -> None:
    import re

    import yaml

    for block in re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL):
        parse({"output": "unused", **yaml.safe_load(block)}, "training.md")
    lines = [line.split()[2:] for line in re.findall(r"^lceval train [^e].*", DOC, re.MULTILINE)]
    assert lines
    for name, *options in lines:
        overrides = [value for option, value in pairwise(options) if option == "--set"]
        if name == "scorer":
            scorers.read(options[0], overrides)
        else:
            read(name, overrides)
    assert any("--set" in options for _, *options in lines)


def test_texts_are_split_into_sequences_and_invalid_files_are_errors(tmp_path: Path) -> None:
    from lceval.training.texts import Texts, sequences

    file = tmp_path / "pages.jsonl"
    file.write_text(
        '{"doc": "a", "text": "one two"}\n{"doc": "b", "text": "six"}\n{"doc": "a", "text": "three four"}\n'
    )

    def encode(text: str) -> list[int]:
        return [len(word) for word in text.split()]

    pairs = sequences(Texts(files=[file], group="doc", tokens=2), encode)
    assert sorted(pairs) == [(3, 3), (5, 4)]  # one two, three four; six is too short
    with pytest.raises(UserError, match="no document has 9 tokens"):
        sequences(Texts(files=[file], tokens=9), encode)
    with pytest.raises(UserError, match=r"pages.jsonl line 1 has no field"):
        sequences(Texts(files=[file], field="body", tokens=2), encode)
    with pytest.raises(UserError, match="cannot read"):
        sequences(Texts(files=[tmp_path / "none.txt"], tokens=2), encode)
