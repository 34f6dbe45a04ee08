"""Extract the letter of an output: LongBench v2's rule, and InfiniteBench's published and later rules.

These are the benchmarks' own rules, so that scores are comparable with published ones. Thinking is removed first, which
they leave to the caller. An output without a letter counts as wrong.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.parsing import without_thinking
from lceval.tasks.prompts import LETTERS
from lceval.tasks.scoring import with_telemetry

# The first pattern that matches anywhere is used. As in the benchmark, neither checks what follows the letter.
_STATED = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))

_STANDALONE = re.compile(rf"\b[{LETTERS}]\b")
_PUNCTUATION = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
_LEADS = ("answer is:", "answer:", "answer is", "option is")


def stated_letter(output: str) -> str | None:
    """LongBench v2's rule: the letter of `The correct answer is (X)`, else of `The correct answer is X`, else None.

    Bold marks are removed; matching is case-sensitive.
    """
    plain = without_thinking(output).replace("*", "")
    matches = (pattern.search(plain) for pattern in _STATED)
    return next((match[1] for match in matches if match), None)


def gold_letters(doc: Mapping[str, Any]) -> list[str]:
    """Correct letters: that of the row's gold option, or, without a row, those among the answers.

    Raises:
        UserError: the answers include no letter.
    """
    if "gold" in doc:
        return [LETTERS[doc["gold"]]]
    letters = [answer for answer in doc["answers"] if answer in [*LETTERS]]
    if not letters:
        raise UserError(f"no letter in ground_truth {doc['answers']!r:.80}: expected one of A, B, C, D in it.")
    return letters


def letter_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of generated multiple choice (LongBench v2)."""
    letter = stated_letter(str(results[0]))
    metrics = {"acc": float(letter in gold_letters(doc)), "parse_rate": float(letter is not None)}
    return with_telemetry(metrics, results[0], parsed=letter is not None)


def by_published_rule(output: str, golds: Sequence[str]) -> bool:
    """The rule of InfiniteBench's published scores (`compute_scores.py` of its commit 88b3daa).

    The first of these that is present decides: a letter as the first character, the whole output as an answer, the
    text after a lead such as "answer is", a standalone letter.

    Args:
        output: model output without thinking.
        golds: text and letter of the correct option.
    """
    stripped = output.strip()
    if stripped[:1] in [*LETTERS]:
        return stripped[0] in golds
    if stripped in golds:
        return True
    words = stripped.translate(_PUNCTUATION).split(" ")
    plain = " ".join(word for word in words if word)
    for lead in _LEADS:
        _, separator, rest = plain.partition(lead)
        if separator:
            # any one character is skipped
            return any(rest[1:].startswith(gold) for gold in golds)
    # As in the benchmark, a substring such as "CD" is a word of letters too, and wrong.
    first = next((word for word in plain.split() if word in LETTERS), None)
    return first in golds


def by_later_rule(output: str, golds: Sequence[str]) -> bool:
    """InfiniteBench's rule since then: the last letter of the first line that has one, else the published rule."""
    lines = (_STANDALONE.findall(line) for line in output.strip().split("\n"))
    letter = next((letters[-1] for letters in lines if letters), None)
    return letter in golds or by_published_rule(output, golds)


def infinite_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of InfiniteBench's multiple choice; `answers` are letter and text of the correct option."""
    output, golds = without_thinking(str(results[0])), doc["answers"]
    gold_letters({"answers": golds})
    parsed = _STANDALONE.search(output) is not None or output[:1] in [*LETTERS]
    metrics = {
        "acc": float(by_published_rule(output, golds)),
        "acc_last_letter": float(by_later_rule(output, golds)),
        "parse_rate": float(parsed),
    }
    return with_telemetry(metrics, results[0], parsed=parsed)
