"""docs/training-data.md: its commands run, its numbers are those of the local pools."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lceval.cli import invoke
from lceval.tasks import build, catalogue
from lceval.tasks.icr.splits import sides
from lceval.training import data, formats

TEXT = (Path(__file__).parents[2] / "docs" / "training-data.md").read_text()
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path_factory.getbasetemp() / "splits-cache"))


@pytest.mark.parametrize("words", [c for c in COMMANDS if c[0] == "lceval"], ids=lambda words: words[3])
def test_every_command_writes_its_file(
    words: list[str], smollm2: str, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke([*words[1:], "--tokenizer", smollm2]) == 0
    assert data.read(tmp_path / words[3])[1]


def test_the_evaluation_uses_the_test_split(smollm2: str, data_folder: Path) -> None:
    (words,) = (command for command in COMMANDS if command[0] == "lm_eval")
    key, value = words[words.index("--metadata") + 1].split("=")
    task = catalogue.find(words[words.index("--tasks") + 1])
    rows = build.rows_of(task, {"pretrained": smollm2, key: value})
    assert {row["context_setting"] for row in rows} == {"full:split=test"}


def test_the_table_of_splits_counts_the_local_pools(data_folder: Path) -> None:
    for name in ("squad", "nqopen", "hotpotpool", "musique"):
        questions, *pools = (
            [json.loads(line) for line in (data_folder / file).read_text(encoding="utf-8").splitlines()]
            for file in catalogue.datasets()[name].files
        )
        side = sides([passage for pool in pools for passage in pool], questions)
        question_sides: list[Any] = [side[question["gold_pids"][0]] for question in questions]
        counts = [f"{s.count('train'):,} / {s.count('test'):,}" for s in (question_sides, [*side.values()])]
        assert f"| `{name}` | {counts[0]} | {counts[1]} |" in TEXT


def test_every_trainable_mode_of_a_pool_is_documented() -> None:
    for output_format in formats.CITED_FORMATS:
        assert f"`{output_format}`" in TEXT
