"""docs/studies/training.md says what the committed samples say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

STUDIES = Path(__file__).parents[2] / "docs" / "studies"


@pytest.fixture(scope="module")
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("training")


def test_the_tables_are_computed_from_the_samples(study: ModuleType) -> None:
    text = (STUDIES / "training.md").read_text()
    assert text.endswith(study.MARK + study.tables())


def test_every_arm_learned_the_same_data_by_the_recipe_of_the_script(study: ModuleType) -> None:
    records = {file.name: json.loads(file.read_text()) for file in (STUDIES / "training").glob("*-train.json")}
    assert records
    assert len({record["data"]["digest"] for record in records.values()}) == 1
    for name, record in records.items():
        arm, seed, _ = name.split("-")
        assert record["recipe"]["seed"] == int(seed)
        assert record["recipe"]["optim"]["max_steps"] == study.RECIPE["optim"]["max_steps"] == len(record["losses"])
        asked, learned = study.ARMS[arm].get("compression_aware"), record["recipe"]["compression_aware"]
        assert (learned is not None) == (asked is not None)
        assert asked is None or asked == {key: learned[key] for key in asked}
