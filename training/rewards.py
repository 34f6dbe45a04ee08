"""Rewards: pure functions of a row and an output, built on the metrics of the tasks.

A reward is a sum of named parts, which are logged separately. With A = SubEM of the answer, I = the cited documents and
D* = the gold documents (Exploring Fine-Tuning for In-Context Retrieval, arXiv 2601.18527):

    name      paper                                              graded
    ao        A                                                  A' + f
    id        1[I = D*] + A                                      F1(I, D*) + A' + f
    idc       1[copies are the gold documents] + 1[I = D*] + A   F1(copies, D*) + F1(I, D*) + A' + f
    idq       1[quotes stand in gold documents] + 1[I = D*] + A  F1(quotes, D*) + F1(I, D*) + A' + f
    rj        J + A                                              J
    longrlvr  A + 0.1 F2 + 0.9 A F2   (arXiv 2603.02146)         the same with A'
    loongrl   1[gold in answer or answer in gold]  (2510.19363)  the second weighted by its share of the gold's words

`paper` implements the equations, including what a policy can exploit (a quote of one letter, the whole context as the
answer). `graded` gives partial credit and closes these exploits: A' decreases with the length of the answer, f is +0.1
for the requested output format and -0.1 otherwise, and copies and quotes may differ in a fifth of their words. The
paper does not specify whether A is computed on the answer or on the whole output. Here it is the answer, and an output
without an answer line has none; with `answer="raw"` it is the whole output, in both variants.

J is the sum of the three grades of a judge, or None without grades, which does not count as 0: see `totals`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any, Literal, get_args

from lceval.core.errors import UserError
from lceval.tasks import parsing, scoring
from lceval.tasks.parsing import normalize
from lceval.tasks.scoring import gold_places

Name = Literal["ao", "id", "idc", "idq", "rj", "longrlvr", "loongrl"]
Variant = Literal["paper", "graded"]
Answer = Literal["extracted", "raw"]
NAMES: tuple[str, ...] = get_args(Name)
JUDGE = "judge"
"""The part computed from a judge's grades."""

FORMAT_REWARD = 0.1
"""Added for the requested output format, subtracted for any other (graded)."""
FUZZY = 0.8
"""Minimum similarity of copied or quoted words to the document (graded)."""
QUOTE_TOKENS = 30
"""Maximum length of a quote in words and punctuation marks, a lower bound of its tokens."""
QUOTE_WORDS = 3
"""Minimum length of a quote in words (graded): a single letter occurs in every document."""
ANSWER_WORDS = 10
"""Maximum length of an answer without a penalty, or three times the gold answer's (graded)."""

Row = Mapping[str, Any]
Parts = dict[str, float | None]
Grader = Callable[[Sequence[Row], Sequence[str]], Sequence[float | None]]
"""Returns J per output: 0 to 3, or None without grades."""

_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward by name; the module docstring defines each.

    Attributes:
        answer: input of SubEM: the extracted answer, or the raw output.
    """

    name: Name
    variant: Variant = "paper"
    answer: Answer = "extracted"

    def __post_init__(self) -> None:
        for field, allowed in (("name", NAMES), ("variant", get_args(Variant)), ("answer", get_args(Answer))):
            value = getattr(self, field)
            if value not in allowed:
                near = get_close_matches(str(value), allowed, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise UserError(f"unknown reward {field}={value!r}: expected one of {', '.join(allowed)}{hint}")

    @property
    def judged(self) -> bool:
        """Whether it requires a judge."""
        return self.name == "rj"

    def parts(self, row: Row, output: str, j: float | None = None) -> Parts:
        """The parts of an output's reward; the reward is their sum.

        Args:
            row: row of a task with numbered documents; uses `answers`, `docs` and `gold_pids`.
            output: raw model output.
            j: the judge's J, for a judged reward; None: no grades.
        """
        return _PARTS[self.name](self, row, output, j)

    def _graded(self) -> bool:
        return self.variant == "graded"

    def _answer(self, row: Row, output: str) -> float:
        """A, or A' if graded."""
        answer, parsed = (output, True) if self.answer == "raw" else parsing.extract(output)
        score = scoring.subem(answer, row["answers"]) if parsed else 0.0
        return score * brevity(answer, row["answers"]) if self._graded() else score

    def _format(self, correct: bool) -> Parts:
        """f, if graded."""
        return {"form": FORMAT_REWARD if correct else -FORMAT_REWARD} if self._graded() else {}


def _ao(reward: Reward, row: Row, output: str, _: float | None) -> Parts:
    reply = parsing.without_thinking(output)
    answer_only = "\n" not in reply and not parsing.before_answer(output).strip(" *_`")
    return {"answer": reward._answer(row, output)} | reward._format(answer_only and parsing.extract(output).parsed)


def _id(reward: Reward, row: Row, output: str, _: float | None) -> Parts:
    return _cited(reward, row, output, scoring.cited_results(row, [output]), {})


def _idc(reward: Reward, row: Row, output: str, _: float | None) -> Parts:
    scores = scoring.copied_results(row, [output])
    content = copies_f1(row, output) if reward._graded() else scores["content"]
    return _cited(reward, row, output, scores, {"content": content})


def _idq(reward: Reward, row: Row, output: str, _: float | None) -> Parts:
    scores = scoring.quoted_results(row, [output])
    quotes = parsing.quotes(parsing.before_answer(output))
    short = all(len(_TOKEN.findall(quote.text)) <= QUOTE_TOKENS for quote in quotes)
    part = quotes_f1(row, output) if reward._graded() else float(short and scores["quotes"] == 1)
    return _cited(reward, row, output, scores, {"quotes": part}, correct_format=short)


