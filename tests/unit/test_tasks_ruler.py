"""RULER as kvpress runs it: rows, prompts, score and mean, on hand-made files in the layout of its data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks.ruler import common_utils

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, lm_eval_config, prompts
from lceval.tasks.icr import ruler

LIMITS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
MODES = tuple(catalogue.datasets()["ruler"].modes)


def record(task: str, number: int = 0) -> dict[str, Any]:
    return {
        "context": f"Memorize it.\nThe code of {task} is {number}11.\n",
        "question": "Question: What is the code? ",
        "answer_prefix": "Answer: the code is: ",
        "answer": [f"{number}11", "one"],
        "task": task,
        "max_new_tokens": LIMITS[task.split("_")[0]],
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "ruler").mkdir()
    return tmp_path


def write(folder: Path, records: list[dict[str, Any]], length: int = 4096) -> None:
    (folder / "ruler" / f"{length}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))


@pytest.mark.model
@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_is_that_of_kvpress(folder: Path, instances: Callable[..., Any], mode: str, smollm2: str) -> None:
    """The context alone in the user's turn; the question, the rest of the template and the answer prefix follow."""
    from transformers import AutoTokenizer

    write(folder, [record(mode, number) for number in range(2)] + [record("vt", 7)] * (mode != "vt"))
    mark = "#" * 99
    requests = instances(f"lc_ruler_{mode}_4k", 9)
    assert len(requests) == 2
    for number, request in enumerate(requests):
        row = record(mode, number)
        messages = [{"role": "user", "content": row["context"] + mark}]
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, after = rendered.split(mark)
        assert request.args[0] == before + row["question"] + after + row["answer_prefix"]
        assert request.args[0].index(row["question"]) == len(before)
        assert request.doc["context"] == row["context"]
        assert request.args[1]["max_gen_toks"] == row["max_new_tokens"]
        assert request.args[1]["until"] == []


def test_rows_come_from_the_hubs_files_where_there_is_a_copy(folder: Path, tmp_path: Path) -> None:
    write(folder, [record("vt", 1)])
    copy = folder / "hub" / "simonjegou" / "ruler" / "8192"
    copy.mkdir(parents=True)
    datasets.Dataset.from_list([record("vt", 2)]).to_parquet(copy / "test-00000-of-00001.parquet")
    (row,) = build.rows_of(catalogue.find("lc_ruler_vt_8k"), {"pretrained": words(tmp_path)})
    assert row["answers"] == ["211", "one"]
    assert prompts.prompt(row) == record("vt", 2)["context"] + record("vt", 2)["question"]


def words(folder: Path) -> str:
    from tiny_models import save_model

    return save_model(folder / "tiny")


def test_a_row_with_another_limit_is_refused(folder: Path, tmp_path: Path) -> None:
    write(folder, [{**record("vt"), "max_new_tokens": 64}])
    with pytest.raises(UserError, match="record 1: max_new_tokens=64, and lc_ruler_vt_4k generates 30"):
        build.rows_of(catalogue.find("lc_ruler_vt_4k"), {"pretrained": words(tmp_path)})


@given(st.lists(st.text("ab1\x01\n ", min_size=1), min_size=1, max_size=3), st.text("ab1B\x01\n "))
def test_the_score_is_that_of_lm_evals_ruler(references: list[str], output: str) -> None:
    doc = {"answers": references, "outputs": references, "max_length": 4096}
    assert ruler.all_results(doc, [output])["string_match"] == common_utils.process_results(doc, [output])["4096"]
    best = 0.0 if not any(ruler.string_match(output, references)) else 1.0
    assert ruler.best_results(doc, [output])["string_match"] == best


def test_the_best_reference_counts_for_questions() -> None:
    assert ruler.best_results({"answers": ["Paris", "Lutetia"]}, ["It is paris."]) == {"string_match": 1.0}
    assert ruler.all_results({"answers": ["Paris", "Lutetia"]}, ["It is paris."]) == {"string_match": 0.5}


def test_a_length_is_a_group_whose_score_is_the_mean_over_the_tasks() -> None:
    config = lm_eval_config.group_config("lc_ruler_8k")
    assert config["task"] == [f"lc_ruler_{mode}_8k" for mode in MODES]
    assert len(MODES) == 13
    assert config["aggregate_metric_list"] == [
        {"metric": "string_match", "aggregation": "mean", "weight_by_size": False}
    ]
