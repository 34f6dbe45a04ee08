"""Numbers in answers: reading one from a model's words, and comparing it with the gold answer.

A number is read as it is written, with its unit beside it ("12.6 million" is 12.6 in units of a million, "14%" is 14 in
units of a hundredth), because gold answers are kept in either form: FinQA's programs give 0.14 for a share, some
multiply it by 100, and an amount may be in the unit of its table. A figure with a unit is therefore tried both ways;
one without is taken as it stands, so "14" is not 0.14 (FinQA's own evaluation, too, takes "14%" for 0.14).

Which number counts, where a line holds several: the first line with a number decides; in it what follows the last "=",
if a number does; of these the first that is not a bare year. Words for a sign ("a decline of") are not read.

This module imports nothing of the package but the parsing of outputs, so that any scorer may use it.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from lceval.tasks.parsing import extract, normalize

DECIMALS = 5
"""FinQA, ConvFinQA and DocFinQA: the executed program's result is rounded to this many decimals, then compared."""

TOLERANCE = 0.01
"""Of `within_1pct`, a metric of its own: no published score has it."""

UNITS = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "percent": 1e-2, "basis point": 1e-4}

_SPELLINGS = {
    "thousand": r"thousands?\b|k\b",
    "million": r"millions?\b|mln\b|mn\b|mm\b|m\b",
    "billion": r"billions?\b|bn\b|b\b",
    "trillion": r"trillions?\b|tn\b",
    "percent": r"%|percent\b|per\s?cent\b|pct\b|percentage\s+points?\b",
    "basis point": r"basis\s+points?\b|bps?\b",
}
_UNIT = "|".join(f"(?P<{name.replace(' ', '_')}>{words})" for name, words in _SPELLINGS.items())
_CURRENCY = r"(?:(?:US|HK|NZ|[SAC])?[$€£¥]|USD|EUR|GBP)"
_NUMBER = re.compile(
    rf"""(?<![A-Za-z0-9.])
    (?P<sign>[-\u2212\u2013+]\s?)? (?P<open>\(\s?)? (?:(?P<currency>{_CURRENCY})\s?)? (?P<inner>\(\s?)?
    (?P<second>[-\u2212\u2013+]\s?)? (?:{_CURRENCY}\s?)?
    (?P<digits>(?:\d{{1,3}}(?:,\d{{2,3}})*,\d{{3}}(?!\d)|\d+)(?:\.\d+)?|\.\d+) (?!\.?\d) (?P<power>e[-+]?\d{{1,3}}\b)?
    (?![A-Za-z]*-[A-Za-z]) (?P<before>\s?\))?
    (?:[\s-]?\(?(?:in\s+(?:USD\s+|US\s?\$\s?)?)?(?:{_UNIT}))? (?P<after>\s?\))?
    (?!(?!x\b)[A-Za-z0-9])""",  # "2.0x" is a number, "2nd" is none
    re.VERBOSE | re.IGNORECASE,
)
_EQUALS = re.compile(r"[=\u2248]")
_ALONE = re.compile(r"(?:about|approximately|approx\.?|around|~|\u2248)\s*", re.IGNORECASE)
_COUNTED = re.compile(r"\s*(?:times|x|days|years|shares|dollars|USD|per share)?\s*\.?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.\s+(?=[A-Z])")
_YEARS = range(1900, 2101)


class Number(NamedTuple):
    """A number as it is written.

    Attributes:
        written: without its unit.
        unit: what it counts: 1.0, or one of UNITS.
        decimals: how many are printed.
        amount: whether a currency stands with it.
    """

    written: float
    unit: float = 1.0
    decimals: int = 0
    amount: bool = False

    @property
    def value(self) -> float:
        """In units of one; divided where that is exact in decimals, so that 14% is 0.14."""
        return self.written / round(1 / self.unit) if self.unit < 1 else self.written * self.unit

    @property
    def scale(self) -> str:
        """The name of its unit, "" without one."""
        return next((name for name, unit in UNITS.items() if unit == self.unit), "")

    @property
    def is_year(self) -> bool:
        """Whether it could be a bare year."""
        return self.unit == 1 and not self.decimals and not self.amount and self.written in _YEARS


