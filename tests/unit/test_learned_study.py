"""docs/studies/learned-tables.md is computed from the committed scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "studies" / "learned-tables.md"


@pytest.fixture(scope="module")
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("learned")


def test_the_tables_are_computed_from_the_committed_scores(study: ModuleType) -> None:
    assert PAGE.read_text() == study.TITLE + study.tables()


def test_the_picture_is_drawn_from_the_committed_scores(study_of: Callable[[str], ModuleType]) -> None:
    picture = study_of("picture")
    assert picture.FILE.read_text() == picture.picture(picture.lines())


def test_every_interval_of_the_page_is_in_the_tables() -> None:
    intervals = re.findall(r"-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]", (PAGE.parent / "learned.md").read_text())
    assert len(intervals) == 38  # five methods, six cells; four recipes, two models
    assert all(interval in PAGE.read_text() for interval in intervals)


def test_all_recipes_answered_the_same_questions(study: ModuleType) -> None:
    for model in study.MODELS:
        for task in study.TASKS:
            scores, none = study.samples(f"nll-{model}", task), study.samples(f"none-{model}", task)
            assert set(scores) == {"full", *study.LEARNED, *study.OTHERS}
            assert {frozenset(rows) for rows in scores.values()} == {frozenset(none["full"])}
    assert len(study.samples("nll-base", "lc_squad_ao_1k")["full"]) == 320


def test_scorers_were_fitted_chosen_and_reported_on_separate_contexts(study: ModuleType) -> None:
    for scorer in study.SCORERS:
        record = json.loads((study.SAMPLES / f"{scorer}-scorer.json").read_text())
        assert record["recipe"]["data"]["split"] == "train"
    for model in study.MODELS:
        chosen_on = {row["cluster"] for row in study.samples(f"choice-{model}-kvzip", study.CHOICE)["full"].values()}
        reported = {row["cluster"] for row in study.reported(f"nll-{model}", study.CHOICE)["full"].values()}
        assert len(chosen_on) == study.CHOSEN_ON
        assert len(reported) == 12 - study.CHOSEN_ON
        assert not chosen_on & reported
