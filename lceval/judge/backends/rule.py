"""The rule-based judge: deterministic, free, and a baseline for model judges. It is always labelled as rule-based.

It compares words and numbers only: a correct paraphrase is graded incorrect, and any reasoning is graded good.
"""

from __future__ import annotations

import json
import re

from lceval.judge.protocol import RefusedError
from lceval.judge.replies import Reply
from lceval.judge.rubrics import Case, Label, Prompt, Rubric
from lceval.tasks.finance.numbers import TOLERANCE, Number, gold_number, numbers
from lceval.tasks.mc.letters import stated_letter
from lceval.tasks.parsing import before_answer, document_ids, extract, normalize, without_thinking
from lceval.tasks.scoring import citation_metrics, f1, subem

LABEL = "rule-based"
VERSION = "1"

_CLOSED = ("yes", "no")
_WORDS_AGREE = 0.5
"""Token F1 above which two texts count as equivalent."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_DECLINING = (
    r"i(?:'m| am) sorry",
    r"(?:can|could|am|is|are)(?:not|n't| not)(?: be)? "
    r"(?:able|possible|answer|determine|provide|find|calculate|access|available)",
    r"unable to",
    r"(?:does|do|did)(?:n't| not) (?:\w+ ){0,3}(?:provide|contain|include|have|specify|mention|disclose|state|give)",
    r"not (?:\w+ ){0,2}(?:provided|specified|available|mentioned|disclosed|included|enough|sufficient|possible)",
    r"insufficient",
    r"no (?:\w+ ){0,3}(?:information|data|mention)",
    r"you (?:would|will|'d) need",
    r"would need (?:to|more|access)",
    r"haven't provided",
)
_DECLINES = re.compile(rf"\b(?:{'|'.join(_DECLINING)})\b", re.IGNORECASE)


class RuleJudge:
    """The rule-based judge."""

    name = "rule"
    revision = VERSION
    label = LABEL
    parallel = False
    priced = False

    def close(self) -> None:
        """No resources to free."""

    def ask(self, rubric: Rubric, case: Case, prompt: Prompt) -> Reply:
        """A reply in the format of the rubric, decided by rules."""
        answer = without_thinking(case.solution)
        if rubric.rubric == "loong":
            return Reply(f"{LABEL}: token overlap with the reference. Rating: [[{_rating(answer, case)}]]")
        rules = {
            "financebench": _financebench,
            "equality": _equality,
            "rj": _criteria,
            "choice": _choice,
            "relevance": _relevance,
        }
        if rubric.rubric not in rules:
            raise RefusedError(f"no rule for the rubric {rubric.rubric}")
        return Reply(json.dumps(rules[rubric.rubric](answer, case)))


def agrees(answer: str, gold: str) -> bool:
    """Whether an answer contains the number of a numeric gold answer, else its yes or no, else its words."""
    if expected := gold_number(gold):
        return any(_close(number, expected) for number in numbers(answer))
    first = normalize(gold).split(" ", 1)[0]
    if first in _CLOSED:
        words = normalize(answer).split()
        return next((word for word in words if word in _CLOSED), None) == first
    if subem(answer, [gold]):
        return True
    # Bare years of a sentence are dates and not values.
    if expected_numbers := [number for number in numbers(gold) if not number.is_year]:
        return all(any(_close(number, one) for number in numbers(answer)) for one in expected_numbers)
    return max(f1(part, [gold]) for part in [answer, *_SENTENCE.split(answer)]) >= _WORDS_AGREE


def _close(number: Number, gold: Number) -> bool:
    """Equal at the printed precision of the gold number, or within 1%; a unit missing on one side is ignored."""
    step = 0.5 * 10.0**-gold.decimals * (1 + 1e-9)
    pairs = [(number.value, gold.value, gold.unit)]
    if number.unit == 1 or gold.unit == 1:
        pairs.append((number.written, gold.written, 1.0))
    return any(
        abs(one - other) <= max(step * unit if gold.decimals else 0.0, TOLERANCE * abs(other))
        for one, other, unit in pairs
    )


def _financebench(answer: str, case: Case) -> dict[str, Label]:
    if any(agrees(answer, gold) for gold in case.gold):
        return {"verdict": "correct"}
    return {"verdict": "refusal" if not answer.strip() or _DECLINES.search(answer) else "incorrect"}


def _equality(answer: str, case: Case) -> dict[str, Label]:
    return {"verdict": "correct" if any(agrees(answer, gold) for gold in case.gold) else "incorrect"}


def _criteria(solution: str, case: Case) -> dict[str, Label]:
    reasoning = before_answer(solution).strip() if extract(solution).parsed else ""
    cited = citation_metrics(document_ids(before_answer(solution)), set(case.gold_ids))
    right = any(agrees(extract(solution).answer, gold) for gold in case.gold)
    return {
        "reasoning": int(len(reasoning.split()) >= 5),
        "grounding": int(cited["ids_recall"] == 1 and cited["ids_precision"] >= 0.5),
        "answer": int(right),
    }


def _choice(answer: str, case: Case) -> dict[str, Label]:
    bare = answer.strip(" .()*")
    letter = stated_letter(answer) or (bare if bare in [*"ABCD"] else None)
    if letter is None:
        contained = [mark for mark, text in zip("ABCD", case.choices, strict=False) if subem(answer, [text])]
        letter = contained[0] if len(contained) == 1 else None
    return {"letter": letter or "none"}


def _relevance(answer: str, case: Case) -> dict[str, Label]:
    """A document with a gold answer, or with half of the question's words, is graded relevant."""
    text = "\n".join(case.documents)
    question, document = set(normalize(case.question).split()), set(normalize(text).split())
    overlap = len(question & document)
    return {"relevant": int(bool(subem(text, case.gold)) or overlap >= _WORDS_AGREE * len(question))}


def _rating(answer: str, case: Case) -> int:
    return max(1, round(100 * max((f1(answer, [gold]) for gold in case.gold), default=0.0)))
