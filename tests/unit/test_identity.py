"""A result is reused only under the same identity."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lm_eval.config.evaluate_config import EvaluatorConfig

from lceval.records import identity


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


def test_a_folder_hash_depends_only_on_weights_and_configuration(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    before = identity.folder_hash(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert identity.folder_hash(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert identity.folder_hash(tmp_path) != before


def test_the_identity_of_a_config_round_trips_through_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = EvaluatorConfig(model="lcft", model_args={"pretrained": "x", "kv": "full"}, tasks=["lc_a"])
    one = identity.of(config, {"pretrained": str(tmp_path), "peft": "hub/name"})
    assert set(one["hashes"]) == {"pretrained"}
    assert one == identity.of(config, {"pretrained": str(tmp_path), "peft": "hub/name"})
    assert one["versions"]["lm-eval"].startswith("0.4")
