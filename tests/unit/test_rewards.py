"""Rewards of outputs, including outputs that try to exploit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.adapt.graders import Grader
from lceval.core.errors import UserError
from lceval.judge.backends.rule import RuleJudge
from lceval.judge.client import Client
from lceval.judge.replies import Store
from lceval.tasks import scoring
from lceval.training import rewards
from lceval.training.rewards import NAMES, Reward, Variant, totals

TEXTS = [
    "The harbour of Rena was dredged in 1954 by a firm from Turku, as document 3 of the archive says.",
    "Ole Vinter built the Lindmark bridge over the river Orne in the spring after the flood.",
    "Rain fell for nine days, and Zürich mayor Jörg Ångström closed the Limmat quay.",
]
ROW: dict[str, Any] = {
    "question": "Who built the Lindmark bridge?",
    "answers": ["Ole Vinter"],
    "docs": [{"pid": f"p{n}", "title": "", "text": text} for n, text in enumerate(TEXTS)],
    "gold_pids": ["p1"],
}
TWO = {**ROW, "gold_pids": ["p0", "p1"]}
NO_GOLD = {**ROW, "gold_pids": ["elsewhere"]}
ANSWER = "The answer is: Ole Vinter"
CONTEXT = "\n\n".join(f"[DOC {n}]\n{text}" for n, text in enumerate(TEXTS))
BEST = {
    "ao": "Answer: Ole Vinter",
    "id": f"Relevant documents: [DOC 1]\n{ANSWER}",
    "idc": f"[DOC 1] {TEXTS[1]}\n{ANSWER}",
    "idq": f'[DOC 1] "Ole Vinter built the Lindmark bridge"\n{ANSWER}',
    "rj": f"Question analysis: a builder.\nReasoning: [DOC 1] names the builder of it.\n{ANSWER}",
    "longrlvr": f"[DOC 1]\n{ANSWER}",
    "loongrl": ANSWER,
}


def reward(name: Any, output: str, variant: Variant = "paper", row: Any = ROW, **more: Any) -> float:
    """The reward of an output; J is 3 where the reward has it."""
    total = totals([Reward(name=name, variant=variant, **more).parts(row, output, 3.0)], [0])[0]
    assert total is not None
    return total


@pytest.mark.parametrize(
    ("name", "paper", "graded"),
    [
        ("ao", 1, 1.1),
        ("id", 2, 2.1),
        ("idc", 3, 3.1),
        ("idq", 3, 3.1),
        ("rj", 4, 3),
        ("longrlvr", 2, 2),
        ("loongrl", 1, 1),
    ],
)
def test_a_correct_output_has_the_maximum_reward(name: str, paper: float, graded: float) -> None:
    assert reward(name, BEST[name]) == pytest.approx(paper)
    assert reward(name, BEST[name], "graded") == pytest.approx(graded)
    wrong = BEST[name].replace("Ole Vinter", "Jörg").replace("[DOC 1]", "[DOC 2]")
    if name != "rj":  # J is fixed here
        assert reward(name, wrong) == 0
        assert reward(name, wrong, "graded") in (0, pytest.approx(rewards.FORMAT_REWARD))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", get_args(Variant))
def test_an_empty_output_has_no_reward(name: Any, variant: Variant) -> None:
    for output in ("", "  \n", "<think>Ole Vinter [DOC 1]\nAnswer: Ole Vinter", "Answer:", "<think></think>"):
        parts = Reward(name=name, variant=variant).parts(ROW, output)
        assert all(value is None or value <= 0 for value in parts.values()), parts


@pytest.mark.parametrize("variant", get_args(Variant))
def test_an_answer_inside_thinking_does_not_count(variant: Variant) -> None:
    thought = "<think>It says [DOC 1]. Answer: Ole Vinter</think>\n"
    assert reward("id", thought + "[DOC 0]\nThe answer is: Jörg", variant) <= rewards.FORMAT_REWARD
    assert reward("id", thought + BEST["id"], variant) == reward("id", BEST["id"], variant)
    assert reward("ao", "It says so.</think>" + BEST["ao"], variant) == reward("ao", BEST["ao"], variant)
    assert reward("ao", thought + "Answer: Jörg", variant, answer="raw") >= 0.9  # the raw output includes thinking


def test_an_output_without_an_answer_line_has_no_answer_unless_raw() -> None:
    for output in ("Ole Vinter", "I would say that Ole Vinter built it.", CONTEXT):
        assert reward("ao", output) == 0
        assert reward("ao", output, answer="raw") == 1
        assert reward("ao", output, "graded") == -rewards.FORMAT_REWARD


def test_the_last_of_several_answers_counts_and_the_format_is_wrong() -> None:
    both = "Answer: Jörg\nAnswer: Ole Vinter"
    assert reward("ao", both) == 1
    assert reward("ao", both, "graded") == pytest.approx(1 - rewards.FORMAT_REWARD)
    assert reward("ao", "Answer: Ole Vinter\nAnswer: Jörg") == 0
    assert reward("id", f"{BEST['id']}\nThe answer is: Ole Vinter", "graded") == pytest.approx(
        2 - rewards.FORMAT_REWARD
    )


def test_a_longer_list_of_answers_has_a_lower_graded_reward() -> None:
    names = [f"Name{n}" for n in range(40)]
    values = [reward("ao", f"Answer: {', '.join([*names[:n], 'Ole Vinter'])}", "graded") for n in (0, 8, 18, 38)]
    assert values == pytest.approx([1.1, 1.1, 0.6, 0.35])
    assert reward("ao", f"Answer: {', '.join([*names, 'Ole Vinter'])}") == 1  # the equation ignores length


def test_a_long_gold_answer_is_not_penalized() -> None:
    gold = " ".join(f"word{n}" for n in range(30))
    assert reward("ao", f"Answer: it is {gold}", "graded", {**ROW, "answers": ["short", gold]}) == pytest.approx(1.1)


def test_citing_every_document_lowers_the_reward() -> None:
    every = f"Relevant documents: [DOC 0], [DOC 1], [DOC 2]\n{ANSWER}"
    assert reward("id", every) == 1
    assert reward("id", every, "graded") == pytest.approx(0.5 + 1 + rewards.FORMAT_REWARD)
    # F2 at precision 1/3 and recall 1: LongRLVR favours recall.
    f2 = 5 * (1 / 3) / (4 / 3 + 1)
    assert reward("longrlvr", every) == pytest.approx(1 + 0.1 * f2 + 0.9 * f2)
    assert reward("longrlvr", every.replace("Ole Vinter", "Jörg")) == pytest.approx(0.1 * f2)


def test_documents_cited_after_the_answer_do_not_count() -> None:
    assert reward("id", f"{ANSWER} [DOC 1]") == 1
    assert reward("id", ANSWER, "graded") == pytest.approx(1 - rewards.FORMAT_REWARD)
    assert reward("longrlvr", ANSWER) == 1


def test_minus_one_cites_no_document_and_is_correct_without_gold() -> None:
    none = f"Relevant documents: [DOC -1]\n{ANSWER}"
    for variant, format_reward in (("paper", 0.0), ("graded", rewards.FORMAT_REWARD)):
        assert reward("id", none, variant, NO_GOLD) == pytest.approx(2 + format_reward)  # type: ignore[arg-type]
        assert reward("id", none, variant) == pytest.approx(1 + format_reward)  # type: ignore[arg-type]
    assert reward("longrlvr", none, row=NO_GOLD) == 2
    assert reward("id", f"[DOC -1], [DOC 1]\n{ANSWER}") == 2  # the cited document counts
    assert reward("id", f"[DOC 99]\n{ANSWER}") == 1


def test_copies_must_be_exact_in_the_paper_and_similar_in_graded() -> None:
    rough = BEST["idc"].replace("over the river Orne", "over the river Oder")
    assert reward("idc", rough) == 2
    assert reward("idc", rough, "graded") == pytest.approx(3.1)
    half = f"[DOC 1] Ole Vinter built the Lindmark bridge\n{ANSWER}"
    assert reward("idc", half, "graded") == pytest.approx(2.1)
    one_of_two = reward("idc", BEST["idc"], "graded", TWO)
    assert one_of_two == pytest.approx(2 / 3 + 2 / 3 + 1 + rewards.FORMAT_REWARD)


def test_copying_the_whole_context_has_a_lower_reward_than_copying_the_gold() -> None:
    assert reward("idc", f"{CONTEXT}\n{ANSWER}") == 1
    assert reward("idc", f"{CONTEXT}\n{ANSWER}", "graded") == pytest.approx(0.5 + 0.5 + 1 + rewards.FORMAT_REWARD)
    under_one_tag = f"[DOC 1] {' '.join(TEXTS)}\n{ANSWER}"
    assert reward("idc", under_one_tag) == 3  # an exploit of the equation
    assert reward("idc", under_one_tag, "graded") == pytest.approx(2.1)
    as_answer = "Answer: " + " ".join(TEXTS)
    assert reward("ao", as_answer) == 1
    assert reward("ao", as_answer, "graded") < 0.4
    twice = f"[DOC 1] {TEXTS[1]}\n{BEST['idc']}"
    assert reward("idc", twice, "graded") < reward("idc", BEST["idc"], "graded")


def test_a_quote_must_occur_in_the_gold_document_it_cites() -> None:
    assert reward("idq", BEST["idq"].replace("[DOC 1]", "[DOC 2]")) == 1
    assert reward("idq", f'[DOC 1] "Ole Vinter built"\n[DOC 0] "nine days of"\n{ANSWER}', row=TWO) == 2
    near = BEST["idq"].replace("Lindmark", "Lindmarck")
    assert reward("idq", near) == 2
    assert reward("idq", near, "graded") == pytest.approx(3.1)
    one_of_two = f'[DOC 1] "Ole Vinter built the Lindmark bridge"\n[DOC 0] "invented words here"\n{ANSWER}'
    assert reward("idq", one_of_two, "graded", TWO) == pytest.approx(0.5 + 1 + 1 + rewards.FORMAT_REWARD)


def test_a_quote_of_one_letter_counts_in_the_paper_but_not_in_graded() -> None:
    letter = f'[DOC 1] "e"\n{ANSWER}'
    assert reward("idq", letter) == 3
    assert reward("idq", letter, "graded") == pytest.approx(2.1)


def test_a_quote_longer_than_thirty_tokens_does_not_count() -> None:
    long = " ".join(f"word{n}" for n in range(31))
    row = {**ROW, "docs": [{"pid": "p1", "title": "", "text": long}]}
    too_long, longest = f'[DOC 0] "{long}"\n{ANSWER}', f'[DOC 0] "{long.rsplit(" ", 1)[0]}"\n{ANSWER}'
    assert (reward("idq", too_long, row=row), reward("idq", longest, row=row)) == (2, 3)
    assert reward("idq", too_long, "graded", row) == pytest.approx(2 - rewards.FORMAT_REWARD)
    assert reward("idq", longest, "graded", row) == pytest.approx(3 + rewards.FORMAT_REWARD)


@pytest.mark.parametrize("variant", get_args(Variant))
def test_non_ascii_letters_are_normalised_as_in_the_metrics(variant: Variant) -> None:
    row = {**ROW, "answers": ["Jörg Ångström"], "gold_pids": ["p2"]}
    output = "[DOC 2] “Zürich mayor Jörg Ångström closed”\nThe answer is: **jörg ångström**"
    assert reward("idq", output, variant, row) >= 3
    assert reward("idq", output.replace("ö", "o"), variant, row) < 2.9
    chinese = {**ROW, "answers": ["東京"]}
    assert reward("ao", "Answer: 東京", variant, chinese) >= 1
    assert reward("ao", "Answer: 京都", variant, chinese) <= rewards.FORMAT_REWARD


def test_two_way_substring_matches_whole_words_of_the_gold_answer() -> None:
    row = {**ROW, "answers": ["the University of Western Ontario"]}
    for answer, paper, graded in (
        ("Western Ontario", 1, 0.5),
        ("It is the University of Western Ontario, I think", 1, 1),
        ("e", 0, 0),
        ("Ontario Western", 0, 0),
        ("the", 0, 0),
    ):
        assert reward("loongrl", f"Answer: {answer}", row=row) == paper
        assert reward("loongrl", f"Answer: {answer}", "graded", row) == graded
    assert reward("loongrl", "Western Ontario", row=row) == 0
    assert reward("loongrl", "Western Ontario", row=row, answer="raw") == 1


@given(st.sampled_from([*BEST.values(), CONTEXT, ANSWER, "Answer: Ole"]), st.text(max_size=30), st.sampled_from(NAMES))
def test_paper_parts_are_the_metrics_of_the_tasks_and_graded_parts_are_bounded(
    start: str, rest: str, name: Any
) -> None:
    output = start + rest
    parts = Reward(name=name).parts(ROW, output, 0.0)
    scores = scoring.quoted_results(ROW, [output]) if name == "idq" else scoring.cited_results(ROW, [output])
    if name in ("ao", "id", "idq", "rj", "longrlvr"):
        assert parts["answer"] == scores["subem"] * scores["parse_rate"]
    if name in ("id", "idq"):
        assert parts["ids"] == scores["ids_exact"]
    graded = Reward(name=name, variant="graded").parts(ROW, output, 0.0)
    assert all(value is not None and -rewards.FORMAT_REWARD <= value <= 1 for value in graded.values())


@pytest.mark.parametrize(
    ("field", "value", "near"),
    [("name", "idqs", "did you mean idq"), ("variant", "grade", "graded"), ("answer", "all", "raw")],
)
def test_an_unknown_reward_is_an_error_with_the_valid_names(field: str, value: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        Reward(**{"name": "ao", field: value})  # type: ignore[arg-type]


def test_an_unjudged_output_receives_the_mean_j_of_its_group() -> None:
    parts: list[rewards.Parts] = [
        {"judge": 3.0, "answer": 1.0},
        {"judge": None, "answer": 1.0},
        {"judge": 1.0, "answer": 0.0},
        {"judge": None, "answer": 1.0},
        {"judge": None, "answer": 0.0},
    ]
    sums = totals(parts, ["a", "a", "a", "b", "b"])
    assert sums == [4, 1 + 2, 1, 1, 0]  # the mean J of its group, or no J if the group has none
    assert sums[1] != 1  # the total with J = 0


def test_an_unjudged_output_without_other_parts_has_no_reward() -> None:
    judged = Reward(name="rj", variant="graded")
    parts = [judged.parts(ROW, BEST["rj"], j) for j in (3.0, None)]
    assert parts == [{"judge": 3.0}, {"judge": None}]
    assert totals(parts, ["a", "a"]) == [3, None]


def test_the_judge_client_grades_outputs_and_counts_failures(tmp_path: Path) -> None:
    class Failing(RuleJudge):
        def ask(self, rubric: Any, case: Any, prompt: Any) -> Any:
            reply = super().ask(rubric, case, prompt)
            return reply if "Turku" not in case.solution else type(reply)("I would rather not say")

    with Store(tmp_path / "replies.sqlite") as store:
        grader = Grader(Client(Failing(), store))
        outputs = [BEST["rj"], BEST["rj"].replace("[DOC 1]", "[DOC 0]"), "The answer is: Turku", ""]
        assert grader([ROW] * 4, outputs) == [3, 2, None, 0]
    assert grader.unjudged == {"unparsable": 1}