def _number(match: re.Match[str]) -> Number:
    digits, found = match["digits"].replace(",", ""), match.groupdict()
    minus = any((found[sign] or "").strip() not in ("", "+") for sign in ("sign", "second"))
    # (1,234), $(0.91) and (3.5%) are negative; in "(3.4% jump)" the bracket does not close behind the number
    bracketed = bool(found["open"] or found["inner"]) and bool(found["before"] or found["after"])
    unit = next((UNITS[name] for name in UNITS if found[name.replace(" ", "_")]), 1.0)
    return Number(
        written=float(digits + (found["power"] or "")) * (-1 if minus or bracketed else 1),
        unit=unit,
        decimals=len(digits.partition(".")[2]),
        amount=bool(found["currency"]) or "," in match["digits"],
    )


def numbers(text: str) -> Iterator[Number]:
    """Every number of a text."""
    return (_number(match) for match in _NUMBER.finditer(text))


def as_number(text: str) -> Number | None:
    """The number that a text is, currency and unit included; None if it says anything else."""
    match = _NUMBER.fullmatch(text.strip())
    return _number(match) if match else None


def read_number(text: str) -> Number | None:
    """The number that an answer gives, by the rule above; None if it gives none."""
    for line in text.split("\n"):
        if found := list(numbers(line)):
            ends = [match.end() for match in _EQUALS.finditer(line)]
            found = (list(numbers(line[ends[-1] :])) if ends else []) or found
            return next((number for number in found if not number.is_year), found[0])
    return None


def parse_number(text: str) -> float | None:
    """The value that an answer gives, in units of one; None if it gives none."""
    number = read_number(text)
    return None if number is None else number.value


def _pairs(said: Number, gold: Number) -> list[tuple[float, float, float]]:
    """What to compare: the answer, the gold and the gold's unit; as written only where one side leaves the unit out."""
    valued = (said.value, gold.value, gold.unit)
    return [valued] if said.unit != 1 and gold.unit != 1 else [valued, (said.written, gold.written, 1.0)]


def _printed(said: Number, gold: Number) -> bool:
    """Whether the answer rounds to the gold at the precision that the gold is printed with."""
    step = 0.5 * 10.0**-gold.decimals * (1 + 1e-9)
    return any(abs(one - other) <= step * unit + 1e-12 for one, other, unit in _pairs(said, gold))


def gold_number(gold: str) -> Number | None:
    """The number that a gold answer is, or that its first sentence is ("36%. This assumes ..."); None otherwise."""
    first = _SENTENCE_END.split(gold.strip(), maxsplit=1)[0]
    start = _ALONE.match(first)
    match = _NUMBER.match(first, start.end() if start else 0)
    return _number(match) if match and _COUNTED.fullmatch(first, match.end()) else None


def number_match(output: str, gold: str) -> float | None:
    """Whether an answer gives the figure that the gold answer is, at the precision that the gold is printed with.

    Returns:
        1.0 or 0.0; None where the gold answer is not a number.
    """
    expected = gold_number(gold)
    if expected is None:
        return None
    said = read_number(extract(output).answer)
    return float(said is not None and _printed(said, expected))


def number_metrics(answer: str, gold: str) -> dict[str, float]:
    """`exact` and `within_1pct` of an answer to a question for a number, or for yes or no.

    Exact is the published rule, equal after rounding both to DECIMALS, for a gold that a program computed (a plain
    number); a gold that a person printed, with a unit or a currency, is compared at the precision it is printed with.
    """
    expected, said = as_number(gold), read_number(answer)
    if expected is None:
        right = float(normalize(answer).split(" ", 1)[0] == normalize(gold))
        return {"exact": right, "within_1pct": right}
    if said is None:
        return {"exact": 0.0, "within_1pct": 0.0}
    if expected.unit != 1 or expected.amount:
        exact = _printed(said, expected)
    else:
        exact = any(round(one, DECIMALS) == round(expected.value, DECIMALS) for one in (said.value, said.written))
    close = any(abs(one - other) <= TOLERANCE * abs(other) for one, other, _ in _pairs(said, expected))
    return {"exact": float(exact), "within_1pct": float(exact or close)}


def states_number(answer: str) -> bool:
    """Whether an answer holds what a question for a number asks for: a number, yes or no."""
    return read_number(answer) is not None or normalize(answer).split(" ", 1)[0] in ("yes", "no")
