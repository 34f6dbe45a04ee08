"""What a run leaves in its folder, whatever an earlier start left there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lceval.core.errors import InfrastructureError
from lceval.records.results import read_folder
from lceval.runs import folder

CONFIG = SimpleNamespace(
    model="lcft",
    model_args={"kv": "full"},
    system_instruction=None,
    apply_chat_template=False,
    fewshot_as_multiturn=False,
)


def results(score: float) -> dict[str, object]:
    sample = {
        "doc_id": 0, "doc": {}, "target": "x", "arguments": [], "resps": [["x"]], "filtered_resps": ["x"],
        "filter": "none", "metrics": ["acc"], "doc_hash": "", "prompt_hash": "", "target_hash": "", "acc": score,
    }  # fmt: skip
    return {
        "results": {"qa": {"acc,none": score}},
        "configs": {"qa": {"task": "qa"}},
        "config": {"model": "lcft"},
        "n-samples": {"qa": {"effective": 1}},
        "samples": {"qa": [sample]},
        "versions": {"qa": 1},
    }


def test_what_a_killed_start_was_writing_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".run.json.17.part").write_text("{")
    (tmp_path / ".saving-17").mkdir()
    (tmp_path / ".saving-17" / "results_1.json").write_text("{")
    with folder._locked(tmp_path):
        folder._remove_partial(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_results_replace_those_of_a_killed_finish_even_if_the_clock_went_back(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", "tasks": ["qa"], "model": "lcft"}))
    (tmp_path / "results_2999-01-01T00-00-00.000000.json").write_text("{}")
    folder._save(CONFIG, tmp_path, None, results(0.5))
    folder._save(CONFIG, tmp_path, None, results(1.0))
    (run,) = read_folder(tmp_path)
    assert [[sample.score for sample in task.samples] for task in run.tasks] == [[1.0]]
    assert len(list(tmp_path.glob("results_*.json"))) == len(list(tmp_path.glob("samples_*.jsonl"))) == 1


def test_results_that_lm_eval_could_not_write_are_an_error_and_leave_the_old_ones(tmp_path: Path) -> None:
    """lm-eval logs such an error, and goes on."""
    folder._save(CONFIG, tmp_path, None, results(0.5))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    broken = results(1.0)
    broken["samples"] = {"qa": [object()]}
    with pytest.raises(InfrastructureError, match="did not write its results"):
        folder._save(CONFIG, tmp_path, None, broken)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
