"""Scoring of one output: normalisation, answer extraction, metrics and telemetry."""

import math
import string
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.tasks import parsing, scoring

DOC = {"answers": ["Paris", "City of Paris"], "choices": ["red", "blue", "green", "grey"], "gold": 1}


class Reply(str):
    """A generated answer with telemetry, as our own model returns it."""

    meta: dict


class Score(tuple):
    """A log-likelihood with telemetry."""

    meta: dict


def reply(text, **meta):
    answer = Reply(text)
    answer.meta = meta
    return answer


def score(value, **meta):
    pair = Score((value, False))
    pair.meta = meta
    return pair


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, sat.", "cat sat"),
        ("A.B.C.", "abc"),
        ("An apple\na day", "apple day"),
        ("$1,577 million", "1577 million"),
        ("theatre another", "theatre another"),
        ("The", ""),
        ("“naïve”", "“naïve”"),
    ],
)
def test_normalize_follows_squad(text, normal):
    assert parsing.normalize(text) == normal


@given(st.text())
def test_normalize_is_idempotent_and_leaves_no_ascii_punctuation(text):
    once = parsing.normalize(text)
    assert parsing.normalize(once) == once
    assert not set(once) & set(string.punctuation)
    assert once == " ".join(once.split())


@given(st.text(), st.text(alphabet=string.ascii_letters + " ", min_size=1))
def test_a_gold_inside_the_prediction_is_a_subem_hit_unless_it_normalises_to_nothing(around, gold):
    expected = float(bool(parsing.normalize(gold)))
    assert scoring.subem(f"{around} {gold} {around}", [gold]) == expected


@pytest.mark.parametrize(
    ("text", "answer", "parsed"),
    [
        ("Answer: Paris", "Paris", True),
        ("Answer: London\nWait.\nAnswer: Paris\nDone.", "Paris", True),
        ("answer:Paris", "Paris", True),
        ("**Answer:** Paris", "Paris", True),
        ("**Answer**: **Paris**", "Paris", True),
        ("__Answer:__ `Paris`", "Paris", True),
        ("The answer is: Paris. It is large.", "Paris. It is large.", True),
        ("THE ANSWER IS : Paris", "Paris", True),
        ("Answer: The answer is: Paris", "Paris", True),
        ("The answer is: London, no. Final Answer: Paris", "Paris", True),
        ("Answer: Paris\r\nNext", "Paris", True),
        ("  Answer:\tParis  ", "Paris", True),
        ("Paris", "Paris", False),
        ("The answer is Paris", "The answer is Paris", False),
        ("Answers: Paris", "Answers: Paris", False),
        ("Answer:", "", False),
        ("Answer:\nParis", "Paris", True),
        ("**Answer:**\n\n**Paris**\nIt is large.", "Paris", True),
        ("Answer: \n \n", "", False),
        ("", "", False),
        ("<think>Answer: London</think>Paris", "Paris", False),
        ("<think>London?</think>\nAnswer: Paris", "Paris", True),
        ("perhaps London</think>\nParis", "Paris", False),
        ("<think>Answer: Paris, or", "", False),
        ("<THINK>a</THINK>Answer: Paris<think>b", "Paris", True),
    ],
)
def test_extraction_of_hard_outputs(text, answer, parsed):
    assert parsing.extract(text) == (answer, parsed)


@given(st.text(), st.from_regex(r"[A-Za-z0-9$][A-Za-z0-9$ ,.]{0,30}[A-Za-z0-9]", fullmatch=True))
def test_the_last_marker_is_used(before, answer):
    text = before.replace("<", "").replace(">", "") + "\nAnswer: " + answer
    assert parsing.extract(text) == (answer, True)


def test_f1_follows_the_yes_no_rule_and_takes_the_best_gold():
    assert scoring.f1("yes it is", ["yes"]) == 0.0
    assert scoring.f1("no", ["yes it is"]) == 0.0
    assert scoring.f1("Yes.", ["yes"]) == 1.0
    assert scoring.f1("red big dog", ["cat", "big red"]) == pytest.approx(0.8)
    assert scoring.f1("", ["cat"]) == 0.0


def test_a_gold_that_normalises_to_nothing_matches_nothing():
    assert scoring.subem("anything", ["The"]) == scoring.em("the", ["The"]) == scoring.f1("a", ["The"]) == 0.0


def test_raw_and_extracted_subem_differ_if_the_answer_is_not_final():
    metrics = scoring.answer_metrics("It may be Paris.\nAnswer: London", ["Paris"])
    assert (metrics["subem"], metrics["subem_raw"], metrics["parse_rate"]) == (0.0, 1.0, 1.0)


def test_an_output_without_marker_is_scored_whole_and_lowers_the_parse_rate():
    metrics = scoring.answer_metrics("I think it is the City of Paris", DOC["answers"])
    assert (metrics["subem"], metrics["em"], metrics["parse_rate"]) == (1.0, 0.0, 0.0)


