"""`lceval score`: scores by rows and by ground truth, and invalid input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lceval.analysis.predictions import render, score
from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, tokens

MC = "lc_infinitebench_mc"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("LCEVAL_CACHE", str(folder / "score-cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "score-arrow"))


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LCEVAL_DATA", raising=False)


def written(folder: Path, *records: Any, name: str = "predictions.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(f"{of if isinstance(of, str) else json.dumps(of)}\n" for of in records))
    return file


def prediction_line(id_: Any, prediction: Any, *truth: Any) -> dict[str, Any]:
    return {"id": id_, "prediction": prediction, **({"ground_truth": truth[0]} if truth else {})}


def stories(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder with two stories in SQuALITY's schema, two questions each."""
    (folder / "squality").mkdir()
    records = [
        {
            "metadata": {"passage_id": f"s{n}"},
            "document": f"The ship {n} sank.",
            "questions": [
                {
                    "question_text": f"What happened to ship {n}?",
                    "question_number": k,
                    "responses": [{"response_text": f"ship {n} sank"}, {"response_text": f"it went down {k}"}],
                }
                for k in (1, 2)
            ],
        }
        for n in (1, 2)
    ]
    written(folder / "squality", *records, name="squality_v1-3_dev.jsonl")
    monkeypatch.setenv("LCEVAL_DATA", str(folder))


# The published outputs


QA = "lc_infinitebench_qa_ao"


