"""The rule-based judge: correct answers, reasoning and relevance."""

from __future__ import annotations

from typing import Any

import pytest

from lceval.judge import rubrics, verdicts
from lceval.judge.backends import rule
from lceval.judge.rubrics import Case, Prompt


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("It was $1,577 million.", "1577", True),
        ("It was $1,580 million, about.", "1577", True),
        ("It was $1,677 million.", "1577", False),
        ("Capex was $8.70 billion", "8.7", True),
        ("The margin is 6.24%.", "0.062", True),
        ("Yes, it did.", "Yes. It grew by 3%.", True),
        ("No.", "Yes. It grew by 3%.", False),
        ("Ulta made no acquisitions then", "Ulta made no acquisitions", True),
        ("Nike opened shops", "Ulta made no acquisitions", False),
    ],
)
def test_the_rule_compares_numbers_yes_or_no_and_words(answer: str, gold: str, right: bool) -> None:
    assert rule.agrees(answer, gold) == right


def test_the_rule_grades_citations_answer_and_presence_of_reasoning() -> None:
    prompt, rj = Prompt("", ""), rubrics.load("rj")

    def grades(solution: str) -> Any:
        case = Case("Q?", ("Paris",), solution, gold_ids=(2,))
        return verdicts.parse(rj, rule.RuleJudge().ask(rj, case, prompt).text)

    full = "Document review: [DOC 2] names the capital of the country.\nThe answer is: Paris"
    assert grades(full) == {"reasoning": 1, "grounding": 1, "answer": 1}
    assert grades(full.replace("DOC 2", "DOC 1"))["grounding"] == 0
    assert grades("The answer is: Rome") == {"reasoning": 0, "grounding": 0, "answer": 0}


@pytest.mark.parametrize(
    ("passage", "relevant"),
    [
        ("Paris lies on the Seine.", 1),  # an answer
        ("A capital is a city; of France there is one.", 1),  # half of the words
        ("Rome lies on the Tiber.", 0),
    ],
)
def test_the_rule_grades_relevance_by_the_gold_answer_or_the_words_of_the_question(passage: str, relevant: int) -> None:
    case = Case("What is the capital of France?", ("Paris",), "", (passage,))
    reply = rule.RuleJudge().ask(rubrics.load("relevance"), case, Prompt("", ""))
    assert verdicts.parse(rubrics.load("relevance"), reply.text) == {"relevant": relevant}
