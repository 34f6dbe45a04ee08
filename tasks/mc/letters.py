"""Which letter an output gives: LongBench v2's rule, and the two rules that InfiniteBench has scored by.

They are the benchmarks' own, so that figures can be set beside published ones; thinking is removed first, which they
leave to the caller. An output without a letter is wrong, and counted.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lceval.errors import UserError
from lceval.tasks.parsing import without_thinking
from lceval.tasks.prompts import LETTERS
from lceval.tasks.scoring import with_telemetry

# The first of the two that stands anywhere wins. Neither looks at what follows the letter: so the benchmark has it.
_STATED = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))

_STANDALONE = re.compile(rf"\b[{LETTERS}]\b")
_PUNCTUATION = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
_LEADS = ("answer is:", "answer:", "answer is", "option is")


def stated_letter(output: str) -> str | None:
    """LongBench v2's rule: the letter of `The correct answer is (X)`, else of `The correct answer is X`, else none.

    Bold marks are dropped; upper and lower case differ.
    """
    plain = without_thinking(output).replace("*", "")
    found = (pattern.search(plain) for pattern in _STATED)
    return next((match[1] for match in found if match), None)


def gold_letters(doc: Mapping[str, Any]) -> list[str]:
    """The letters that are right: that of the row's option, or those among the answers where only these are known.

    Raises:
        UserError: the answers hold no letter.
    """
    if "gold" in doc:
        return [LETTERS[doc["gold"]]]
    letters = [answer for answer in doc["answers"] if answer in [*LETTERS]]
    if not letters:
        raise UserError(f"ground_truth {doc['answers']!r:.80} names no letter: expected one of A, B, C and D in it.")
    return letters


def letter_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of multiple choice by a generated letter (LongBench v2)."""
    letter = stated_letter(str(results[0]))
    metrics = {"acc": float(letter in gold_letters(doc)), "parse_rate": float(letter is not None)}
    return with_telemetry(metrics, results[0], parsed=letter is not None)


def first_character(output: str, golds: Sequence[str]) -> bool:
    """InfiniteBench's published rule: the first character is a letter, and gold."""
    first = output.strip()[:1]
    return first in [*LETTERS] and first in golds


def by_first_line(output: str, golds: Sequence[str]) -> bool:
    """InfiniteBench's current rule: the last standalone letter of the first line that has one is gold.

    Where it is not, the older rules may still find the output right.

    Args:
        golds: the text of the right option, and its letter.
    """
    lines = (_STANDALONE.findall(line) for line in output.strip().splitlines())
    named = next((letters[-1] for letters in lines if letters), None)
    return named in golds or _by_older_rules(output, golds)


def _by_older_rules(output: str, golds: Sequence[str]) -> bool:
    """The first character if it is a letter; the whole output; what follows a lead; the first word that is a letter."""
    said = output.strip()
    if said[:1] in [*LETTERS]:
        return said[0] in golds
    if said in golds:
        return True
    words = said.translate(_PUNCTUATION).split(" ")
    plain = " ".join(word for word in words if word)
    for lead in _LEADS:
        _, found, rest = plain.partition(lead)
        if found:
            # one character is skipped, whatever it is
            return any(rest[1:].startswith(gold) for gold in golds)
    first = next((word for word in plain.split() if word in [*LETTERS]), None)
    return first in golds


def infinite_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of InfiniteBench's multiple choice; `answers` hold the right option's letter and its text."""
    output, golds = without_thinking(str(results[0])), doc["answers"]
    gold_letters({"answers": golds})
    parsed = _STANDALONE.search(output) is not None or output[:1] in [*LETTERS]
    metrics = {
        "acc": float(by_first_line(output, golds)),
        "acc_first_char": float(first_character(output, golds)),
        "parse_rate": float(parsed),
    }
    return with_telemetry(metrics, results[0], parsed=parsed)
