"""Judging runs: R+Judge, Loong, FinanceBench and letters, from a run's files to judge metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.judge import after_run
from lceval.judge.client import Client, Limits
from lceval.judge.protocol import TryAgainError
from lceval.judge.replies import Reply, Store, alone
from lceval.judge.rubrics import Case, Prompt, Rubric
from lceval.judge.scores import rubric_of
from lceval.records.results import read_folder
from lceval.tasks import catalogue, lm_eval_config
from lceval.tasks.build import rows_of
from lceval.tasks.finance.loong import compact
from lceval.tasks.scoring import gold_places

DATE = "2026-01-01T00-00-00"


def made_run(folder: Path, task: str, docs: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> Path:
    """The files of a finished evaluation, with every metric of the task as logged by lm-eval."""
    config = lm_eval_config.task_config(catalogue.find(task))
    folder.mkdir()
    results = {
        "configs": {task: {"metadata": config["metadata"]}},
        "n-samples": {task: {"effective": len(docs)}},
        "config": {"model": "hf"},
    }
    (folder / f"results_{DATE}.json").write_text(json.dumps(results))
    lines = []
    for number, (doc, text) in enumerate(zip(docs, answers, strict=True)):
        metrics = config["process_results"](doc, [text])
        lines.append({"doc_id": number, "doc": doc, "filtered_resps": [text], "filter": "none", **metrics})
    (folder / f"samples_{task}_{DATE}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def lines(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / f"judged_{task}.jsonl").read_text().splitlines()]


def judge_by_rule(folder: Path, *more: str) -> int:
    return invoke(["judge", str(folder), "--judge", "rule", "--replies", str(folder.parent / "r.sqlite"), *more])


class Scripted:
    name, revision, label, parallel, priced = "scripted", "", "scripted", False, True

    def __init__(self, replies: Mapping[str, str]) -> None:
        self.replies = replies

    def ask(self, rubric: Rubric, case: Case, prompt: Prompt) -> Reply:
        if case.question not in self.replies:
            raise TryAgainError("timeout")
        return Reply(self.replies[case.question])

    def close(self) -> None: ...


def judge(folder: Path, replies: Mapping[str, str], **limits: Any) -> dict[str, Any]:
    with Store(folder.parent / "scripted.sqlite") as store:
        return after_run.judge_folder(folder, Client(Scripted(replies), store, Limits(retries=0, **limits)))


@pytest.fixture(scope="module")
def rj_rows(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Real questions over real passages, 2k tokens of a tokenizer with one token per word."""
    folder = tmp_path_factory.mktemp("rows")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>").save_pretrained(
        folder / "words"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCEVAL_DATA", str(data_folder))
        patch.setenv("LCEVAL_CACHE", str(folder / "cache"))
        return list(rows_of(catalogue.find("lc_nqopen_rj_2k"), {"pretrained": str(folder / "words")})[:24])


def solution(row: Mapping[str, Any], kind: int) -> str:
    """Right and cited, right and uncited, wrong, or empty."""
    cited = ", ".join(f"[DOC {place}]" for place in sorted(gold_places(row)))
    reasoned = f"Question analysis: what is asked.\nDocument review: {cited} bear on it.\nReasoning: they say so."
    return [
        f"{reasoned}\nThe answer is: {row['answers'][0]}",
        f"The answer is: {row['answers'][0]}",
        f"{reasoned}\nThe answer is: qqq",
        "",
    ][kind % 4]


