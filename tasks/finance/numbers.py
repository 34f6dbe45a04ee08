"""Numbers in answers: extract the number of an answer, compare it with the gold answer.

A number is parsed as written value and unit ("12.6 million" is 12.6 with unit 1e6, "14%" is 14 with unit 0.01), as gold
answers use both conventions: FinQA's programs return 0.14 for a share, some multiply it by 100, and amounts may be in
the unit of their table. A number with a unit is therefore compared both ways, a number without a unit only as written:
"14" is not 0.14 (FinQA's own evaluation also reads "14%" as 0.14).

If there are several numbers, the first line with a number is used; in it, the part after the last "=" if that has a
number; of these, the first number that is not a bare year. Words for a sign ("a decline of") are ignored.

This module imports only the parsing of outputs, so that any scorer can use it.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from lceval.tasks.parsing import extract, normalize

DECIMALS = 5
"""FinQA, ConvFinQA, DocFinQA: results of programs are compared after rounding to this many decimals."""

TOLERANCE = 0.01
"""Relative tolerance of `within_1pct`, our own metric."""

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
    """A parsed number.

    Attributes:
        written: written value, without the unit.
        unit: 1.0, or one of UNITS.
        decimals: number of printed decimals.
        amount: whether it has a currency or thousands separators.
    """

    written: float
    unit: float = 1.0
    decimals: int = 0
    amount: bool = False

    @property
    def value(self) -> float:
        """Value in units of one; divides for units below one, so that 14% is exactly 0.14."""
        return self.written / round(1 / self.unit) if self.unit < 1 else self.written * self.unit

    @property
    def scale(self) -> str:
        """Name of the unit; "" without a unit."""
        return next((name for name, unit in UNITS.items() if unit == self.unit), "")

    @property
    def is_year(self) -> bool:
        """Whether it could be a bare year."""
        return self.unit == 1 and not self.decimals and not self.amount and self.written in _YEARS


def _number(match: re.Match[str]) -> Number:
    digits, groups = match["digits"].replace(",", ""), match.groupdict()
    minus = any((groups[sign] or "").strip() not in ("", "+") for sign in ("sign", "second"))
    # (1,234), $(0.91) and (3.5%) are negative; in "(3.4% jump)" the bracket does not close after the number
    bracketed = bool(groups["open"] or groups["inner"]) and bool(groups["before"] or groups["after"])
    unit = next((UNITS[name] for name in UNITS if groups[name.replace(" ", "_")]), 1.0)
    return Number(
        written=float(digits + (groups["power"] or "")) * (-1 if minus or bracketed else 1),
        unit=unit,
        decimals=len(digits.partition(".")[2]),
        amount=bool(groups["currency"]) or "," in match["digits"],
    )


def numbers(text: str) -> Iterator[Number]:
    """All numbers of a text."""
    return (_number(match) for match in _NUMBER.finditer(_plain(text)))


# Full-width characters, and the minus signs and hyphens of Unicode.
_ASCII = {0xFF01 + i: 0x21 + i for i in range(94)} | dict.fromkeys((0x2010, 0x2011, 0x2212, 0x207B, 0xFE63), "-")


def _plain(text: str) -> str:
    """The text with ASCII signs, and without LaTeX's escapes of %, $ and thin spaces."""
    return re.sub(r"\\([%$])|\\,", r"\1", text.translate(_ASCII))


def as_number(text: str) -> Number | None:
    """Parse a text that is a single number with optional currency and unit; None otherwise."""
    match = _NUMBER.fullmatch(_plain(text).strip())
    return _number(match) if match else None


def read_number(text: str) -> Number | None:
    """The number of an answer, by the rule above; None without a number."""
    for line in text.split("\n"):
        if candidates := list(numbers(line)):
            ends = [match.end() for match in _EQUALS.finditer(line)]
            candidates = (list(numbers(line[ends[-1] :])) if ends else []) or candidates
            return next((number for number in candidates if not number.is_year), candidates[0])
    return None


def _pairs(answer: Number, gold: Number) -> list[tuple[float, float, float]]:
    """Comparisons (answer, gold, unit of the gold): by value, and as written if one side has no unit."""
    by_value = (answer.value, gold.value, gold.unit)
    return [by_value] if answer.unit != 1 and gold.unit != 1 else [by_value, (answer.written, gold.written, 1.0)]


def _equal_as_printed(answer: Number, gold: Number) -> bool:
    """Whether the answer equals the gold at the gold's printed precision."""
    step = 0.5 * 10.0**-gold.decimals * (1 + 1e-9)
    return any(abs(value - gold_value) <= step * unit + 1e-12 for value, gold_value, unit in _pairs(answer, gold))


def gold_number(gold: str) -> Number | None:
    """The number of a gold answer that is a number, or whose first sentence is ("36%. This assumes ..."); else None."""
    first = _SENTENCE_END.split(_plain(gold).strip(), maxsplit=1)[0]
    start = _ALONE.match(first)
    match = _NUMBER.match(first, start.end() if start else 0)
    return _number(match) if match and _COUNTED.fullmatch(first, match.end()) else None


def number_match(output: str, gold: str) -> float | None:
    """Compare the number of an output with a gold number, at the gold's printed precision.

    Returns:
        1.0 or 0.0; None if the gold answer is not a number.
    """
    expected = gold_number(gold)
    if expected is None:
        return None
    answer = read_number(extract(output).answer)
    return float(answer is not None and _equal_as_printed(answer, expected))


def number_metrics(answer: str, gold: str) -> dict[str, float]:
    """`exact` and `within_1pct` of a numeric or yes/no answer.

    For a gold computed by a program (a plain number), `exact` is the published rule: equal after rounding to DECIMALS.
    A gold with a unit or a currency is compared at its printed precision.
    """
    expected, number = as_number(gold), read_number(answer)
    if expected is None:
        correct = float(normalize(answer).split(" ", 1)[0] == normalize(gold))
        return {"exact": correct, "within_1pct": correct}
    if number is None:
        return {"exact": 0.0, "within_1pct": 0.0}
    if expected.unit != 1 or expected.amount:
        exact = _equal_as_printed(number, expected)
    else:
        rounded = {round(value, DECIMALS) for value in (number.value, number.written)}
        exact = round(expected.value, DECIMALS) in rounded
    pairs = _pairs(number, expected)
    close = any(abs(value - gold_value) <= TOLERANCE * abs(gold_value) for value, gold_value, _ in pairs)
    return {"exact": float(exact), "within_1pct": float(exact or close)}


def states_number(answer: str) -> bool:
    """Whether an answer has a number, or is yes or no."""
    return read_number(answer) is not None or normalize(answer).split(" ", 1)[0] in ("yes", "no")