def test_other_models_get_no_telemetry():
    assert set(scoring.answer_results(DOC, ["Answer: Paris"])) == {
        "subem",
        "subem_raw",
        "em",
        "f1",
        "parse_rate",
    }
    assert set(scoring.choice_results(DOC, [(-1.0, False)] * 4)) == {"acc", "acc_norm"}


def test_telemetry_is_emitted_with_the_status_and_meta_is_unchanged():
    kv = {"kept_share": 0.25, "new_tokens": 5}
    answer = reply("Answer: Paris", status="ok", kv_bytes=10, kv_bytes_full=40, kv=kv)
    results = scoring.answer_results(DOC, [answer])
    assert (results["subem"], results["kv_bytes"], results["kv_bytes_full"]) == (1.0, 10, 40)
    assert results["kv"] == {"kept_share": 0.25, "new_tokens": 5, "status": "ok"}
    assert kv == {"kept_share": 0.25, "new_tokens": 5}


@pytest.mark.parametrize(
    ("text", "meta", "recorded"),
    [
        ("Answer: Paris", {}, "ok"),
        ("Answer: Paris", {"status": "ok"}, "ok"),
        ("Paris", {"kv": {"status": "ok"}}, "wrong_format"),
        ("Paris", {"kv": {"status": "ok", "truncated": True}}, "truncated"),
        ("Answer: Paris", {"status": "truncated"}, "truncated"),
        ("", {"status": "error"}, "error"),
        ("", {"kv": {"status": "error"}}, "error"),
    ],
)
def test_every_answer_has_a_status(text, meta, recorded):
    assert scoring.answer_results(DOC, [reply(text, **meta)])["kv"]["status"] == recorded


@pytest.mark.parametrize("meta", [{"status": "error"}, {"kv": {"status": "error"}}])
def test_a_failed_sample_scores_zero_on_all_metrics(meta):
    answer = scoring.answer_results(DOC, [reply("Answer: Paris", **meta)])
    choice = scoring.choice_results(DOC, [score(value, **meta) for value in (-9.0, -1.0, -9.0, -9.0)])
    scored = {**answer, **choice}
    assert all(scored[name] == 0.0 for name in ("subem", "subem_raw", "em", "f1", "parse_rate", "acc", "acc_norm"))


def test_choices_are_compared_by_likelihood_and_by_likelihood_per_character():
    values = [(-4.0, False), (-6.0, False), (-9.0, False), (-9.0, False)]
    doc = {"choices": ["no", "a longer text", "x", "y"], "gold": 1}
    assert scoring.choice_results(doc, values) == {"acc": 0.0, "acc_norm": 1.0}


def test_acc_norm_is_per_character_as_in_lm_eval():
    # 4 characters each, though the second has 8 bytes
    assert scoring.choice_metrics([-4.0, -6.0], ["abcd", "éééé"], gold=1) == {"acc": 0.0, "acc_norm": 0.0}
    assert scoring.choice_metrics([-4.0, -6.0], ["abcd", "abcdefgh"], gold=1) == {"acc": 0.0, "acc_norm": 1.0}


def test_kept_share_is_the_mean_over_the_samples_that_did_not_fail():
    failed = {"status": "error", "kept_share": 1.0}
    assert scoring.kept_share([{"kept_share": 0.25}, {"kept_share": 0.75, "status": "ok"}, failed]) == 0.5
    assert math.isnan(scoring.kept_share([failed]))


def test_repeats_are_found_in_both_dictionaries_that_lm_eval_accepts() -> None:
    class Task:
        OUTPUT_TYPE = "generate_until"
        config = SimpleNamespace(repeats=3, filter_list=None)

        def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
            return {"exact_match": int(results[0] == doc["answer"]), "pair": (1, 2)}

    task = Task()
    current = {"tasks": {"a": task}, "groups": {"g": SimpleNamespace()}, "group_map": {"g": ["a"]}}
    assert (
        scoring.tasks_within(current)
        == scoring.tasks_within({"g": {"a": task}})
        == scoring.tasks_within({"a": task})
        == {"a": task}
    )
    sample: dict[str, Any] = {"doc": {"answer": "4"}, "resps": [["4", "5", "4"]]}
    scoring.add_repeats(task, [sample])
    assert sample["repeats"] == {"exact_match": [1.0, 0.0, 1.0]}
    for other in (SimpleNamespace(repeats=1, filter_list=None), SimpleNamespace(repeats=3, filter_list=[{}])):
        plain: dict[str, Any] = {"doc": {"answer": "4"}, "resps": [["4", "5", "4"]]}
        task.config = other
        scoring.add_repeats(task, [plain])
        assert "repeats" not in plain
