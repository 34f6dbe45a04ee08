"""Reading a judge's reply. What cannot be read is no verdict: never a 0, never a guess."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lceval.judge.rubrics import Label, Rubric
from lceval.tasks.parsing import without_thinking

RATING = "rating"
_NUMBER = r"(\d*\.?\d+)"
_DOUBLE, _SINGLE = re.compile(rf"\[\[{_NUMBER}\]\]"), re.compile(rf"\[{_NUMBER}\]")


def parse(rubric: Rubric, reply: str) -> dict[str, Label | float] | None:
    """The grades of a reply, one a field (`rating` for prose); None if it does not give all of them.

    Thinking is dropped. JSON may stand in prose or in a code block, the last complete object counts; without one, each
    field is looked for as `field: label`, and must not be given two labels.
    """
    said = without_thinking(reply)
    if rubric.reply == "rating":
        rating = read_rating(said)
        return None if rating is None else {RATING: rating}
    found = [grades for value in _objects(said) if (grades := _grades(rubric, value)) is not None]
    if found:
        return found[-1]
    return None if "{" in said and "}" not in said else _grades(rubric, _spelled(rubric, said))


def read_rating(text: str) -> float | None:
    """Loong's rule: the first `[[x]]`, else the first `[x]`; None without one, or outside 1 to 100."""
    match = _DOUBLE.search(text) or _SINGLE.search(text)
    if match is None or not 1 <= float(match[1]) <= 100:
        return None
    return float(match[1])


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield value
        place = text.find("{", end)


def _spelled(rubric: Rubric, text: str) -> dict[str, str]:
    """Fields given as `field: label` or `"field" = 'label'`, each with one label throughout."""
    found = {}
    for field, labels in rubric.labels.items():
        one_of = "|".join(sorted((re.escape(str(label)) for label in labels), key=len, reverse=True))
        pattern = rf"(?<!\w){re.escape(field)}[\"'*_`]*\s*[:=]\s*[\"'*_`]*({one_of})(?!\w)"
        given = {match[1].lower() for match in re.finditer(pattern, text, re.IGNORECASE)}
        if len(given) == 1:
            found[field] = given.pop()
    return found


def _grades(rubric: Rubric, value: Mapping[str, Any]) -> dict[str, Label | float] | None:
    """The labels of all fields as the rubric spells them; other keys are passed over."""
    grades: dict[str, Label | float] = {}
    for field, labels in rubric.labels.items():
        said: Any = value.get(field)
        whole = isinstance(said, bool) or (isinstance(said, float) and said.is_integer())
        spelled = str(int(said) if whole else said).strip().lower()
        label = next((label for label in labels if str(label).lower() == spelled), None)
        if label is None:
            return None
        grades[field] = label
    return grades
