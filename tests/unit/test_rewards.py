"""Rewards of outputs, above all of those that want the reward and not the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.errors import UserError
from lceval.judge.client import Client
from lceval.judge.grader import Grader
from lceval.judge.rule import RuleJudge
from lceval.judge.store import Store
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


def worth(name: Any, output: str, variant: Variant = "paper", row: Any = ROW, **more: Any) -> float:
    """An output's reward; J, where there is one, is 3."""
    made = totals([Reward(name=name, variant=variant, **more).parts(row, output, 3.0)], [0])[0]
    assert made is not None
    return made


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
def test_the_output_that_was_asked_for_is_worth_most(name: str, paper: float, graded: float) -> None:
    assert worth(name, BEST[name]) == pytest.approx(paper)
    assert worth(name, BEST[name], "graded") == pytest.approx(graded)
    wrong = BEST[name].replace("Ole Vinter", "Jörg").replace("[DOC 1]", "[DOC 2]")
    if name != "rj":  # whose J is given here
        assert worth(name, wrong) == 0
        assert worth(name, wrong, "graded") in (0, pytest.approx(rewards.FORM))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", get_args(Variant))
def test_nothing_said_earns_nothing(name: Any, variant: Variant) -> None:
    for output in ("", "  \n", "<think>Ole Vinter [DOC 1]\nAnswer: Ole Vinter", "Answer:", "<think></think>"):
        parts = Reward(name=name, variant=variant).parts(ROW, output)
        assert all(value is None or value <= 0 for value in parts.values()), parts


@pytest.mark.parametrize("variant", get_args(Variant))
def test_an_answer_only_thought_of_was_not_given(variant: Variant) -> None:
    thought = "<think>It says [DOC 1]. Answer: Ole Vinter</think>\n"
    assert worth("id", thought + "[DOC 0]\nThe answer is: Jörg", variant) <= rewards.FORM
    assert worth("id", thought + BEST["id"], variant) == worth("id", BEST["id"], variant)
    assert worth("ao", "It says so.</think>" + BEST["ao"], variant) == worth("ao", BEST["ao"], variant)
    assert worth("ao", thought + "Answer: Jörg", variant, answer="raw") >= 0.9  # the whole output is read, thoughts too


def test_an_answer_without_its_line_is_none_unless_the_whole_output_is_read() -> None:
    for output in ("Ole Vinter", "I would say that Ole Vinter built it.", CONTEXT):
        assert worth("ao", output) == 0
        assert worth("ao", output, answer="raw") == 1
        assert worth("ao", output, "graded") == -rewards.FORM


def test_the_last_of_several_answers_counts_and_the_form_is_lost() -> None:
    both = "Answer: Jörg\nAnswer: Ole Vinter"
    assert worth("ao", both) == 1
    assert worth("ao", both, "graded") == pytest.approx(1 - rewards.FORM)
    assert worth("ao", "Answer: Ole Vinter\nAnswer: Jörg") == 0
    assert worth("id", f"{BEST['id']}\nThe answer is: Ole Vinter", "graded") == pytest.approx(2 - rewards.FORM)


def test_a_list_of_answers_pays_less_the_longer_it_is() -> None:
    names = [f"Name{n}" for n in range(40)]
    pays = [worth("ao", f"Answer: {', '.join([*names[:n], 'Ole Vinter'])}", "graded") for n in (0, 8, 18, 38)]
    assert pays == pytest.approx([1.1, 1.1, 0.6, 0.35])
    assert worth("ao", f"Answer: {', '.join([*names, 'Ole Vinter'])}") == 1  # the equation does not mind


def test_a_long_gold_answer_may_be_given_whole() -> None:
    gold = " ".join(f"word{n}" for n in range(30))
    assert worth("ao", f"Answer: it is {gold}", "graded", {**ROW, "answers": ["short", gold]}) == pytest.approx(1.1)


def test_naming_every_document_is_wrong_by_the_paper_and_cheap_by_the_grades() -> None:
    every = f"Relevant documents: [DOC 0], [DOC 1], [DOC 2]\n{ANSWER}"
    assert worth("id", every) == 1
    assert worth("id", every, "graded") == pytest.approx(0.5 + 1 + rewards.FORM)
    # F2 of a third and all: LongRLVR prizes recall
    f2 = 5 * (1 / 3) / (4 / 3 + 1)
    assert worth("longrlvr", every) == pytest.approx(1 + 0.1 * f2 + 0.9 * f2)
    assert worth("longrlvr", every.replace("Ole Vinter", "Jörg")) == pytest.approx(0.1 * f2)


