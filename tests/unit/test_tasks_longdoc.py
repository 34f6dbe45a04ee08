"""Long documents: SQuALITY's and InfiniteBench's rows, ROUGE, and InfiniteBench's own F1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, lm_eval_config, prompts
from lceval.tasks.longdoc import infinitebench, summaries

WORDS = st.lists(st.sampled_from(["sea", "ship", "captain", "storm", "the", "no"]), max_size=12).map(" ".join)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("LCEVAL_CACHE", str(folder / "longdoc-cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "longdoc-arrow"))


def rows(task: str, **metadata: Any) -> list[Any]:
    return build.rows_of(catalogue.find(task), metadata)


# Scores


def test_infinitebenchs_published_rouge_lsum_is_reproduced(data_folder: Path) -> None:
    file = data_folder / "infinitebench_predictions/gpt4__longbook_sum_eng.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 103
    scored = [summaries.infinite_results({"answers": of["ground_truth"]}, [of["prediction"]]) for of in records]
    assert round(100 * sum(score["rougeLsum"] for score in scored) / len(scored), 2) == 14.73


def test_infinitebenchs_f1_is_the_maximum_over_golds_without_special_answers() -> None:
    # 2 of 3 predicted words, 2 of 2 gold words
    assert infinitebench.token_f1("The old sea captain!", ["a storm", "sea captain"]) == pytest.approx(4 / 5)
    assert infinitebench.token_f1("Yes, it did", ["yes"]) == pytest.approx(2 / 4)
    assert infinitebench.token_f1("", ["yes"]) == infinitebench.token_f1("...", ["the"]) == 0


def test_infinitebenchs_f1_is_on_the_whole_output_and_ours_on_the_extracted_answer() -> None:
    scored = infinitebench.qa_results({"answers": ["sea captain"]}, ["Answer: the sea captain"])
    # 2 of 3 predicted words
    assert scored.pop("f1") == pytest.approx(4 / 5)
    assert scored == {"subem": 1, "subem_raw": 1, "em": 1, "f1_extracted": 1, "parse_rate": 1}


@given(WORDS, st.lists(WORDS, min_size=1, max_size=4))
def test_a_further_reference_never_lowers_rouge(summary: str, references: list[str]) -> None:
    one, all_of_them = summaries.rouge(summary, references[:1]), summaries.rouge(summary, references)
    assert one.keys() == all_of_them.keys() == {"rougeLsum", "rougeL", "rouge1", "rouge2"}
    assert all(0 <= one[name] <= all_of_them[name] <= 1 for name in one)


def test_each_rouge_measure_is_its_maximum_over_the_references() -> None:
    # unigrams: all of the first reference, in another order; bigrams: one of three of the second
    scores = summaries.rouge("storm at sea", ["sea at storm", "we went to storm at last"])
    assert scores["rouge1"] == 1
    assert scores["rouge2"] == pytest.approx(2 * 1 / (2 + 5))
    assert scores["rougeL"] == pytest.approx(2 * 2 / (3 + 6))


def test_infinitebenchs_lsum_is_by_line_and_words_are_not_stemmed() -> None:
    # by lines, all matches in any order of lines; as one sentence, only half
    scores = summaries.rouge("the ship sank\nthe captain swam", ["the captain swam\nthe ship sank"])
    assert scores["rougeLsum"] == 1
    assert scores["rougeL"] == pytest.approx(1 / 2)
    assert summaries.infinite_results({"answers": ["ship"]}, ["ships"])["rouge1"] == 0
    assert summaries.infinite_results({"answers": ["He swam. He sank."]}, ["He sank. He swam."])["rougeLsum"] == 1 / 2


def test_squalitys_lsum_is_by_sentence_and_words_are_stemmed() -> None:
    text = 'Mr. Day sank. "Who?" The 3.5 m ship (of Dr. Cox) swam!\nHe did: "No." At 6 a.m. it was still.'
    assert summaries.by_sentence(text).split("\n") == [
        "Mr. Day sank.",
        '"Who?"',
        "The 3.5 m ship (of Dr. Cox) swam!",
        'He did: "No."',
        "At 6 a.m. it was still.",
    ]
    scores = summaries.squality_results({"answers": ["He swam. The ships sank."]}, ["The ship sank. He swam."])
    assert scores["rougeLsum"] == scores["rouge1"] == 1
    assert scores["rougeL"] == pytest.approx(3 / 5)


def test_thinking_is_not_part_of_a_summary_and_an_empty_summary_scores_zero() -> None:
    doc = {"answers": ["the ship sank"]}
    for results in (summaries.squality_results, summaries.infinite_results):
        assert results(doc, ["<think>sea, storm</think>\nThe ship sank"])["rouge1"] == 1
        assert set(results(doc, ["<think>the ship sank"]).values()) == {0.0}


# SQuALITY


def test_every_question_of_squality_has_its_story_and_four_references(data_folder: Path) -> None:
    built = rows("lc_squality_sum")
    assert len(built) == 75
    assert len({row["id"] for row in built}) == 75
    clusters = [row["cluster"] for row in built]
    assert len(set(clusters)) == 15
    assert clusters == [cluster for cluster in dict.fromkeys(clusters) for _ in range(5)]
    for row in built:
        assert len(row["answers"]) == 4
        assert all(row["answers"])
        assert row["context"] == row["docs"][0]["text"]
        assert prompts.prompt(row).endswith(
            f"\n\n{row['question']}\nReply with a summary of about 250 words, and nothing else."
        )


def test_one_reference_against_the_rest_has_squalitys_scores(data_folder: Path) -> None:
    # the first two of the five questions on each story
    built = [row for number, row in enumerate(rows("lc_squality_sum")) if number % 5 < 2]
    scored = [summaries.squality_results({"answers": row["answers"][1:]}, [row["answers"][0]]) for row in built]
    means = {name: round(100 * sum(score[name] for score in scored) / len(scored), 1) for name in scored[0]}
    assert means == {"rouge1": 48.3, "rouge2": 12.8, "rougeL": 22.6, "rougeLsum": 45.0}


@pytest.mark.parametrize(
    ("story", "message"),
    [
        ({"document": "It was night.", "questions": []}, "record 1 is not a SQuALITY story (KeyError: 'metadata')"),
        (
            {"metadata": {"passage_id": "1"}, "document": "Night.", "questions": [{"question_number": 1}]},
            "question_text",
        ),
        (
            {
                "metadata": {"passage_id": "1"},
                "document": "Night.",
                "questions": [{"question_number": 1, "question_text": "Who?", "responses": []}],
            },
            ": no reference summary for 1-1",
        ),
        ({"metadata": {"passage_id": "1"}, "questions": []}, "line 1: invalid document=None: expected a string"),
    ],
)
def test_an_invalid_story_is_a_one_line_error(
    story: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squality").mkdir()
    (tmp_path / "squality/squality_v1-3_dev.jsonl").write_text(json.dumps(story) + "\n")
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    with pytest.raises(UserError) as caught:
        rows("lc_squality_sum")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# InfiniteBench


def hub_record(split: str, n: int, **changed: Any) -> dict[str, Any]:
    """A record in the format of the hub's files."""
    options = [f"option {n}.{place}" for place in range(4)] if split == "longbook_choice_eng" else []
    answers = {
        "longbook_choice_eng": [f"option {n}.{n % 4}"],
        "longbook_qa_eng": [f"Captain {n}", f"the captain no. {n}"],
        "longbook_sum_eng": [f"A captain sinks ship {n}.\nHe swims."],
    }
    question = "" if split == "longbook_sum_eng" else f"Who sank ship {n}?"
    record = {"id": n, "context": f" Book {n % 2}. ", "input": question, "answer": answers[split], "options": options}
    return {**record, **changed}


