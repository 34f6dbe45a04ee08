"""A result is reused only under the same identity."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from lm_eval.config.evaluate_config import EvaluatorConfig

from lceval.core.digests import content_hash
from lceval.models import scorer
from lceval.records import identity
from lceval.runs import inputs


def test_every_field_of_a_run_is_classified_once() -> None:
    fields = {f.name for f in dataclasses.fields(EvaluatorConfig)}
    assert fields == {*identity.CHANGES_OUTPUTS, *identity.DOES_NOT}
    assert not {*identity.CHANGES_OUTPUTS} & {*identity.DOES_NOT}


def test_differences_name_the_field_and_both_values() -> None:
    old = {"limit": 8, "model_args": {"kv": "full", "pretrained": "m"}}
    new = {"limit": 8, "model_args": {"kv": "snapkv:0.5", "pretrained": "m"}}
    assert identity.differences(old, new) == ["model_args.kv: 'full' -> 'snapkv:0.5'"]
    assert identity.differences(old, old) == []
    assert identity.fingerprint(old) != identity.fingerprint(new)


CHANGES = [
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "merges.txt", "vocab.txt",
    "tokenizer.model", "chat_template.jinja", "modeling_own.py", "2_Dense/model.safetensors", "additional/vocab.json",
]  # fmt: skip
DOES_NOT = [
    "README.md", ".cache/lock", "LICENSE", "optimizer.pt", "rng_state_0.pth", "trainer_state.json",
    "training_args.bin", "checkpoint-8/model.safetensors", "checkpoints/adapter_model.safetensors", "eval/sweep.json",
    "base/run.json",
]  # fmt: skip


@pytest.mark.parametrize("name", CHANGES + DOES_NOT)
def test_every_file_that_changes_outputs_changes_the_hash_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / name
    hashes = [content_hash(tmp_path)]
    for text in ("a", "b"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        hashes.append(content_hash(tmp_path))
    assert len(set(hashes)) == (3 if name in CHANGES else 1)


def config_of(**fields: Any) -> EvaluatorConfig:
    return EvaluatorConfig(**{"model": "lcft", "tasks": ["lc_filings_ao_1k"], "model_args": {"kv": "full"}, **fields})


@pytest.mark.parametrize("key", ["pretrained", "peft", "tokenizer", "delta", "scorer"])
def test_whatever_a_model_argument_loads_is_in_the_identity(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = config_of(model_args={key: str(tmp_path), "kv": "full"})
    before = identity.of(config, inputs.digests(config))
    assert before == identity.of(config, inputs.digests(config))
    (tmp_path / "weights.bin").write_bytes(b"other")
    (change,) = identity.differences(before, identity.of(config, inputs.digests(config)))
    assert change.startswith(f"hashes.{key}: ")


def test_the_default_scorer_is_in_the_identity_of_the_recipes_that_require_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "default", lambda _: str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    learned, other = (config_of(model_args={"kv": kv}) for kv in ("kvzap:0.5", "snapkv:0.5"))
    before = inputs.digests(learned)["scorer"]
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert inputs.digests(learned)["scorer"] != before
    assert "scorer" not in inputs.digests(other)


def test_a_run_that_ran_out_of_memory_resumes_with_a_smaller_cache() -> None:
    one, other, third = (
        identity.of(config_of(model_args={"kv": "full", **arguments}), {})
        for arguments in ({}, {"prefix_cache_gib": 0.5}, {"prefill_chunk": 512})
    )
    assert one == other != third


def test_task_files_and_benchmark_data_are_in_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    data = tmp_path / "nq_open" / "questions.jsonl"
    data.parent.mkdir()
    data.write_text("{}")
    (tmp_path / "mine.yaml").write_text("task: mine")
    config = config_of(tasks=["lc_nqopen*"], include_path=str(tmp_path))
    before = inputs.digests(config)
    assert set(before) == {"data/nq_open/questions.jsonl", "include_path/mine.yaml"}
    data.write_text("[]")
    (tmp_path / "mine.yaml").write_text("task: other")
    after = inputs.digests(config)
    assert all(after[name] != before[name] for name in before)


def test_the_commit_of_a_hub_model_is_in_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later commit under the same name is another model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = config_of(model_args={"pretrained": "some/model"})
    assert inputs.digests(config) == {}
    for commit in ("a" * 40, "b" * 40):
        snapshot = tmp_path / "models--some--model" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (tmp_path / "models--some--model" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--some--model" / "refs" / "main").write_text(commit)
        assert inputs.digests(config) == {"pretrained": commit}
