"""`lceval train eval`: base against adapter on the same questions, one table, and it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lceval.cli import invoke

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two steps on the shipped filings leave."""
    folder = tmp_path_factory.mktemp("eval")
    recipe = folder / "two.yaml"
    said: dict[str, Any] = {
        "output": str(folder / "two"),
        "data": {"datasets": ["filings"], "split": "all", "limit": 5},
        "optim": {"steps": 2, "contexts": 1, "lr": 1e-3},
    }
    recipe.write_text(json.dumps(said))
    assert invoke(["train", str(recipe)]) == 0
    return folder / "two"


def test_base_and_adapter_answer_the_same_questions(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "eval", str(adapter), "--kv", "full", "--kv", "snapkv:0.25", "--limit", "2", "--json"]
    assert invoke(line) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["recipe"] for row in rows] == ["full", "snapkv:0.25"] * 2
    assert {row["context"].partition(":")[0] for row in rows} == {"full", "rag"}
    for row in rows:
        assert row["n"] == 2
        # The adapter has learned these very questions: it predicts their answers better.
        delta = row["tuned_gold_nll"]["value"] - row["base_gold_nll"]["value"]
        assert delta == pytest.approx(row["gold_nll_difference"]["value"])
        assert delta < 0
    runs = sorted(adapter.glob("eval/*/run.json"))
    assert len(runs) == 8
    before = [run.stat().st_mtime_ns for run in runs]
    assert invoke(line) == 0
    assert json.loads(capsys.readouterr().out) == rows
    assert [run.stat().st_mtime_ns for run in runs] == before
    assert invoke([*line[:-1]]) == 0
    assert capsys.readouterr().out.startswith("| task | context | recipe | n | base | tuned |")


def test_what_is_no_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["train", "eval", str(tmp_path)]) == 2
    assert "no training run" in capsys.readouterr().err
    (tmp_path / "train.json").write_text('{"status": "running"}')
    assert invoke(["train", "eval", str(tmp_path)]) == 2
    assert "is not finished" in capsys.readouterr().err
