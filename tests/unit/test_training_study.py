"""docs/studies/training-tables.md is computed from the committed scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("training")


@pytest.mark.slow
def test_the_tables_are_computed_from_the_committed_scores(study: ModuleType) -> None:
    text = (ROOT / "docs" / "studies" / "training-tables.md").read_text()
    assert text.endswith(study.MARK + study.tables())


def test_every_arm_was_trained_on_the_same_data_with_the_recipe_of_the_script(study: ModuleType) -> None:
    records = {file.name: json.loads(file.read_text()) for file in (ROOT / "studies" / "training").glob("*-train.json")}
    assert records
    assert len({record["data"]["digest"] for record in records.values()}) == 1
    for name, record in records.items():
        arm, seed, _ = name.rsplit("-", 2)
        assert record["recipe"]["seed"] == int(seed)
        assert record["recipe"]["optim"]["max_steps"] == study.RECIPE["optim"]["max_steps"] == len(record["losses"])
        configured, recorded = study.ARMS[arm].get("compression_aware"), record["recipe"]["compression_aware"]
        assert (recorded is not None) == (configured is not None)
        assert configured is None or configured == {key: recorded[key] for key in configured}
