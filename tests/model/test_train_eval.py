"""`lceval train eval`: base and adapter answer the same questions, and a second call reuses the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lceval.cli import invoke

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.model, pytest.mark.slow]


COMMANDS = [
    line.split()[1:]
    for block in re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("lceval ")
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """The output folder of those of the documented commands that train and evaluate an adapter.

    The others, dry runs that build the rows of every pool, are run by tests/commands.py.
    """
    folder = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (command for command in COMMANDS if "runs/two" in command):
            assert invoke(command) == 0, command
    return folder / "runs" / "two"


def test_base_and_adapter_answer_the_same_questions(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["train", "eval", "runs/two", "--kv", "full", "--kv", "snapkv:0.25", "--limit", "1", "--json"]
    monkeypatch.chdir(adapter.parent.parent)
    capsys.readouterr()
    assert invoke(line) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["recipe"] for row in rows] == ["full", "snapkv:0.25"] * 2
    assert {row["context"].partition(":")[0] for row in rows} == {"full", "rag"}
    for row in rows:
        assert row["n"] == 1
        delta = row["tuned_gold_nll"]["value"] - row["base_gold_nll"]["value"]
        assert delta == pytest.approx(row["gold_nll_difference"]["value"])
        assert delta != 0
    runs = sorted(adapter.glob("eval/*/run.json"))
    assert len(runs) == 8
    before = [run.stat().st_mtime_ns for run in runs]
    assert invoke(line) == 0
    assert json.loads(capsys.readouterr().out) == rows
    assert [run.stat().st_mtime_ns for run in runs] == before
    assert invoke([*line[:-1]]) == 0
    assert capsys.readouterr().out.startswith("| task | context | recipe | n | base | tuned |")


def test_an_unfinished_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["train", "eval", str(tmp_path)]) == 2
    assert "is not a training run" in capsys.readouterr().err
    (tmp_path / "train.json").write_text('{"status": "running"}')
    assert invoke(["train", "eval", str(tmp_path)]) == 2
    assert "is not finished" in capsys.readouterr().err