def test_r_judge_gives_its_criteria_and_the_papers_reward_on_real_rows(
    rj_rows: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "lc_nqopen_rj_2k"
    run = made_run(tmp_path / "run", task, rj_rows, [solution(row, i) for i, row in enumerate(rj_rows)])
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    assert judge_by_rule(run, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)
    for number, row in enumerate(lines(run, task)):
        parts = [(1, 1, 1), (0, 0, 1), (1, 1, 0), (0, 0, 0)][number % 4]
        assert (row["judge_reasoning"], row["judge_grounding"], row["judge_correct"]) == parts
        assert row["judge_sum"] == sum(parts)
        assert row["rj_paper"] == sum(parts) + [1, 1, 0, 0][number % 4]
    scores = report["tasks"][task]["scores"]
    assert scores["judge_sum"] == (3 + 1 + 2) / 4
    assert scores["rj_paper"] == 2.0
    assert report["tasks"][task]["coverage"] == 1.0
    assert (report["rule_based"], report["label"]) == (True, "rule-based")
    assert {name: (run / name).read_bytes() for name in before} == before
    # Verdict files do not change how the run is parsed.
    assert len(read_folder(run)[0].tasks[0].samples) == len(rj_rows)


def test_the_prompt_of_r_judge_has_only_the_gold_documents_with_their_numbers(
    rj_rows: list[Any], tmp_path: Path
) -> None:
    sent: list[str] = []

    class Recording(Scripted):
        def ask(self, rubric: Rubric, case: Case, prompt: Prompt) -> Reply:
            sent.append(prompt.user)
            return Reply("")

    run = made_run(tmp_path / "run", "lc_nqopen_rj_2k", rj_rows[:2], ["x", "y"])
    with Store(tmp_path / "s.sqlite") as store:
        after_run.judge_folder(run, Client(Recording({}), store))
    for row, prompt in zip(rj_rows, sent, strict=False):
        gold = gold_places(row)
        for place, doc in enumerate(row["docs"]):
            assert (f"[DOC {place}]\n{doc['text']}" in prompt) == (place in gold)


def test_without_a_judge_r_judge_scores_answer_and_citations_and_every_sample_is_unjudged(
    rj_rows: list[Any], tmp_path: Path
) -> None:
    task = "lc_nqopen_rj_2k"
    metrics = lm_eval_config.task_config(catalogue.find(task))["process_results"](rj_rows[0], [solution(rj_rows[0], 0)])
    assert (metrics["subem"], metrics["ids_f1"]) == (1.0, 1.0)
    assert not [name for name in metrics if "judge" in name or name == "rj_paper"]
    run = made_run(tmp_path / "run", task, rj_rows, [solution(row, 0) for row in rj_rows])
    assert not (run / "judge.json").exists()
    task_report = judge(run, {}, calls=0)["tasks"][task]
    assert (task_report["n"], task_report["unjudged"], task_report["coverage"]) == (24, 24, 0.0)
    assert (task_report["scores"], task_report["reasons"]) == ({}, {"budget": 24})


def loong(data_folder: Path) -> list[dict[str, Any]]:
    """Real questions and answers of Loong, without its reports, which are not in the judge's prompt."""
    docs = []
    for text in (data_folder / "loong" / "loong_financial_en.jsonl").read_text().splitlines():
        record = json.loads(text)
        docs.append(
            {
                "id": record["id"],
                "cluster": str(record["doc"]),
                "question": record["question"],
                "answers": [compact(record["answer"])],
                "docs": [],
                "gold_pids": [],
                "level": int(record["level"]),
                "set": int(record["set"]),
            }
        )
    return docs


def test_loong_has_average_and_perfect_rate_overall_by_level_and_by_set(data_folder: Path, tmp_path: Path) -> None:
    task, docs = "lc_loong_ao", loong(data_folder)
    run = made_run(tmp_path / "run", task, docs, ["A reply."] * len(docs))
    ratings_by_question: dict[str, float] = {}
    replies: dict[str, str] = {}
    for number, doc in enumerate(docs):
        rating = [100, 40, 7, None][(number + doc["level"]) % 4]
        if doc["question"] not in replies:
            replies[doc["question"]] = "It agrees in part. " + (f"Rating: [[{rating}]]" if rating else "Good.")
            ratings_by_question |= {doc["question"]: float(rating)} if rating else {}
    report = judge(run, replies)["tasks"][task]
    known = [doc for doc in docs if doc["question"] in ratings_by_question]
    assert report["n"] == 295
    assert report["unjudged"] == 295 - len(known) == report["reasons"]["unparsable"] > 0

    def expected(chosen: list[dict[str, Any]]) -> tuple[float, float]:
        ratings = [ratings_by_question[doc["question"]] for doc in chosen if doc["question"] in ratings_by_question]
        return mean(ratings), mean(rating == 100 for rating in ratings)

    def measured(scores: Mapping[str, Any]) -> tuple[float, float]:
        return scores["avg_score"], scores["perfect_rate"]

    assert measured(report["scores"]) == pytest.approx(expected(docs))
    for stratum in ("level", "set"):
        values = {str(doc[stratum]) for doc in docs}
        assert set(report[f"by_{stratum}"]) == values
        for value in values:
            inside = [doc for doc in docs if str(doc[stratum]) == value]
            assert measured(report[f"by_{stratum}"][value]) == pytest.approx(expected(inside))
            assert report[f"by_{stratum}"][value]["n"] == len(inside)
    assert [report["by_level"][level]["n"] for level in "1234"] == [75, 80, 90, 50]


def test_loong_by_rule_gives_a_perfect_rating_only_to_the_gold_answer(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, docs = "lc_loong_ao", loong(data_folder)[:40]
    answers = [doc["answers"][0] if number % 2 else "nothing of the kind" for number, doc in enumerate(docs)]
    assert judge_by_rule(made_run(tmp_path / "run", task, docs, answers)) == 0
    text = capsys.readouterr().out
    assert "by rule (rule-based), rubric loong@1" in text
    assert "40 of 40 judged, 0 unjudged" in text
    rows = lines(tmp_path / "run", task)
    assert [row["avg_score"] == 100 for row in rows] == [bool(number % 2) for number in range(40)]


def test_several_runs_are_judged_in_one_command_with_options_in_any_position(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = financebench(2)
    runs = [made_run(tmp_path / name, "lc_financebench_ao", docs, [f"It is {name}.", "8.7"]) for name in ("a", "b")]
    line = ["judge", "--judge", "rule", "--json", *map(str, runs), "--replies", str(tmp_path / "r.sqlite")]
    assert invoke(line) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["run"] for report in reports] == ["a", "b"]
    assert [json.loads((run / "judge.json").read_text()) for run in runs] == reports


def financebench(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"f{i}", "cluster": f"c{i}", "question": f"Q{i}?", "answers": ["8.7"], "docs": [], "gold_pids": []}
        for i in range(count)
    ]


def test_financebench_has_three_shares_and_letters_are_extracted_from_prose(data_folder: Path, tmp_path: Path) -> None:
    docs = financebench(4)
    run = made_run(tmp_path / "f", "lc_financebench_ao", docs, ["x"] * 4)
    grades = ["correct", "refusal", "incorrect", "correct"]
    replies = {f"Q{i}?": f'{{"verdict": "{grade}"}}' for i, grade in enumerate(grades)}
    scores = judge(run, replies)["tasks"]["lc_financebench_ao"]["scores"]
    assert scores == {"judge_correct": 0.5, "judge_incorrect": 0.25, "judge_refusal": 0.25}

    letters = [{**doc, "choices": ["w", "x", "y", "z"], "gold": 1, "context_setting": "full"} for doc in docs]
    run = made_run(tmp_path / "c", "lc_lbv2_mc", letters, ["I would say the second."] * 4)
    replies = {f"Q{i}?": f'{{"letter": "{letter}"}}' for i, letter in enumerate(["B", "A", "none", "b"])}
    scores = judge(run, replies)["tasks"]["lc_lbv2_mc"]["scores"]
    assert scores == {"judge_acc": 0.5, "judge_parsed": 0.75}


def test_a_sample_that_failed_in_the_run_scores_0_and_is_not_sent(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "lc_financebench_ao", financebench(2), ["x", "y"])
    file = run / f"samples_lc_financebench_ao_{DATE}.jsonl"
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    rows[1]["kv"] = {"status": "error"}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = judge(run, {"Q0?": '{"verdict": "correct"}'})
    task_report = report["tasks"]["lc_financebench_ao"]
    assert (task_report["errors"], task_report["unjudged"], task_report["scores"]["judge_correct"]) == (1, 0, 0.5)
    assert report["calls"] == 1


def test_a_failed_call_is_exit_4_and_the_same_command_retries_only_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lceval.judge import backends

    run = made_run(tmp_path / "run", "lc_financebench_ao", financebench(3), ["x", "y", "z"])
    scripted = Scripted({"Q0?": '{"verdict": "correct"}', "Q2?": "hm"})
    monkeypatch.setattr(backends, "make", lambda spec, **_: scripted)
    line = ["judge", str(run), "--judge", "any", "--retries", "0", "--replies", str(tmp_path / "r.sqlite")]
    assert invoke(line) == 4
    captured = capsys.readouterr()
    assert "1 of 3 judged, 2 unjudged; 1 failed: timeout; 1 unparsable" in captured.out
    assert "1 samples are unjudged" in captured.err
    scripted.replies = {"Q1?": '{"verdict": "incorrect"}'}
    assert invoke(line) == 0
    assert "2 of 3 judged, 1 unjudged; 1 unparsable" in capsys.readouterr().out


def test_two_processes_never_use_one_judge_with_one_reply_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run", "lc_financebench_ao", financebench(1), ["x"])
    with alone(tmp_path / "r.sqlite", "rule"):
        assert judge_by_rule(run) == 2
        assert "another process uses rule" in capsys.readouterr().err
    with alone(tmp_path / "r.sqlite", "another"):
        assert judge_by_rule(run) == 0


def test_runs_that_cannot_be_judged_are_refused(tmp_path: Path) -> None:
    plain = [{**doc, "answers": ["x"]} for doc in financebench(1)]
    run = made_run(tmp_path / "run", "lc_filings_ao_1k", plain, ["x"])
    with pytest.raises(UserError, match="no judgeable task"):
        judge(run, {})
    started = tmp_path / "started"
    started.mkdir()
    (started / "run.json").write_text(json.dumps({"status": "running", "tasks": ["lc_loong_ao"]}))
    with pytest.raises(UserError, match="not finished"):
        judge(started, {})
    for name in ("a", "b"):
        (run / f"results_{name}.json").write_text((run / f"results_{DATE}.json").read_text())
        (run / f"samples_lc_filings_ao_1k_{name}.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="contains 3 evaluations"):
        judge(run, {})


def test_the_rubric_depends_on_output_format_and_dataset() -> None:
    output_formats = {
        "rj": "rj",
        "judged": "loong",
        "equality": "equality",
        "letter": "choice",
        "infinite_letter": "choice",
    }
    for name, task in catalogue.tasks().items():
        finance = task.dataset.dataset.startswith("financebench")
        assert rubric_of(name) == ("financebench" if finance else output_formats.get(task.output_format)), name
    assert rubric_of("lc_no_such_task") is None