def test_documents_named_after_the_answer_or_none_at_all_are_not_named() -> None:
    assert worth("id", f"{ANSWER} [DOC 1]") == 1
    assert worth("id", ANSWER, "graded") == pytest.approx(1 - rewards.FORM)
    assert worth("longrlvr", ANSWER) == 1


def test_minus_one_names_no_document_and_is_right_where_there_is_none() -> None:
    none = f"Relevant documents: [DOC -1]\n{ANSWER}"
    for variant, output_format in (("paper", 0.0), ("graded", rewards.FORM)):
        assert worth("id", none, variant, NO_GOLD) == pytest.approx(2 + output_format)  # type: ignore[arg-type]
        assert worth("id", none, variant) == pytest.approx(1 + output_format)  # type: ignore[arg-type]
    assert worth("longrlvr", none, row=NO_GOLD) == 2
    assert worth("id", f"[DOC -1], [DOC 1]\n{ANSWER}") == 2  # what is named counts
    assert worth("id", f"[DOC 99]\n{ANSWER}") == 1


def test_copies_count_word_for_word_by_the_paper_and_roughly_by_the_grades() -> None:
    rough = BEST["idc"].replace("over the river Orne", "over the river Oder")
    assert worth("idc", rough) == 2
    assert worth("idc", rough, "graded") == pytest.approx(3.1)
    half = f"[DOC 1] Ole Vinter built the Lindmark bridge\n{ANSWER}"
    assert worth("idc", half, "graded") == pytest.approx(2.1)
    one_of_two = worth("idc", BEST["idc"], "graded", TWO)
    assert one_of_two == pytest.approx(2 / 3 + 2 / 3 + 1 + rewards.FORM)


def test_copying_the_whole_context_is_worth_less_than_copying_the_gold() -> None:
    assert worth("idc", f"{CONTEXT}\n{ANSWER}") == 1
    assert worth("idc", f"{CONTEXT}\n{ANSWER}", "graded") == pytest.approx(0.5 + 0.5 + 1 + rewards.FORM)
    under_one_tag = f"[DOC 1] {' '.join(TEXTS)}\n{ANSWER}"
    assert worth("idc", under_one_tag) == 3  # the equation's own gap
    assert worth("idc", under_one_tag, "graded") == pytest.approx(2.1)
    as_answer = "Answer: " + " ".join(TEXTS)
    assert worth("ao", as_answer) == 1
    assert worth("ao", as_answer, "graded") < 0.4
    twice = f"[DOC 1] {TEXTS[1]}\n{BEST['idc']}"
    assert worth("idc", twice, "graded") < worth("idc", BEST["idc"], "graded")


def test_a_quote_counts_inside_the_gold_document_it_names() -> None:
    assert worth("idq", BEST["idq"].replace("[DOC 1]", "[DOC 2]")) == 1
    assert worth("idq", f'[DOC 1] "Ole Vinter built"\n[DOC 0] "nine days of"\n{ANSWER}', row=TWO) == 2
    near = BEST["idq"].replace("Lindmark", "Lindmarck")
    assert worth("idq", near) == 2
    assert worth("idq", near, "graded") == pytest.approx(3.1)
    one_of_two = f'[DOC 1] "Ole Vinter built the Lindmark bridge"\n[DOC 0] "invented words here"\n{ANSWER}'
    assert worth("idq", one_of_two, "graded", TWO) == pytest.approx(0.5 + 1 + 1 + rewards.FORM)


def test_a_quote_of_a_letter_passes_the_equation_and_not_the_grades() -> None:
    letter = f'[DOC 1] "e"\n{ANSWER}'
    assert worth("idq", letter) == 3
    assert worth("idq", letter, "graded") == pytest.approx(2.1)


def test_a_quote_longer_than_thirty_tokens_is_none() -> None:
    long = " ".join(f"word{n}" for n in range(31))
    row = {**ROW, "docs": [{"pid": "p1", "title": "", "text": long}]}
    whole, most = f'[DOC 0] "{long}"\n{ANSWER}', f'[DOC 0] "{long.rsplit(" ", 1)[0]}"\n{ANSWER}'
    assert (worth("idq", whole, row=row), worth("idq", most, row=row)) == (2, 3)
    assert worth("idq", whole, "graded", row) == pytest.approx(2 - rewards.FORM)
    assert worth("idq", most, "graded", row) == pytest.approx(3 + rewards.FORM)


