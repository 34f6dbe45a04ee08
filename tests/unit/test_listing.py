"""`lceval tasks` and `lceval data list`: names, properties and available data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.data import listing
from lceval.tasks import catalogue


def put(root: Path, *names: str) -> None:
    """Create files in a data folder; only their existence is checked."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder."""
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    return tmp_path


def output(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert invoke(argv) == 0
    return capsys.readouterr().out


def test_json_has_every_task_of_the_catalogue_once(capsys: pytest.CaptureFixture[str]) -> None:
    records = json.loads(output(["tasks", "--json"], capsys))
    assert [record["task"] for record in records] == list(catalogue.tasks())
    for record in records:
        task = catalogue.tasks()[record["task"]]
        assert (record["mode"], record["length_k"]) == (task.mode, task.length_k)
        assert record["contexts"] == list(task.dataset.contexts)
        assert record["retrievers"] == list(task.dataset.retrievers)
        assert (record["rows"], record["licence"]) == (task.dataset.count, task.dataset.licence)
        assert record["comparable"] == task.dataset.comparable


def test_groups_are_listed_with_their_members(capsys: pytest.CaptureFixture[str]) -> None:
    records = json.loads(output(["tasks", "--groups", "--json"], capsys))
    assert {record["group"]: record["members"] for record in records} == catalogue.groups()
    (line,) = [line for line in output(["tasks", "--groups"], capsys).splitlines() if line.startswith("lc_filings_ao ")]
    assert line.split() == ["lc_filings_ao", "lc_filings_ao_1k", "lc_filings_ao_2k"]


@pytest.mark.parametrize("pattern", ["iris", "lc_iris_*", "*_iris_ao_?k"])
def test_a_pattern_lists_names(pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    heading, *lines = output(["tasks", pattern], capsys).splitlines()
    assert heading.startswith("TASK ")
    assert [line.split()[:3] for line in lines] == [
        [f"lc_iris_ao_{k}k", "full,none", "knn,random"] for k in catalogue.datasets()["iris"].lengths
    ]


def test_the_overview_has_one_line_per_dataset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heading, *lines = output(["tasks"], capsys).split("\n\n")[0].splitlines()
    assert heading.split()[:5] == ["SUITE", "DATASET", "MODE", "LENGTH", "CONTEXT"]
    assert [line.split()[1] for line in lines] == list(catalogue.datasets())
    (filings,) = [line for line in lines if " filings " in line]
    dataset = catalogue.datasets()["filings"]
    assert filings.split()[2:6] == [",".join(dataset.modes), "1,2k", ",".join(dataset.contexts), dataset.count]
    (quality,) = [line for line in lines if " quality " in line]
    assert quality.split()[3] == "-"
    assert "  no  " in quality


def test_a_pattern_that_matches_nothing_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["tasks", "lc_filngs_ao_2k"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no task matches 'lc_filngs_ao_2k'; did you mean lc_filings_ao_2k" in captured.err
    with pytest.raises(UserError, match="no group matches"):
        listing.groups("lc_nothing_*")


# Available data ------------------------------------------------------------------------------------------


def is_available(task: str) -> bool:
    (record,) = [record for record in listing.tasks(task) if record["task"] == task]
    return bool(record["at_hand"])


def test_a_task_is_available_once_all_its_files_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_available("lc_quality_mc")
    put(folder, "quality/stories.jsonl")
    assert not is_available("lc_quality_mc")
    put(folder, "quality/questions.jsonl")
    assert is_available("lc_quality_mc")
    monkeypatch.delenv("LCEVAL_DATA")
    assert not is_available("lc_quality_mc")


@pytest.mark.parametrize("task", ["lc_filings_ao_2k", "lc_iris_ao_2k"])
def test_shipped_datasets_are_always_available(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LCEVAL_DATA", raising=False)
    assert is_available(task)
    assert [record["source"] for record in listing.tasks(task)] == ["shipped"]


def dataset_of(**fields: Any) -> catalogue.Dataset:
    defaults = {"dataset": "d", "suite": "icr", "about": "", "rows": "", "version": 1, "layout": "text", "modes": {}}
    return catalogue.Dataset(**defaults | fields)


HUB = catalogue.Hub("owner/set", "0" * 40, {"test": "data/test-*.parquet", "extra": "extra.jsonl"})


def test_a_copy_of_a_hub_repository_counts_once_every_pattern_has_a_file(tmp_path: Path) -> None:
    dataset = dataset_of(hub=HUB)
    every = ["hub/owner/set/data/test-*.parquet", "hub/owner/set/extra.jsonl"]
    assert listing.missing(dataset, None) == listing.missing(dataset, tmp_path) == every
    put(tmp_path, "hub/owner/set/data/test-00000-of-00002.parquet")
    assert listing.missing(dataset, tmp_path) == every[1:]
    put(tmp_path, "hub/owner/set/extra.jsonl")
    assert listing.missing(dataset, tmp_path) == []


def test_local_files_or_a_hub_repository_suffice(tmp_path: Path) -> None:
    dataset = dataset_of(files=("set/q.jsonl", "set/p.jsonl"), hub=HUB)
    put(tmp_path, "set/q.jsonl")
    assert listing.missing(dataset, tmp_path)
    put(tmp_path, "set/p.jsonl")
    assert listing.missing(dataset, tmp_path) == []


def test_the_data_list_names_missing_files_and_remedies(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = {record["dataset"]: record for record in json.loads(output(["data", "list", "--json"], capsys))}
    assert records.keys() == catalogue.datasets().keys()
    assert records["quality"]["missing"] == ["quality/stories.jsonl", "quality/questions.jsonl"]
    assert records["filings"]["at_hand"]
    text = output(["data", "list"], capsys)
    assert "provide quality/stories.jsonl, quality/questions.jsonl" in text
    assert text.endswith(f"LCEVAL_DATA={folder}\n")
    for name, record in records.items():
        if record["fetch"]:
            assert f"lceval data fetch {name}" in text


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lceval.cli import invoke; invoke(['tasks']); invoke(['data', 'list'])\n"
        "heavy = ('torch', 'transformers', 'lm_eval', 'numpy', 'datasets', 'sklearn', 'huggingface_hub')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stderr.strip() == "[]"
