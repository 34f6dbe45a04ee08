"""Scores of the finance forms: a number, an answer with its scale (TAT-QA), an answer that a judge would grade.

TAT-QA (Zhu et al. 2021) scores the answer and its scale together: a figure is written out as round(x, 2) times its
scale, a text gets its scale as a last word, several spans are sorted and joined; then exact match and the F1 of the two
bags of words, each word once, rounded to two decimals; for arithmetic and count F1 is the exact match. A figure without
a scale is also read as a fraction of a percent answer. We differ where models write prose: the answer is one line, from
which the figure is read (lceval.tasks.finance.numbers), and which is cut into spans where several are asked for; and
"(1,234)" is negative, which the published code reads as positive because of the comma.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from lceval.tasks.finance.numbers import UNITS, Number, as_number, number_metrics, numbers, read_number, states_number
from lceval.tasks.parsing import extract, without_thinking
from lceval.tasks.scoring import em, f1, subem, with_telemetry

_FIGURES = ("arithmetic", "count")  # answer types that are right or wrong, and nothing between
_ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A comma without a space parts thousands, unless a year stands behind it.
_BETWEEN = re.compile(r"\s*(?:;|\n|,\s|,(?=\d{4}\b))\s*(?:and\s+)?")
_BETWEEN_OR_AND = re.compile(rf"{_BETWEEN.pattern}|\s+(?:and|&)\s+")


def _spelled(number: Number, scale: str) -> str:
    """A figure as it is compared: its own unit goes before a scale named apart."""
    if number.scale == "percent":
        return f"{number.value:.4f}"
    unit = number.unit if number.unit != 1 else UNITS.get(scale, 1.0)
    return f"{round(number.written, 2) * unit:.4f}"


def _written(span: str, scale: str) -> str:
    """A span as it is compared: figures in units of one, its words normalised."""
    number = as_number(span)
    return _words(_spelled(number, scale) if number else f"{span} {scale}")


def _words(text: str) -> str:
    words = (_word(word) for word in text.lower().split())
    return " ".join(word for word in words if word and word not in _ARTICLES)


def _word(word: str) -> str:
    number = as_number(word)
    return str(round(number.value, 4)) if number else word.translate(_NO_PUNCTUATION)


def _spans(text: str, between: re.Pattern[str]) -> list[str]:
    parts = (part.strip(" \t[]'\"") for part in between.split(text))
    return [part.removeprefix("- ").removeprefix("and ") for part in parts if part]


def _scale(spans: Sequence[str], named: str) -> str:
    """The scale named apart, else the one written with the last figure that has one."""
    found = (number.scale for span in reversed(spans) if (number := as_number(span)) and number.scale)
    return named or next(found, "")


def _bag_f1(said: str, gold: str) -> float:
    said_bag, gold_bag = set(said.split()), set(gold.split())
    common = len(said_bag & gold_bag)
    return round(2 * common / (len(said_bag) + len(gold_bag)), 2) if common else 0.0


def scaled_metrics(answer: str, spans: Sequence[str], scale: str, answer_type: str) -> dict[str, float]:
    """`em`, `f1` and `scale` of a TAT-QA answer.

    Args:
        answer: One line of a model.
        spans: The gold answer as printed, one string or several.
        scale: Of the gold answer: "", thousand, million, billion or percent.
        answer_type: span, multi-span, arithmetic or count.
    """
    expected = " ".join(sorted(_written(span, scale) for span in spans))
    if answer_type == "multi-span":
        right, overlap, named = _several(answer, spans, scale)
    else:
        readings, named = _one(answer, figure=as_number(spans[0]) is not None)
        right = expected in readings
        overlap = max(_bag_f1(reading, expected) for reading in readings)
    exact = float(right)
    return {
        "em": exact,
        "f1": exact if answer_type in _FIGURES else max(exact, overlap),
        "scale": float(bool(answer.strip()) and named == _scale(spans, scale)),
    }


def _one(answer: str, *, figure: bool) -> tuple[list[str], str]:
    """The ways to read an answer that is one span, and its scale."""
    number = read_number(answer) if figure else as_number(answer)
    readings = [_words(answer)]
    if number is not None:
        readings.append(_words(_spelled(number, "")))
        if number.unit == 1:
            readings.append(_words(f"{number.value:.4f}"))  # 0.2222 for 22.22 percent
    return readings, number.scale if number is not None else ""


def _several(answer: str, spans: Sequence[str], scale: str) -> tuple[bool, float, str]:
    """Exactness, F1 and scale of an answer that is several spans."""
    # "3, 5 (in millions)" and "$3 and $5 million": the last figure's unit is that of those without one
    last = [*numbers(answer)][-1:]
    shared = last[0].scale if last else ""
    expected = " ".join(sorted(_written(span, scale) for span in spans))
    parts = sorted(_written(part, scale) for span in spans for part in _spans(span, _BETWEEN_OR_AND))
    said = [_spans(answer, between) for between in (_BETWEEN, _BETWEEN_OR_AND)]
    written = [sorted(_written(part, shared if as_number(part) else "") for part in one) for one in said]
    right = written[1] == parts
    overlap = max(_bag_f1(" ".join(one), expected) for one in written)
    return right, overlap, _scale(said[1], "")


def scaled_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of TAT-QA."""
    answer, parsed = extract(str(results[0]))
    metrics = {
        **scaled_metrics(answer, doc["spans"], doc["scale"], doc["answer_type"]),
        "subem": subem(answer, doc["answers"]),
        "parse_rate": float(parsed),
    }
    return with_telemetry(metrics, results[0], parsed=parsed)


def number_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of questions for a number (or for yes or no)."""
    answer, parsed = extract(str(results[0]))
    found = [number_metrics(answer, gold) for gold in doc["answers"]]
    said = parsed and states_number(answer)
    metrics = {name: max(one[name] for one in found) for name in found[0]}
    return with_telemetry({**metrics, "parse_rate": float(said)}, results[0], parsed=said)


def judged_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of answers for a judge, where there is none: the whole reply, less thinking, is the answer."""
    answer = without_thinking(str(results[0]))
    metrics = {
        "f1": f1(answer, doc["answers"]),
        "subem": subem(answer, doc["answers"]),
        "em": em(answer, doc["answers"]),
        "parse_rate": float(bool(answer)),
    }
    return with_telemetry(metrics, results[0], parsed=bool(answer))
