"""Metrics of the finance output formats: a number, an answer with its scale (TAT-QA), an answer for a judge.

TAT-QA (Zhu et al. 2021) scores answer and scale together: a figure becomes round(x, 2) times its scale, the scale is
appended to a text, several spans are sorted and joined. Then exact match, and F1 of the two sets of words, rounded to
two decimals; for arithmetic and count, F1 is exact match. A figure without a scale also matches a percent answer as a
fraction. We differ for prose: the answer is one line, from which the figure is extracted
(lceval.tasks.finance.numbers), or which is split into spans if several are expected; and "(1,234)" is negative
(positive in the published code because of the comma).
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from lceval.tasks.finance.numbers import UNITS, Number, as_number, number_metrics, numbers, read_number, states_number
from lceval.tasks.parsing import extract, without_thinking
from lceval.tasks.scoring import em, f1, subem, with_telemetry

_FIGURES = ("arithmetic", "count")  # answer types without partial credit
_ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A comma without a space is a thousands separator, unless a year follows.
_BETWEEN = re.compile(r"\s*(?:;|\n|,\s|,(?=\d{4}\b))\s*(?:and\s+)?")
_BETWEEN_OR_AND = re.compile(rf"{_BETWEEN.pattern}|\s+(?:and|&)\s+")


def _spelled(number: Number, scale: str) -> str:
    """Canonical string of a figure; its own unit takes precedence over `scale`."""
    if number.scale == "percent":
        return f"{number.value:.4f}"
    unit = number.unit if number.unit != 1 else UNITS.get(scale, 1.0)
    return f"{round(number.written, 2) * unit:.4f}"


def _written(span: str, scale: str) -> str:
    """Canonical string of a span: figures in units of one, words normalised."""
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
    """`named`, else the scale of the last figure that has one."""
    scales = (number.scale for span in reversed(spans) if (number := as_number(span)) and number.scale)
    return named or next(scales, "")


def _bag_f1(answer: str, gold: str) -> float:
    answer_words, gold_words = set(answer.split()), set(gold.split())
    common = len(answer_words & gold_words)
    return round(2 * common / (len(answer_words) + len(gold_words)), 2) if common else 0.0


def scaled_metrics(answer: str, spans: Sequence[str], scale: str, answer_type: str) -> dict[str, float]:
    """`em`, `f1` and `scale` of a TAT-QA answer.

    Args:
        answer: One line of model output.
        spans: Spans of the gold answer as printed.
        scale: Scale of the gold answer: "", thousand, million, billion or percent.
        answer_type: span, multi-span, arithmetic or count.
    """
    expected = " ".join(sorted(_written(span, scale) for span in spans))
    if answer_type == "multi-span":
        correct, overlap, named = _several(answer, spans, scale)
    else:
        readings, named = _one(answer, figure=as_number(spans[0]) is not None)
        correct = expected in readings
        overlap = max(_bag_f1(reading, expected) for reading in readings)
    exact = float(correct)
    return {
        "em": exact,
        "f1": exact if answer_type in _FIGURES else max(exact, overlap),
        "scale": float(bool(answer.strip()) and named == _scale(spans, scale)),
    }


def _one(answer: str, *, figure: bool) -> tuple[list[str], str]:
    """Canonical strings of a single-span answer, and its scale."""
    number = read_number(answer) if figure else as_number(answer)
    readings = [_words(answer)]
    if number is not None:
        readings.append(_words(_spelled(number, "")))
        if number.unit == 1:
            readings.append(_words(f"{number.value:.4f}"))  # 0.2222 for 22.22 percent
    return readings, number.scale if number is not None else ""


def _several(answer: str, spans: Sequence[str], scale: str) -> tuple[bool, float, str]:
    """Exact match, F1 and scale of a multi-span answer."""
    # "3, 5 (in millions)" and "$3 and $5 million": figures without a unit have that of the last figure
    last = [*numbers(answer)][-1:]
    shared = last[0].scale if last else ""
    expected = " ".join(sorted(_written(span, scale) for span in spans))
    parts = sorted(_written(part, scale) for span in spans for part in _spans(span, _BETWEEN_OR_AND))
    splits = [_spans(answer, between) for between in (_BETWEEN, _BETWEEN_OR_AND)]
    written = [sorted(_written(part, shared if as_number(part) else "") for part in split) for split in splits]
    correct = written[1] == parts
    overlap = max(_bag_f1(" ".join(answer_spans), expected) for answer_spans in written)
    return correct, overlap, _scale(splits[1], "")


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
    """`process_results` of numeric and yes/no questions."""
    answer, parsed = extract(str(results[0]))
    scores = [number_metrics(answer, gold) for gold in doc["answers"]]
    parsed = parsed and states_number(answer)
    metrics = {name: max(score[name] for score in scores) for name in scores[0]}
    return with_telemetry({**metrics, "parse_rate": float(parsed)}, results[0], parsed=parsed)


def judged_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of judged answers, without the judge: the answer is the whole output without thinking."""
    answer = without_thinking(str(results[0]))
    metrics = {
        "f1": f1(answer, doc["answers"]),
        "subem": subem(answer, doc["answers"]),
        "em": em(answer, doc["answers"]),
        "parse_rate": float(bool(answer)),
    }
    return with_telemetry(metrics, results[0], parsed=bool(answer))
