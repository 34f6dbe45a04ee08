"""The pages of learned eviction, and the first table of the README, are computed from the committed scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "studies"


@pytest.fixture(scope="module")
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("learned")


@pytest.mark.parametrize("name", ["learned", "joint"])
def test_the_tables_are_computed_from_the_committed_scores(name: str, study_of: Callable[[str], ModuleType]) -> None:
    study = study_of(name)
    assert study.TABLES.read_text() == study.TITLE + study.tables()


def test_the_picture_is_drawn_from_the_committed_scores(study_of: Callable[[str], ModuleType]) -> None:
    picture = study_of("picture")
    assert picture.FILE.read_text() == picture.picture(picture.lines())
    assert picture.README.read_text() == picture.with_result(picture.README.read_text())
    assert all(len(points) == len(picture.BUDGETS) for _, _, points in picture.lines())


@pytest.mark.parametrize(("page", "tables", "count"), [("learned", "learned", 38), ("learned-eviction", "joint", 32)])
def test_every_interval_of_a_page_is_in_the_tables(page: str, tables: str, count: int) -> None:
    """Signs are left out: what is added has one in the tables."""
    pages = [(PAGES / f"{name}.md").read_text().replace("+", "") for name in (page, f"{tables}-tables")]
    estimates = re.findall(r"(-?[\d.]+)%?(?: nats)?\s(\[-?[\d.]+, -?[\d.]+\])", pages[0])
    assert len(estimates) == count
    assert not [estimate for estimate in map(" ".join, estimates) if estimate not in pages[1]]


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


def test_every_arm_of_joint_training_answered_the_same_questions(study_of: Callable[[str], ModuleType]) -> None:
    joint = study_of("joint")
    task, kv = joint.PRIMARY
    arms = [joint.values(arm, scorer, task, kv) for arm, scorer, count in joint.measured() if count == len(joint.SEEDS)]
    assert len(arms) == 3
    assert {frozenset(rows) for rows in arms} == {frozenset(arms[0])}
    assert len(arms[0]) == 320
    chosen_on = joint.values("ao", "start", joint.CHOICE, kv, chosen_on=True)
    assert not {c for c, _ in chosen_on.values()} & {
        c for c, _ in joint.values("ao", "start", joint.CHOICE, kv).values()
    }
