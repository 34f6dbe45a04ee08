"""Multiple choice: the letter of an output by each benchmark's rule, and the rows of LongBench v2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, lm_eval_config, prompts
from lceval.tasks.mc import letters


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("LCEVAL_CACHE", str(folder / "mc-cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "mc-arrow"))


def rows(task: str, **metadata: Any) -> list[Any]:
    return build.rows_of(catalogue.find(task), metadata)


# LongBench v2


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("The correct answer is (B)", "B"),
        ("The correct answer is (B).\n\nThis is because (C) ignores the tax.", "B"),
        ("The correct answer is B", "B"),
        ("The correct answer is D, not A.", "D"),
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is **(C)**.", "C"),
        ("The correct answer is ***A***", "A"),
        ("Let me compare. (A) is wrong, (B) too.\nThe correct answer is (D)", "D"),
        ("The correct answer is (A). On reflection, The correct answer is (B).", "A"),
        # brackets take precedence, at any position
        ("The correct answer is A? No: The correct answer is (B)", "B"),
        ("<think>The correct answer is (A)</think>The correct answer is (D)", "D"),
        ("The correct answer is (A), it seems.</think>\nThe correct answer is (C)", "C"),
        ("<think>The correct answer is (A)</think>", None),
        ("<think>The correct answer is (A), or is", None),
        # the rule is exact: spelling, case, spacing and range
        ("the correct answer is (B)", None),
        ("The correct answer is: (B)", None),
        ("The correct answer is (b)", None),
        ("The correct answer is  (B)", None),
        ("The correct answer is (E)", None),
        ("The correct answer is option B", None),
        ("Answer: B", None),
        ("B", None),
        ("(B) the second one", None),
        ("The answer is (B)", None),
        ("None of them.", None),
        ("", None),
        # what follows the letter is not checked
        ("The correct answer is Because", "B"),
        ("The correct answer is (B and (C))", None),
    ],
)
def test_longbench_v2_accepts_only_the_stated_letter(output: str, letter: str | None) -> None:
    assert letters.stated_letter(output) == letter
    for gold in range(4):
        metrics = letters.letter_results({"gold": gold}, [output])
        assert metrics == {"acc": float(letter == "ABCD"[gold]), "parse_rate": float(letter is not None)}


class Failed(str):
    """A response of a failed sample."""

    meta: dict[str, Any]


def test_a_failed_sample_is_wrong_whatever_its_text() -> None:
    failed = Failed("The correct answer is (A)")
    failed.meta = {"status": "error"}
    assert letters.letter_results({"gold": 0}, [failed])["acc"] == 0
    assert letters.infinite_results({"answers": ["A", "a text"]}, [failed])["acc"] == 0


def test_the_output_format_of_the_prompt_is_parsed() -> None:
    ask = prompts.ask("letter", "Which?", ["w", "x", "y", "z"])
    assert 'Reply with one line: "The correct answer is (X)".' in ask
    assert letters.stated_letter(f"{prompts.reply_prefix('letter')} (C)") == "C"
    assert letters.stated_letter(f"{prompts.reply_prefix('letter')} C") == "C"


@pytest.mark.parametrize("answers", [["the text alone"], ["E"], ["a"], ["AB"]])
def test_a_ground_truth_without_a_letter_raises(answers: list[str]) -> None:
    with pytest.raises(UserError, match="no letter in ground_truth"):
        letters.letter_results({"answers": answers}, ["The correct answer is (A)"])


# InfiniteBench


@pytest.mark.parametrize(
    ("output", "golds", "published", "later"),
    [
        ("B", ["Hall", "B"], True, True),
        ("  B. Hall", ["Hall", "B"], True, True),
        ("A. not B", ["Hall", "A"], True, True),
        ("Hall", ["Hall", "B"], True, True),
        # after a lead, one character is skipped
        ("The correct answer is B", ["Hall", "B"], True, True),
        ("The correct answer is (B)", ["Hall", "B"], False, True),
        ("My answer:B", ["Hall", "B"], False, True),
        ("Not C but D; the answer is: Hall", ["Hall", "B"], True, True),
        ('So the answer is "Hall"', ["Hall", "B"], True, True),
        ('So the answer is Mr. "Hall"', ["Hall", "B"], False, False),
        # without a lead, the first letter
        ("not B or C", ["Hall", "B"], True, True),
        ("(B)", ["Hall", "B"], False, True),
        ("On CD it is B", ["Hall", "B"], False, True),
        # the later rule: the last letter of the first line that has one
        ("Not A but B", ["Hall", "B"], False, True),
        ("Well.\nIt is B, not C\nD", ["Hall", "B"], True, True),
        ("Well.\nIt is B, not C\nD", ["Hall", "C"], False, True),
        ("Well.\nIt is B, not C\nD", ["Hall", "D"], False, False),
        # the first character is a letter: no further rule applies
        ("Carley, that is D", ["Carley", "B"], False, False),
        ("Answer: B", ["Hall", "B"], False, True),
        ("A man named Hall", ["Hall", "B"], False, False),
        ("answer:", ["Hall", "B"], False, False),
        ("b", ["Hall", "B"], False, False),
        ("I cannot read the book.", ["Hall", "B"], False, False),
        ("", ["Hall", "B"], False, False),
        ("\n\n", ["Hall", "B"], False, False),
    ],
)
def test_infinitebenchs_published_and_later_rules(output: str, golds: list[str], published: bool, later: bool) -> None:
    assert letters.by_published_rule(output, golds) is published
    assert letters.by_later_rule(output, golds) is later


def test_infinitebench_ignores_thinking_and_counts_outputs_without_a_letter() -> None:
    doc = {"answers": ["B", "Hall"]}
    thought = letters.infinite_results(doc, ["<think>A or C? A.</think>B"])
    assert thought == {"acc": 1.0, "acc_last_letter": 1.0, "parse_rate": 1.0}
    silent = letters.infinite_results(doc, ["I would rather not say."])
    assert silent == {"acc": 0.0, "acc_last_letter": 0.0, "parse_rate": 0.0}


# Rows of LongBench v2


def hub_record(n: int, context: str, **changed: Any) -> dict[str, Any]:
    """A record in the format of data.json."""
    return {
        "_id": f"66f{n:021d}",
        "domain": "Single-Document QA",
        "sub_domain": "Financial",
        "difficulty": "hard" if n % 2 else "easy",
        "length": "short",
        "question": f"What does section {n} say?",
        "choice_A": f"nothing {n}",
        "choice_B": f"something {n}",
        "choice_C": f"little {n}",
        "choice_D": f"much {n}",
        "answer": "ABCD"[n % 4],
        "context": context,
        **changed,
    }


def hub_copy(folder: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "hub/zai-org/LongBench-v2/data.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(records))
    monkeypatch.setenv("LCEVAL_DATA", str(folder))


@pytest.mark.parametrize("task", ["lc_lbv2_mc", "lc_lbv2_mc_ll"])
def test_a_copy_of_the_hubs_file_becomes_rows(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [hub_record(0, "A report. "), hub_record(1, "Another one."), hub_record(2, "A report.")]
    hub_copy(tmp_path, records, monkeypatch)
    built = rows(task)
    # the third row has the context of the first, and is adjacent to it
    assert [row["id"][-1] for row in built] == ["0", "2", "1"]
    assert [row["cluster"] for row in built].count(built[0]["cluster"]) == 2
    row = built[-1]
    pid = row["docs"][0]["pid"]
    closing = (
        'Reply with one line: "The correct answer is (X)".' if task == "lc_lbv2_mc" else "Reply with its letter.\n"
    )
    assert row == {
        "id": "66f000000000000000000001",
        "question": "What does section 1 say?",
        "answers": ["B", "something 1"],
        "docs": [{"pid": pid, "title": "", "text": "Another one."}],
        "gold_pids": [pid],
        "cluster": pid,
        "length_tokens": None,
        "source": row["source"],
        "licence": catalogue.datasets()["lbv2"].licence,
        "instruction": ("Read the text below. A question about it follows, with four options of which one is correct."),
        "context": "Another one.",
        "context_setting": "full",
        "ask": (
            f"Question: What does section 1 say?\n(A) nothing 1\n(B) something 1\n(C) little 1\n(D) much 1\n{closing}"
        ),
        "reply_prefix": "The correct answer is" if task == "lc_lbv2_mc" else "",
        "difficulty": "hard",
        "length_class": "short",
        "domain": "Single-Document QA",
        "sub_domain": "Financial",
        "choices": ["nothing 1", "something 1", "little 1", "much 1"],
        "gold": 1,
    }
    assert row["source"].startswith("zai-org/LongBench-v2/data.json sha256:")
    assert "sample" not in row["source"]


def test_without_context_the_prompt_is_the_question_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_copy(tmp_path, [hub_record(0, "A report.")], monkeypatch)
    (row,) = rows("lc_lbv2_mc", context="none")
    assert (row["context"], row["docs"]) == ("", [])
    assert prompts.prompt(row).startswith("A question follows, with four options of which one is correct.\n\nQuestion:")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": "E"}, r"_id='66f0+1': invalid answer='E': expected A to D"),
        ({"answer": "AB"}, r"invalid answer='AB'"),
        ({"question": None}, r"record 2: invalid question=None: expected a string"),
        ({"_id": f"66f{0:021d}"}, r"duplicate _id='66f0+'"),
    ],
)
def test_an_invalid_record_raises_with_its_location(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_copy(tmp_path, [hub_record(0, "A report."), hub_record(1, "Another.", **changed)], monkeypatch)
    with pytest.raises(UserError, match=message) as caught:
        rows("lc_lbv2_mc")
    assert "\n" not in str(caught.value)


def test_a_missing_field_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{key: value for key, value in hub_record(0, "A report.").items() if key != "choice_C"}]
    hub_copy(tmp_path, records, monkeypatch)
    with pytest.raises(UserError, match=r"data\.json record 1: invalid choice_C=None: expected a string"):
        rows("lc_lbv2_mc")


def test_the_source_of_the_local_sample_says_that_it_is_a_sample(data_folder: Path) -> None:
    if not (data_folder / "longbench_v2/sample_with_context.jsonl").is_file():
        pytest.skip("LCEVAL_DATA has no longbench_v2/sample_with_context.jsonl")
    built = rows("lc_lbv2_mc")
    assert len(built) == 8
    for row in built:
        assert row["source"].endswith("(a sample: 8 of 503 rows)")
        assert len(row["context"]) > 50_000
        assert row["answers"] == ["ABCD"[row["gold"]], row["choices"][row["gold"]]]
    assert {row["difficulty"] for row in built} == {"easy", "hard"}


def test_a_hub_copy_takes_precedence_over_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_copy(tmp_path, [hub_record(0, "From the hub.")], monkeypatch)
    sample = tmp_path / "longbench_v2/sample_with_context.jsonl"
    sample.parent.mkdir()
    sample.write_text(json.dumps(hub_record(1, "From the sample.")) + "\n")
    (row,) = rows("lc_lbv2_mc")
    assert row["context"] == "From the hub."


def test_the_tasks_exist_and_are_not_in_the_suite_group() -> None:
    assert {"lc_lbv2_mc", "lc_lbv2_mc_ll"} <= catalogue.tasks().keys()
    assert not any("lbv2" in task for task in catalogue.groups()["lc_mc"])
    for task, emitted in [("lc_lbv2_mc", {"acc", "parse_rate"}), ("lc_lbv2_mc_ll", {"acc"})]:
        declared = {metric["metric"] for metric in lm_eval_config.task_config(catalogue.find(task))["metric_list"]}
        assert emitted <= declared
