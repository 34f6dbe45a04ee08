"""docs/studies/modes-tables.md is computed from the committed scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "studies" / "modes-tables.md"


@pytest.fixture(scope="module")
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("modes")


def test_the_table_is_computed_from_the_committed_scores(study: ModuleType) -> None:
    assert PAGE.read_text().endswith(study.MARK + study.table() + "\n")


def test_base_and_adapter_of_every_mode_answered_the_same_questions(study: ModuleType) -> None:
    for mode in study.MODES:
        base, tuned = study.read(mode, "base"), study.read(mode, "tuned")
        assert base.keys() == tuned.keys()
        assert len(base) == study.LIMIT


def test_every_mode_was_trained_with_the_recipe_of_the_script(study: ModuleType) -> None:
    for mode in study.MODES:
        record = json.loads((study.SAMPLES / f"{mode}-train.json").read_text())
        recipe = study.recipe(mode)
        assert record["recipe"]["data"]["modes"] == [mode]
        assert record["recipe"]["optim"]["max_steps"] == recipe["optim"]["max_steps"] == len(record["losses"])
