"""What an output is worth in training: pure functions of a row and the text, built on the scores of the tasks.

A reward is a sum of named parts, so that a log can say which of them rose. With A = SubEM of the answer, I = the
documents named and D* the gold ones (Exploring Fine-Tuning for In-Context Retrieval, arXiv 2601.18527):

    name      paper                                              graded
    ao        A                                                  A' + f
    id        1[I = D*] + A                                      F1(I, D*) + A' + f
    idc       1[copies are the gold documents] + 1[I = D*] + A   F1(copies, D*) + F1(I, D*) + A' + f
    idq       1[quotes stand in gold documents] + 1[I = D*] + A  F1(quotes, D*) + F1(I, D*) + A' + f
    rj        J + A                                              J
    longrlvr  A + 0.1 F2 + 0.9 A F2   (arXiv 2603.02146)         the same with A'
    loongrl   1[gold in answer or answer in gold]  (2510.19363)  the second by the share of the gold's words

`paper` is the equations, with what they leave open to a model that wants reward and not to answer (a quote of one
letter, the whole context as the answer); `graded` gives credit for half-right outputs and closes those: A' falls with
the length of the answer, f is a tenth for the form that was asked for and minus a tenth for any other, copies and
quotes may differ in a fifth of their words. The paper does not say whether A reads the answer or the whole output: here
the answer, and an output without an answer line has none; `answer="raw"` reads the whole output, for both variants.

J is the sum of the three grades of a judge, or None where it gave none. It is never 0 for that: see `totals`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any, Literal, get_args

from lceval.errors import UserError
from lceval.tasks import parsing, scoring
from lceval.tasks.parsing import normalize
from lceval.tasks.scoring import gold_places

Name = Literal["ao", "id", "idc", "idq", "rj", "longrlvr", "loongrl"]
Variant = Literal["paper", "graded"]
Answer = Literal["extracted", "raw"]
NAMES: tuple[str, ...] = get_args(Name)
JUDGE = "judge"
"""The part that a judge gives."""

FORM = 0.1
"""What the right form adds to a graded reward, and any other takes from it."""
FUZZY = 0.8
"""From this similarity on, copied or quoted words count as the document's (graded)."""
QUOTE_TOKENS = 30
"""The longest quote that the prompt allows; words and marks are counted, which no tokenizer has fewer of."""
QUOTE_WORDS = 3
"""The shortest quote that counts (graded): one letter stands in every document."""
ANSWER_WORDS = 10
"""An answer of so many words, or three times the gold's, is not yet long (graded)."""

Row = Mapping[str, Any]
Parts = dict[str, float | None]
Grader = Callable[[Sequence[Row], Sequence[str]], Sequence[float | None]]
"""The J of outputs, one a row: 0 to 3, None where the judge gave none."""

_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward by name; see the module for what each is.

    Attributes:
        answer: what SubEM reads: the answer that the output gives, or all of it.
    """

    name: Name
    variant: Variant = "paper"
    answer: Answer = "extracted"

    def __post_init__(self) -> None:
        for field, allowed in (("name", NAMES), ("variant", get_args(Variant)), ("answer", get_args(Answer))):
            value = getattr(self, field)
            if value not in allowed:
                near = get_close_matches(str(value), allowed, 1)
                hint = f" (nearest: {near[0]})" if near else ""
                raise UserError(f"no reward with {field}={value!r}: expected one of {', '.join(allowed)}{hint}")

    @property
    def judged(self) -> bool:
        """Whether it needs a judge."""
        return self.name == "rj"

    def parts(self, row: Row, output: str, j: float | None = None) -> Parts:
        """The parts of an output's reward; what it is worth is their sum.

        Args:
            row: of any task of ours whose documents are numbered; `answers`, `docs` and `gold_pids` are read.
            output: as the model wrote it.
            j: the judge's J where the reward has one; None leaves that part None.
        """
        return _PARTS[self.name](self, row, output, j)

    def _graded(self) -> bool:
        return self.variant == "graded"

    def _answer(self, row: Row, output: str) -> float:
        """A, or A' if graded."""
        said, parsed = (output, True) if self.answer == "raw" else parsing.extract(output)
        right = scoring.subem(said, row["answers"]) if parsed else 0.0
        return right * brevity(said, row["answers"]) if self._graded() else right

    def _form(self, right: bool) -> Parts:
        """f, where there is one."""
        return {"form": FORM if right else -FORM} if self._graded() else {}


def _ao(reward: Reward, row: Row, output: str, _: float | None) -> Parts:
    spoken = parsing.without_thinking(output)
    alone = "\n" not in spoken and not parsing.before_answer(output).strip(" *_`")
    return {"answer": reward._answer(row, output)} | reward._form(alone and parsing.extract(output).parsed)


def _id(reward: Reward, row: Row, output: str, _: float | None) -> Parts:
    return _cited(reward, row, output, scoring.cited_results(row, [output]), {})


