"""A judge that is a rule: deterministic, free, and a reference that a model must beat. It is labelled as what it is.

It compares words and figures and understands nothing: a right answer in other words is wrong to it, and reasoning is
"good" if it is there at all.
"""

from __future__ import annotations

import json
import re

from lceval.judge.judges import RefusedError
from lceval.judge.rubrics import Case, Label, Prompt, Rubric
from lceval.judge.store import Reply
from lceval.tasks.finance.numbers import TOLERANCE, Number, gold_number, numbers
from lceval.tasks.mc.letters import stated_letter
from lceval.tasks.parsing import before_answer, document_ids, extract, normalize, without_thinking
from lceval.tasks.scoring import citation_metrics, f1, subem

LABEL = "rule-based"
VERSION = "1"

_CLOSED = ("yes", "no")
_WORDS_AGREE = 0.5
"""Token F1 from which two texts say the same to this judge."""

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
    """See the module."""

    name = "rule"
    revision = VERSION
    label = LABEL
    parallel = False
    priced = False

    def close(self) -> None:
        """Nothing to let go."""

    def ask(self, rubric: Rubric, case: Case, prompt: Prompt) -> Reply:
        """The reply that the rubric asks for, decided by rules."""
        said = without_thinking(case.solution)
        if rubric.rubric == "loong":
            return Reply(f"{LABEL}: token overlap with the reference. Rating: [[{_rating(said, case)}]]")
        rules = {"financebench": _financebench, "rj": _criteria, "choice": _choice, "relevance": _relevance}
        if rubric.rubric not in rules:
            raise RefusedError(f"no rule for the rubric {rubric.rubric}")
        return Reply(json.dumps(rules[rubric.rubric](said, case)))


def agrees(said: str, gold: str) -> bool:
    """Whether an answer holds the figure that the gold is, else its yes or no, else its words."""
    if expected := gold_number(gold):
        return any(_close(number, expected) for number in numbers(said))
    first = normalize(gold).split(" ", 1)[0]
    if first in _CLOSED:
        words = normalize(said).split()
        given = next((word for word in words if word in _CLOSED), None)
        return given == first
    if subem(said, [gold]):
        return True
    if told := _figures(gold):
        return all(any(_close(number, one) for number in numbers(said)) for one in told)
    return max(f1(part, [gold]) for part in [said, *_SENTENCE.split(said)]) >= _WORDS_AGREE


def _figures(gold: str) -> list[Number]:
    """The figures of a sentence; bare years say when, not what."""
    return [number for number in numbers(gold) if not number.is_year]


def _close(number: Number, gold: Number) -> bool:
    """Equal at the precision that the gold is printed with, or within 1%; a unit that one side lacks is ignored."""
    step = 0.5 * 10.0**-gold.decimals * (1 + 1e-9)
    pairs = [(number.value, gold.value, gold.unit)]
    if number.unit == 1 or gold.unit == 1:
        pairs.append((number.written, gold.written, 1.0))
    return any(
        abs(one - other) <= max(step * unit if gold.decimals else 0.0, TOLERANCE * abs(other))
        for one, other, unit in pairs
    )


def declines(said: str) -> bool:
    """Whether an answer says that it gives none."""
    return not said.strip() or _DECLINES.search(said) is not None


def _financebench(said: str, case: Case) -> dict[str, Label]:
    right = any(agrees(said, gold) for gold in case.gold)
    refuses = declines(said)
    return {"verdict": "refusal" if refuses and not right else "correct" if right else "incorrect"}


def _criteria(said: str, case: Case) -> dict[str, Label]:
    reasoning = before_answer(said).strip() if extract(said).parsed else ""
    named = document_ids(before_answer(said))
    cited = citation_metrics(named, set(case.gold_ids))
    right = any(agrees(extract(said).answer, gold) for gold in case.gold)
    return {
        "reasoning": int(len(reasoning.split()) >= 5),
        "grounding": int(cited["ids_recall"] == 1 and cited["ids_precision"] >= 0.5),
        "answer": int(right),
    }


def _choice(said: str, case: Case) -> dict[str, Label]:
    letter = stated_letter(said) or (said.strip(" .()*") if said.strip(" .()*") in [*"ABCD"] else None)
    if letter is None:
        held = [mark for mark, text in zip("ABCD", case.choices, strict=False) if subem(said, [text])]
        letter = held[0] if len(held) == 1 else None
    return {"letter": letter or "none"}


def _relevance(said: str, case: Case) -> dict[str, Label]:
    """A document that holds an answer, or half of the question's words, is evidence to this judge."""
    text = "\n".join(case.documents)
    asked, told = set(normalize(case.question).split()), set(normalize(text).split())
    return {"relevant": int(bool(subem(text, case.gold)) or len(asked & told) >= _WORDS_AGREE * len(asked))}


def _rating(said: str, case: Case) -> int:
    return max(1, round(100 * max((f1(said, [gold]) for gold in case.gold), default=0.0)))