def hub_copy(folder: Path, split: str, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / f"hub/xinrongzhang2022/InfiniteBench/{split}.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setenv("LCEVAL_DATA", str(folder))


SPLITS = {
    "lc_infinitebench_mc": "longbook_choice_eng",
    "lc_infinitebench_qa_ao": "longbook_qa_eng",
    "lc_infinitebench_sum": "longbook_sum_eng",
}
EXPECTED = {
    "lc_infinitebench_mc": {
        "question": "Who sank ship 2?",
        "answers": ["C", "option 2.2"],
        "instruction": "Read the text below. A question about it follows, with four options of which one is correct.",
        "ask": (
            "Question: Who sank ship 2?\n(A) option 2.0\n(B) option 2.1\n(C) option 2.2\n(D) option 2.3\n"
            "Reply with its letter alone."
        ),
        "reply_prefix": "",
        "choices": ["option 2.0", "option 2.1", "option 2.2", "option 2.3"],
        "gold": 2,
    },
    "lc_infinitebench_qa_ao": {
        "question": "Who sank ship 2?",
        "answers": ["Captain 2", "the captain no. 2"],
        "instruction": (
            "Read the text below and answer the question that follows it. "
            'Give only the answer, on one line that begins with "Answer:".'
        ),
        "ask": "Question: Who sank ship 2?",
        "reply_prefix": "Answer:",
    },
    "lc_infinitebench_sum": {
        "question": "Summarize the book.",
        "answers": ["A captain sinks ship 2.\nHe swims."],
        "instruction": "Read the text below. What to write about it follows.",
        "ask": "Summarize the book.\nReply with a summary of about 850 words, and nothing else.",
        "reply_prefix": "",
    },
}


@pytest.mark.parametrize("task", SPLITS)
def test_a_copy_of_the_hubs_files_becomes_rows(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = SPLITS[task]
    hub_copy(tmp_path, split, [hub_record(split, n) for n in range(4)], monkeypatch)
    built = rows(task)
    # the questions on a book are adjacent
    assert [row["id"] for row in built] == ["0", "2", "1", "3"]
    assert [row["context"] for row in built] == ["Book 0.", "Book 0.", "Book 1.", "Book 1."]
    row = built[1]
    book = row["cluster"]
    assert row == {
        "id": "2",
        "docs": [{"pid": book, "title": "", "text": "Book 0."}],
        "gold_pids": [book],
        "cluster": book,
        "length_tokens": None,
        "source": row["source"],
        "licence": "MIT",
        "context": "Book 0.",
        "context_setting": "full",
        **EXPECTED[task],
    }
    assert row["source"].startswith(f"xinrongzhang2022/InfiniteBench/{split}.jsonl sha256:")


def test_an_answer_may_come_with_its_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = "longbook_choice_eng"
    # identical option texts: only the letter distinguishes them
    record = hub_record(split, 0, options=["he", "she", "he", "they"], answer=["he", "C"])
    hub_copy(tmp_path, split, [record], monkeypatch)
    (row,) = rows("lc_infinitebench_mc")
    assert (row["gold"], row["answers"]) == (2, ["C", "he"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"answer": ["nobody"]},
            r"id=1: invalid answer=\['nobody'\] with 4 options: expected four options and the text of one",
        ),
        (
            {"options": ["option 1.0", "option 1.1"]},
            r"id=1: invalid answer=\['option 1.1'\] with 2 options: expected four options",
        ),
        ({"answer": []}, r"record 2: invalid answer=\[\]: expected a non-empty list of strings"),
        ({"options": []}, r"record 2: invalid options=\[\]"),
        ({"input": None}, r"record 2: invalid input=None: expected a string"),
        ({"id": 0}, r"duplicate id=0"),
    ],
)
def test_an_invalid_record_raises_with_its_location(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = "longbook_choice_eng"
    hub_copy(tmp_path, split, [hub_record(split, 0), hub_record(split, 1, **changed)], monkeypatch)
    with pytest.raises(UserError, match=message) as caught:
        rows("lc_infinitebench_mc")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", SPLITS)
def test_a_missing_field_raises(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{key: value for key, value in hub_record(SPLITS[task], 0).items() if key != "context"}]
    hub_copy(tmp_path, SPLITS[task], records, monkeypatch)
    with pytest.raises(UserError, match=r"record 1: invalid context=None: expected a string"):
        rows(task)


def test_every_emitted_metric_is_declared() -> None:
    emitted = {
        "lc_infinitebench_mc": {"acc", "acc_last_letter", "parse_rate"},
        "lc_infinitebench_qa_ao": {"subem", "subem_raw", "em", "f1", "f1_extracted", "parse_rate"},
        "lc_infinitebench_sum": {"rougeLsum", "rougeL", "rouge1", "rouge2"},
        "lc_squality_sum": {"rougeLsum", "rougeL", "rouge1", "rouge2"},
    }
    for name, metrics in emitted.items():
        config = lm_eval_config.task_config(catalogue.find(name))
        scored = config["process_results"]({"answers": ["A"]}, ["A"])
        assert scored.keys() == metrics <= {metric["metric"] for metric in config["metric_list"]}
        assert config["metadata"]["headline"] in metrics


def test_the_books_are_not_in_the_suite_group() -> None:
    assert catalogue.groups()["lc_longdoc"] == ["lc_squality_sum"]