def _cited(
    reward: Reward, row: Row, output: str, scores: Mapping[str, float], evidence: Parts, *, correct_format: bool = True
) -> Parts:
    """The parts shared by all output formats that cite documents."""
    ids = scores["ids_f1"] if reward._graded() else scores["ids_exact"]
    before = parsing.before_answer(output)
    once = parsing.before_answer(before) == before.strip() and parsing.extract(output).parsed
    return {
        **evidence,
        "ids": ids,
        "answer": reward._answer(row, output),
        **reward._format(correct_format and once and bool(scores["ids_rate"])),
    }


def _rj(reward: Reward, row: Row, output: str, j: float | None) -> Parts:
    answer: Parts = {} if reward._graded() else {"answer": reward._answer(row, output)}
    return {JUDGE: j, **answer}


def _longrlvr(reward: Reward, row: Row, output: str, _: float | None) -> Parts:
    ids = scoring.cited_results(row, [output])
    precision, recall = ids["ids_precision"], ids["ids_recall"]
    # F_b = (1 + b^2) P R / (b^2 P + R) with b = 2
    f2 = 5 * precision * recall / (4 * precision + recall) if precision and recall else 0.0
    answer = reward._answer(row, output)
    return {"answer": answer, "context": 0.1 * f2 + 0.9 * answer * f2}


def _loongrl(reward: Reward, row: Row, output: str, _: float | None) -> Parts:
    answer, parsed = (output, True) if reward.answer == "raw" else parsing.extract(output)
    within = answer_within_gold(answer, row["answers"]) if parsed else 0.0
    credit = within if reward._graded() else float(within > 0)
    return {"answer": max(reward._answer(row, output), credit)}


_PARTS: dict[str, Callable[[Reward, Row, str, float | None], Parts]] = {
    "ao": _ao,
    "id": _id,
    "idc": _idc,
    "idq": _idq,
    "rj": _rj,
    "longrlvr": _longrlvr,
    "loongrl": _loongrl,
}


def brevity(answer: str, gold_answers: Sequence[str]) -> float:
    """1 up to ANSWER_WORDS words or three times the longest gold answer, then inversely proportional to the length."""
    allowed = max(ANSWER_WORDS, 3 * max((len(normalize(gold).split()) for gold in gold_answers), default=0))
    return min(1.0, allowed / max(1, len(normalize(answer).split())))


def answer_within_gold(answer: str, gold_answers: Sequence[str]) -> float:
    """Share of a gold answer's words covered by the answer, if it occurs in it as whole words; else 0.

    LoongRL compares characters, so a single letter is sufficient.
    """
    words = normalize(answer).split()
    golds = (normalize(gold).split() for gold in gold_answers)
    inside = (
        len(words) / len(gold)
        for gold in golds
        if any(gold[start : start + len(words)] == words for start in range(len(gold) - len(words) + 1))
    )
    return max(inside, default=0.0) if words else 0.0


def copies_f1(row: Row, output: str) -> float:
    """F1 of the copied documents: a copy is correct if its similarity to a gold document is at least FUZZY."""
    texts, gold = [normalize(document["text"]).split() for document in row["docs"]], gold_places(row)
    copies = parsing.passages(parsing.before_answer(output))
    correct = {place for place, text in copies if place in gold and _similar(normalize(text).split(), texts[place])}
    return _f1(len(correct), len(copies), len(gold))


def quotes_f1(row: Row, output: str) -> float:
    """Harmonic mean of the share of correct quotes and the share of gold documents with a correct quote.

    A quote is correct if it has QUOTE_WORDS words to QUOTE_TOKENS tokens and a window of the cited gold document is
    similar to it by FUZZY.
    """
    texts, gold = [normalize(document["text"]).split() for document in row["docs"]], gold_places(row)
    quotes = parsing.quotes(parsing.before_answer(output))
    correct = [place for place, text in quotes if place in gold and _quotes(text, texts[place])]
    if not correct:
        return 0.0
    precision, recall = len(correct) / len(quotes), len({*correct}) / len(gold)
    return 2 * precision * recall / (precision + recall)


def _quotes(text: str, document: Sequence[str]) -> bool:
    words = normalize(text).split()
    if len(words) < QUOTE_WORDS or len(_TOKEN.findall(text)) > QUOTE_TOKENS:
        return False
    windows = range(max(1, len(document) - len(words) + 1))
    return any(_similar(words, document[start : start + len(words)]) for start in windows)


def _similar(one: Sequence[str], other: Sequence[str]) -> bool:
    if one == other:
        return True
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    # Cheap upper bounds first.
    return all(ratio() >= FUZZY for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio))


def _f1(hits: int, predicted: int, gold: int) -> float:
    return 2 * hits / (predicted + gold) if predicted + gold else 0.0


def totals(parts: Sequence[Parts], groups: Sequence[Hashable]) -> list[float | None]:
    """The reward of each output: the sum of its parts.

    An output without grades receives the mean J of the judged outputs of its group (the samples of one prompt), which
    gives it no advantage from J. If no output of a group is judged, J is omitted for all of them. An output without any
    part is None; TRL excludes it from the group and the loss.
    """
    judged: dict[Hashable, list[float]] = {}
    for part, group in zip(parts, groups, strict=True):
        if (j := part.get(JUDGE)) is not None:
            judged.setdefault(group, []).append(j)
    sums: list[float | None] = []
    for part, group in zip(parts, groups, strict=True):
        known = [value for value in part.values() if value is not None]
        if known and JUDGE in part and part[JUDGE] is None and group in judged:
            known.append(math.fsum(judged[group]) / len(judged[group]))
        sums.append(math.fsum(known) if known else None)
    return sums