@pytest.mark.parametrize(
    ("task", "system", "expected"),
    [
        # acc_last_letter: by the repository's later scorer
        (MC, "gpt4", {"acc": 67.25, "acc_last_letter": 68.12}),
        (MC, "kimi", {"acc": 72.49, "acc_last_letter": 73.36}),
        (MC, "claude2", {"acc": 62.88}),
        (MC, "yarn-mistral", {"acc": 27.95}),
        (MC, "yi-6b", {"acc": 36.68}),
        (MC, "yi-34b", {"acc": 38.43}),
        (MC, "chatglm3", {"acc": 10.48}),
        (QA, "gpt4", {"f1": 22.44}),
        (QA, "kimi", {"f1": 16.52}),
        (QA, "yarn-mistral", {"f1": 9.55}),
    ],
)
def test_published_scores_are_reproduced_without_a_data_folder(
    task: str,
    system: str,
    expected: dict[str, float],
    data_folder: Path,
    no_data: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    split, n = {MC: ("longbook_choice_eng", 229), QA: ("longbook_qa_eng", 351)}[task]
    path = next((data_folder / "infinitebench_predictions").glob(f"{system}*__{split}.jsonl"), None)
    if path is None:
        pytest.skip(f"LCEVAL_DATA has no {split} predictions of {system}")
    assert invoke(["score", task, str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["task"], report["n"], report["missing"], report["matched_by"]) == (task, n, 0, "ground_truth")
    for name, percent in expected.items():
        assert round(100 * report["scores"][name], 2) == percent
        low, high = report["intervals"][name]
        assert low < report["scores"][name] < high


def test_loft_predictions_against_their_queries(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions, queries = (str(data_folder / f"loft/example_rag_quest_{kind}.jsonl") for kind in ("preds", "queries"))
    assert invoke(["score", "loft_rag_multi", predictions, "--gold", queries, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n"], report["missing"], report["matched_by"]) == (10, 0, "gold")
    assert report["scores"] == pytest.approx({"subspan_em": 0.1, "em": 0.1, "coverage": 0.1})


# By ground truth


def test_ground_truth_is_a_string_or_a_list_and_an_empty_prediction_is_wrong(tmp_path: Path, no_data: None) -> None:
    records = [
        prediction_line(0, "B", "B"),
        prediction_line("x", "C. Hall", ["Hall", "C"]),
        prediction_line(2, "", ["A"]),
        prediction_line(3, "Not A but D", ["the fourth", "D"]),
    ]
    report = score(MC, written(tmp_path, *records))
    assert report["scores"] == {"acc": 0.5, "acc_last_letter": 0.75, "parse_rate": 0.75}
    assert (report["n"], report["missing"], report["headline"], report["clusters"]) == (4, 0, "acc", 4)


def test_longbench_v2_is_scored_by_its_own_rule(tmp_path: Path, no_data: None) -> None:
    records = [
        prediction_line(0, "The correct answer is (B)", "B"),
        prediction_line(1, "B", "B"),
        prediction_line(2, "The correct answer is C", ["D"]),
    ]
    assert score("lc_lbv2_mc", written(tmp_path, *records))["scores"] == pytest.approx(
        {"acc": 1 / 3, "parse_rate": 2 / 3}
    )


def test_a_task_with_a_length_requires_no_tokenizer_with_ground_truth(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        prediction_line("a", "Answer: Rome", ["Rome"]),
        prediction_line("b", "It is Rome, or Paris", ["Paris"]),
    )
    report = score("lc_filings_ao_2k", file)
    assert report["matched_by"] == "ground_truth"
    assert report["scores"]["subem"] == 1
    assert report["scores"]["parse_rate"] == 0.5


def test_a_metric_that_applies_to_no_prediction_is_null(tmp_path: Path, no_data: None) -> None:
    report = score(
        "lc_financebench_ao", written(tmp_path, prediction_line("a", "Answer: It rose.", ["because it rose"]))
    )
    assert report["scores"]["number"] is None
    assert report["intervals"]["number"] is None
    assert "n/a" in render(report)


# By rows


def test_rows_are_matched_by_id_and_a_missing_prediction_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories(tmp_path, monkeypatch)
    # in another order, with wrong ground truths, which the rows override
    file = written(
        tmp_path,
        prediction_line("s2-1", "ship 2 sank", "no"),
        prediction_line("s1-2", "ship 1 sank", "no"),
        prediction_line("s1-1", "", "no"),
    )
    report = score("lc_squality_sum", file)
    assert (report["n"], report["missing"], report["missing_ids"]) == (4, 1, ["s2-2"])
    assert (report["matched_by"], report["clusters"]) == ("rows", 2)
    assert report["scores"] == dict.fromkeys(["rougeLsum", "rougeL", "rouge1", "rouge2"], 0.5)
    assert "4 samples matched by rows, 1 of them missing and scored as empty" in render(report)
    assert score("lc_squality_sum", file, by="ground_truth")["scores"]["rouge1"] == 0


def test_rows_of_a_task_with_a_length_are_built_with_the_named_tokenizer(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = str(tmp_path / "words")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>").save_pretrained(folder)
    rows = build.rows_of(catalogue.find("lc_filings_ao_2k"), {"pretrained": folder})
    file = written(
        tmp_path, *(prediction_line(row["id"], f"Answer: {row['answers'][0]}", "not looked at") for row in rows)
    )
    report = score("lc_filings_ao_2k", file, metadata={"pretrained": folder})
    assert (report["n"], report["missing"], report["matched_by"]) == (len(rows), 0, "rows")
    assert report["clusters"] == len({row["cluster"] for row in rows})
    assert report["scores"]["subem"] == report["scores"]["parse_rate"] == 1
    # the packaged model's alias is registered, as in lm_eval
    assert "smollm2-135m" in tokens.ALIASES


def test_infinitebench_rows_have_the_ids_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub/xinrongzhang2022/InfiniteBench"
    folder.mkdir(parents=True)
    options = ["he", "she", "it", "they"]
    record = {"context": "A book.", "input": "Who?", "answer": ["it"], "options": options}
    for name in ("longbook_choice_eng", "longbook_qa_eng", "longbook_sum_eng"):
        written(folder, {"id": 0, **record}, {"id": 12, **record}, name=f"{name}.jsonl")
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    report = score(MC, written(tmp_path, prediction_line(12, "C"), prediction_line(0, "D")))
    assert (report["matched_by"], report["clusters"], report["scores"]["acc"]) == ("rows", 1, 0.5)


# Invalid input


GOOD = prediction_line(0, "A", "A")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{"], "line 2 is not a JSON object"),
        ([GOOD, "", "[1]"], "line 3 is not a JSON object (another type): expected one per line"),
        ([], "is empty"),
        (["", " "], "is empty"),
        ([GOOD, {"prediction": "A"}], "line 2: invalid id=None: expected a string or an integer"),
        ([GOOD, prediction_line(True, "A", "A")], "line 2: invalid id=True"),
        ([GOOD, prediction_line("", "A", "A")], "line 2: invalid id=''"),
        ([GOOD, {"id": 1}], "line 2: invalid prediction=None: expected a string"),
        ([GOOD, prediction_line(1, ["A"], "A")], "line 2: invalid prediction=['A']"),
        ([GOOD, prediction_line(0, "B", "B")], "line 2: duplicate id=0"),
        ([GOOD, prediction_line("0", "B", "B")], "line 2: duplicate id='0'"),
        (
            [GOOD, prediction_line(1, "A", [])],
            "line 2: invalid ground_truth=[]: expected a string or a list of strings",
        ),
        ([GOOD, prediction_line(1, "A", [1])], "line 2: invalid ground_truth=[1]"),
        ([GOOD, prediction_line(1, "A", ["Hall"])], "id='1': no letter in ground_truth ['Hall']"),
    ],
)
def test_an_invalid_line_is_a_one_line_error_with_its_location_and_exit_2(
    lines: list[Any], message: str, tmp_path: Path, no_data: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["score", MC, str(written(tmp_path, *lines)), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lc_infinitebench_mcc", "FILE"], "unknown task 'lc_infinitebench_mcc'; did you mean lc_infinitebench_mc"),
        (["lc_quality_mc", "FILE"], "lc_quality_mc is scored by log-likelihood: it has no text outputs to score"),
        ([MC, "nowhere.jsonl"], "cannot read nowhere.jsonl: No such file or directory"),
        ([MC, "FILE", "--by", "ids"], "--by 'ids': expected one of rows, ground_truth"),
        ([MC, "FILE", "--gold", "FILE"], "--gold is only for LOFT's files"),
        (["loft_rag", "FILE"], "pass it as --gold"),
        (["lc_filings_id_1k", "FILE"], "lc_filings_id_1k requires more fields of a row than its answers ('docs')"),
        ([MC, "FILE", "--metadata", "context"], "--metadata 'context': expected KEY=VALUE"),
    ],
)
def test_what_cannot_be_scored_is_a_one_line_error_and_exit_2(
    argv: list[str], message: str, tmp_path: Path, no_data: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(written(tmp_path, GOOD))
    assert invoke(["score", *(file if part == "FILE" else part for part in argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_ids_that_are_not_among_the_rows_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stories(tmp_path, monkeypatch)
    with pytest.raises(
        UserError, match=r"has 1 ids that are not among the 4 rows of lc_squality_sum, the first 's3-1'"
    ):
        score("lc_squality_sum", written(tmp_path, prediction_line("s1-1", "sank"), prediction_line("s3-1", "sank")))


def test_by_ground_truth_requires_it_in_every_prediction(tmp_path: Path, no_data: None) -> None:
    with pytest.raises(UserError, match=r"id='1': no ground_truth"):
        score(MC, written(tmp_path, GOOD, prediction_line(1, "A")), by="ground_truth")


@pytest.mark.parametrize(
    ("prediction", "query", "message"),
    [
        ({"qid": "q", "model_outputs": "Rome"}, {"qid": "q", "answers": ["Rome"]}, "model_outputs='Rome'"),
        ({"qid": "q", "model_outputs": []}, {"qid": "q", "answers": ["Rome"]}, "model_outputs=[]"),
        ({"qid": "q", "model_outputs": [["Rome"]]}, {"qid": "q", "answers": []}, "answers=[]: expected a non-empty"),
        ({"qid": "p", "model_outputs": [["Rome"]]}, {"qid": "q", "answers": ["Rome"]}, "unknown qid='p'"),
        ({"id": "q", "model_outputs": [["Rome"]]}, {"qid": "q", "answers": ["Rome"]}, "qid=None"),
        ({"qid": "q", "model_outputs": [["x"], ["y"]]}, {"qid": "q", "answers": ["x"]}, "2 turns of outputs and 1"),
    ],
)
def test_invalid_loft_files_raise(prediction: Any, query: Any, message: str, tmp_path: Path) -> None:
    gold = written(tmp_path, query, name="queries.jsonl")
    with pytest.raises(UserError) as caught:
        score("loft_rag", written(tmp_path, prediction), gold=gold)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loft_query_without_a_prediction_is_wrong_in_all_its_turns(tmp_path: Path) -> None:
    queries = [{"qid": "a", "answers": ["Rome"]}, {"qid": "b", "answers": [["Rome"], ["Paris"]]}]
    gold = written(tmp_path, *queries, name="queries.jsonl")
    report = score("loft_rag", written(tmp_path, {"qid": "a", "model_outputs": [["Rome"]]}), gold=gold)
    assert (report["n"], report["missing_ids"]) == (3, ["b"])
    assert report["scores"]["subspan_em"] == pytest.approx(1 / 3)


def test_scoring_loads_no_model_and_uses_no_network(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD, prediction_line(1, "B", "C"))
    code = (
        f"import sys; from lceval.cli import invoke; code = invoke(['score', {MC!r}, {str(file)!r}, '--json'])\n"
        "heavy = ('torch', 'transformers', 'lm_eval', 'datasets')\n"
        "print(code, [m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "LCEVAL_DATA"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert process.stderr.strip() == "0 []"
    assert json.loads(process.stdout)["scores"]["acc"] == 0.5
