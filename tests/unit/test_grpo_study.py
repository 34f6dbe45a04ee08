"""docs/studies/grpo-tables.md is computed from the committed scores, which contain no text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("grpo")


def test_the_tables_are_computed_from_the_committed_scores(study: ModuleType) -> None:
    page = (ROOT / "docs" / "studies" / "grpo-tables.md").read_text()
    assert page.endswith(study.MARK + study.tables())
    assert study.table() in page
    assert study.training_table() in page


def test_the_committed_files_contain_only_ids_and_numbers(study: ModuleType) -> None:
    for file in study.SCORES.glob("*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            assert all(isinstance(value, float | int) for key, value in line.items() if key not in ("id", "gold"))


def test_every_held_out_question_is_scored_at_every_evaluated_step(study: ModuleType) -> None:
    scores = study.read("held_out")
    question_ids = {row["id"] for row in scores}
    for step in {row["step"] for row in scores}:
        assert sorted(row["id"] for row in scores if row["step"] == step) == sorted(question_ids)


@pytest.mark.slow
def test_no_gold_passage_is_both_trained_on_and_held_out(study: ModuleType, smollm2: str, data_folder: Path) -> None:
    train, held_out = study.rows()
    assert not {row["gold_pids"][0] for row in train} & {row["gold_pids"][0] for row in held_out}
    assert {line["id"] for line in study.read("held_out")} <= {row["id"] for row in held_out}
    assert all(len(row["docs"]) == 2 and row["gold_pids"][0] in {d["pid"] for d in row["docs"]} for row in train)