@pytest.mark.parametrize("variant", get_args(Variant))
def test_letters_beyond_ascii_are_read_as_the_scores_read_them(variant: Variant) -> None:
    row = {**ROW, "answers": ["Jörg Ångström"], "gold_pids": ["p2"]}
    said = "[DOC 2] “Zürich mayor Jörg Ångström closed”\nThe answer is: **jörg ångström**"
    assert worth("idq", said, variant, row) >= 3
    assert worth("idq", said.replace("ö", "o"), variant, row) < 2.9
    chinese = {**ROW, "answers": ["東京"]}
    assert worth("ao", "Answer: 東京", variant, chinese) >= 1
    assert worth("ao", "Answer: 京都", variant, chinese) <= rewards.FORM


def test_two_way_substring_takes_a_part_of_the_gold_in_whole_words() -> None:
    row = {**ROW, "answers": ["the University of Western Ontario"]}
    for said, paper, graded in (
        ("Western Ontario", 1, 0.5),
        ("It is the University of Western Ontario, I think", 1, 1),
        ("e", 0, 0),
        ("Ontario Western", 0, 0),
        ("the", 0, 0),
    ):
        assert worth("loongrl", f"Answer: {said}", row=row) == paper
        assert worth("loongrl", f"Answer: {said}", "graded", row) == graded
    assert worth("loongrl", "Western Ontario", row=row) == 0
    assert worth("loongrl", "Western Ontario", row=row, answer="raw") == 1


@given(st.sampled_from([*BEST.values(), CONTEXT, ANSWER, "Answer: Ole"]), st.text(max_size=30), st.sampled_from(NAMES))
def test_paper_parts_are_the_tasks_own_scores_and_no_output_breaks_a_reward(said: str, more: str, name: Any) -> None:
    output = said + more
    parts = Reward(name=name).parts(ROW, output, 0.0)
    scores = scoring.quoted_results(ROW, [output]) if name == "idq" else scoring.cited_results(ROW, [output])
    if name in ("ao", "id", "idq", "rj", "longrlvr"):
        assert parts["answer"] == scores["subem"] * scores["parse_rate"]
    if name in ("id", "idq"):
        assert parts["ids"] == scores["ids_exact"]
    graded = Reward(name=name, variant="graded").parts(ROW, output, 0.0)
    assert all(value is not None and -rewards.FORM <= value <= 1 for value in graded.values())


@pytest.mark.parametrize(
    ("field", "value", "near"),
    [("name", "idqs", "nearest: idq"), ("variant", "grade", "graded"), ("answer", "all", "raw")],
)
def test_an_unknown_reward_is_refused_with_what_there_is(field: str, value: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        Reward(**{"name": "ao", field: value})  # type: ignore[arg-type]


def test_an_unjudged_output_gains_and_loses_nothing_by_that() -> None:
    parts: list[rewards.Parts] = [
        {"judge": 3.0, "answer": 1.0},
        {"judge": None, "answer": 1.0},
        {"judge": 1.0, "answer": 0.0},
        {"judge": None, "answer": 1.0},
        {"judge": None, "answer": 0.0},
    ]
    made = totals(parts, ["a", "a", "a", "b", "b"])
    assert made == [4, 1 + 2, 1, 1, 0]  # the mean J of its own group, and none where no one has any
    assert made[1] != 1  # what a J of 0 would have made of it


def test_an_output_that_only_a_judge_rewards_is_left_out_without_one() -> None:
    reward = Reward(name="rj", variant="graded")
    parts = [reward.parts(ROW, BEST["rj"], j) for j in (3.0, None)]
    assert parts == [{"judge": 3.0}, {"judge": None}]
    assert totals(parts, ["a", "a"]) == [3, None]


def test_our_judge_client_grades_and_counts_what_it_could_not(tmp_path: Path) -> None:
    class Moody(RuleJudge):
        def ask(self, rubric: Any, case: Any, prompt: Any) -> Any:
            reply = super().ask(rubric, case, prompt)
            return reply if "Turku" not in case.solution else type(reply)("I would rather not say")

    with Store(tmp_path / "replies.sqlite") as store:
        grader = Grader(Client(Moody(), store))
        outputs = [BEST["rj"], BEST["rj"].replace("[DOC 1]", "[DOC 0]"), "The answer is: Turku", ""]
        assert grader([ROW] * 4, outputs) == [3, 2, None, 0]
    assert grader.unjudged == {"unparsable": 1}
