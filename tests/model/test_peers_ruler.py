"""Answers to RULER rows against those of kvpress's pipeline; tests/peers/ruler.py compares all of them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lceval.models.lcft import LCFT

sys.path.insert(0, str(Path(__file__).parent.parent / "peers"))
import ruler

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not Path(os.environ.get("LCEVAL_DATA", "."), "ruler", "4096.jsonl").is_file(), reason="no rows"),
]
FIXTURE = json.loads(ruler.FIXTURE.read_text())["sides"]
# Short answers, and recipes that share a prefill.
TASK, SIDES = "lc_ruler_vt_4k", ["full", "snapkv", "streaming", "pyramidkv", "adakv of expected_attention"]


@pytest.fixture(scope="module")
def answers(lcft_model: Any, smollm2: str) -> dict[str, dict[str, str]]:
    """By side and row."""
    before = lcft_model.config._attn_implementation
    model = LCFT(lcft_model, tokenizer=smollm2)
    (request, *_) = ruler.requests(model, TASK)
    with model.sharing_prefills([ruler.RECIPES[side] for side in SIDES]):
        by_side = {side: {request.doc["id"]: ruler.answered(model, side, request)["answer"]} for side in SIDES}
    lcft_model.set_attn_implementation(before)
    return by_side


@pytest.mark.parametrize("side", SIDES)
def test_the_answer_is_that_of_kvpress(answers: dict[str, dict[str, str]], side: str) -> None:
    assert len(answers[side]) == 1
    for name, text in answers[side].items():
        assert text.strip() == FIXTURE[side]["answers"][name].strip()


def test_the_fixture_has_two_rows_of_each_task_and_their_scores() -> None:
    for side in ruler.RECIPES:
        names = [name.rpartition("-")[0] for name in FIXTURE[side]["answers"]]
        assert len({*names}) == 13
        assert all(names.count(name) == 2 for name in names)
        assert FIXTURE[side]["scores"].keys() == FIXTURE[side]["answers"].keys()