def _idc(reward: Reward, row: Row, output: str, _: float | None) -> Parts:
    scores = scoring.copied_results(row, [output])
    content = copies_f1(row, output) if reward._graded() else scores["content"]
    return _cited(reward, row, output, scores, {"content": content})


def _idq(reward: Reward, row: Row, output: str, _: float | None) -> Parts:
    scores = scoring.quoted_results(row, [output])
    found = parsing.quotes(parsing.before_answer(output))
    short = all(len(_TOKEN.findall(quote.text)) <= QUOTE_TOKENS for quote in found)
    quotes = quotes_f1(row, output) if reward._graded() else float(short and scores["quotes"] == 1)
    return _cited(reward, row, output, scores, {"quotes": quotes}, output_format=short)


def _cited(
    reward: Reward, row: Row, output: str, scores: Mapping[str, float], evidence: Parts, *, output_format: bool = True
) -> Parts:
    """The parts that every form has which names documents."""
    ids = scores["ids_f1"] if reward._graded() else scores["ids_exact"]
    before = parsing.before_answer(output)
    once = parsing.before_answer(before) == before.strip() and parsing.extract(output).parsed
    return {
        **evidence,
        "ids": ids,
        "answer": reward._answer(row, output),
        **reward._form(output_format and once and bool(scores["ids_rate"])),
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
    said, parsed = (output, True) if reward.answer == "raw" else parsing.extract(output)
    within = answer_within_gold(said, row["answers"]) if parsed else 0.0
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


def brevity(said: str, answers: Sequence[str]) -> float:
    """1 up to ANSWER_WORDS words or three times the longest gold answer, then falling with one over the length."""
    allowed = max(ANSWER_WORDS, 3 * max((len(normalize(answer).split()) for answer in answers), default=0))
    return min(1.0, allowed / max(1, len(normalize(said).split())))


def answer_within_gold(said: str, answers: Sequence[str]) -> float:
    """The share of a gold answer's words that the answer is, where it stands in it as whole words; else 0.

    LoongRL compares characters, where one letter is enough.
    """
    words = normalize(said).split()
    golds = (normalize(answer).split() for answer in answers)
    inside = (
        len(words) / len(gold)
        for gold in golds
        if any(gold[start : start + len(words)] == words for start in range(len(gold) - len(words) + 1))
    )
    return max(inside, default=0.0) if words else 0.0


def copies_f1(row: Row, output: str) -> float:
    """F1 of the documents that an output copies: a copy counts once, if it is like a gold document by FUZZY."""
    texts, gold = [normalize(document["text"]).split() for document in row["docs"]], gold_places(row)
    found = parsing.passages(parsing.before_answer(output))
    good = {place for place, text in found if place in gold and _length_matched(normalize(text).split(), texts[place])}
    return _f1(len(good), len(found), len(gold))


def quotes_f1(row: Row, output: str) -> float:
    """The harmonic mean of the share of quotes that are good and the share of gold documents that have a good one.

    Good is a quote of QUOTE_WORDS words to QUOTE_TOKENS tokens that stands, by FUZZY, in the gold document it names.
    """
    texts, gold = [normalize(document["text"]).split() for document in row["docs"]], gold_places(row)
    found = parsing.quotes(parsing.before_answer(output))
    good = [place for place, text in found if place in gold and _quotes(text, texts[place])]
    if not good:
        return 0.0
    precision, recall = len(good) / len(found), len({*good}) / len(gold)
    return 2 * precision * recall / (precision + recall)


def _quotes(text: str, document: Sequence[str]) -> bool:
    words = normalize(text).split()
    if len(words) < QUOTE_WORDS or len(_TOKEN.findall(text)) > QUOTE_TOKENS:
        return False
    windows = range(max(1, len(document) - len(words) + 1))
    return any(_length_matched(words, document[start : start + len(words)]) for start in windows)


def _length_matched(one: Sequence[str], other: Sequence[str]) -> bool:
    if one == other:
        return True
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    # The two bounds are cheap and fail first.
    return all(ratio() >= FUZZY for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio))


def _f1(hits: int, said: int, gold: int) -> float:
    return 2 * hits / (said + gold) if said + gold else 0.0


def totals(parts: Sequence[Parts], groups: Sequence[Hashable]) -> list[float | None]:
    """What each output is worth: the sum of its parts, where an unjudged output must neither gain nor lose by that.

    Its J is left out: it is given the mean J of the judged outputs of its group (the outputs of one prompt, which GRPO
    compares with each other), which is no advantage either way. Where none of a group is judged, none has a J. An
    output without any part is None, and TRL leaves it out of the group and the loss.
    """
    judged: dict[Hashable, list[float]] = {}
    for part, group in zip(parts, groups, strict=True):
        if (j := part.get(JUDGE)) is not None:
            judged.setdefault(group, []).append(j)
    made: list[float | None] = []
    for part, group in zip(parts, groups, strict=True):
        known = [value for value in part.values() if value is not None]
        if known and JUDGE in part and part[JUDGE] is None and group in judged:
            known.append(math.fsum(judged[group]) / len(judged[group]))
        made.append(math.fsum(known) if known else None)
    return made
