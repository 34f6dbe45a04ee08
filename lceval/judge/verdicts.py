"""Parsing of judge replies. An unparsable reply gives no verdict: neither a 0 nor a guess."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lceval.judge.rubrics import Label, Rubric
from lceval.tasks.parsing import without_thinking

RATING = "rating"
_MOST_BRACES = 1000
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_AFTER_WORD = re.compile(rf"rating[\s:*_]*\[{{1,2}}{_NUMBER}\]{{1,2}}", re.IGNORECASE)
_DOUBLE, _SINGLE = re.compile(rf"\[\[{_NUMBER}\]\]"), re.compile(rf"\[{_NUMBER}\]")


def parse(rubric: Rubric, reply: str) -> dict[str, Label | float] | None:
    """The grades of a reply, one per field (`rating` for prose); None if incomplete.

    Thinking is removed. JSON may be embedded in prose or a code block; the last complete object counts. Without one,
    each field is parsed as `field: label` and must have a unique label.
    """
    text = without_thinking(reply)
    if rubric.reply == "rating":
        rating = parse_rating(text)
        return None if rating is None else {RATING: rating}
    complete = [grades for value in _objects(text) if (grades := _grades(rubric, value)) is not None]
    if complete:
        return complete[-1]
    return None if "{" in text and "}" not in text else _grades(rubric, _fields_in_prose(rubric, text))


def parse_rating(text: str) -> float | None:
    """Loong's rule: the first `[[x]]`, else `[x]`; None without one, or outside 1 to 100.

    Beyond the rule, brackets after the word "rating" come first, and of several `[x]` none is the rating.
    """
    match = _AFTER_WORD.search(text) or _DOUBLE.search(text)
    if match is None:
        single = [*_SINGLE.finditer(text)]
        match = single[0] if len(single) == 1 else None
    if match is None or not 1 <= float(match[1]) <= 100:
        return None
    return float(match[1])


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    # Of the last braces only, since nested objects that do not end are parsed once for each of theirs.
    place = len(text.rsplit("{", _MOST_BRACES)[0])
    decoder, last = json.JSONDecoder(), text.rfind("}")
    while 0 <= place < last:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield value
        place = text.find("{", end)


def _fields_in_prose(rubric: Rubric, text: str) -> dict[str, str]:
    """Fields given as `field: label` or `"field" = 'label'`, each with a unique label."""
    fields = {}
    for field, labels in rubric.labels.items():
        one_of = "|".join(sorted((re.escape(str(label)) for label in labels), key=len, reverse=True))
        pattern = rf"(?<!\w){re.escape(field)}[\"'*_`]*\s*[:=][\s\"'*_`(\[]*({one_of})(?!\w)"
        values = {match[1].lower() for match in re.finditer(pattern, text, re.IGNORECASE)}
        if len(values) == 1:
            fields[field] = values.pop()
    return fields


def _grades(rubric: Rubric, value: Mapping[str, Any]) -> dict[str, Label | float] | None:
    """The labels of all fields as spelled in the rubric; other keys are ignored."""
    grades: dict[str, Label | float] = {}
    for field, labels in rubric.labels.items():
        if (raw := value.get(field)) is None:
            return None
        integral = isinstance(raw, bool) or (isinstance(raw, float) and raw.is_integer())
        text = str(int(raw) if integral else raw).strip(" \t\n()[]*_`.\"'").lower()
        label = next((label for label in labels if str(label).lower() == text), None)
        if label is None:
            return None
        grades[field] = label
    return grades
