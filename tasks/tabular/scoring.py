"""Scores of a predicted target: the class by its name, or how far a number is off.

Both read the extracted answer. A base model may go on with the table instead of answering: without `Answer:` its first
line counts, and of a line that repeats the row only what follows the arrow; `parse_rate` falls either way.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lceval.tasks.parsing import extract, normalize
from lceval.tasks.scoring import with_telemetry
from lceval.tasks.tabular.tables import ARROW

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")


def _target(output: str) -> tuple[str, bool]:
    """What an output says in the target's place, and whether it said so in the required form."""
    answer, parsed = extract(output)
    first = next((line for line in answer.splitlines() if line.strip()), "")
    before, arrow, after = first.rpartition(ARROW.strip())
    return (after, parsed and not before.strip()) if arrow else (first, parsed)


def label_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of classification: `acc` is 1.0 if the normalised answer is the name of the class.

    `parse_rate` is 1.0 if the output has the required form and names one of the classes.
    """
    answer, parsed = _target(str(results[0]))
    said = normalize(answer)
    parsed = parsed and said in {normalize(name) for name in doc["classes"]}
    metrics = {"acc": float(said == normalize(doc["answers"][0])), "parse_rate": float(parsed)}
    return with_telemetry(metrics, results[0], parsed=parsed)


def target_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of regression: `abs_error`, and `skill` = 1 - error / deviation.

    The deviation is that of the training targets from their median, on average: always answering the median has a
    skill of about 0, the truth has 1. No error counts for more than that of the training target farthest from the
    truth, and an output without a number, or a sample that failed, has exactly that one: to answer is never worse.
    """
    answer, parsed = _target(str(results[0]))
    number = _NUMBER.search(answer)
    parsed = parsed and number is not None
    off = abs(float(number[0].replace(",", "")) - doc["target"]) if number else doc["farthest"]
    made = with_telemetry(_errors(doc, off, parsed=parsed), results[0], parsed=parsed)
    # A sample that failed gets 0 for every metric, which here would be the best error there is.
    failed = made.get("kv", {}).get("status") == "error"
    return {**made, **_errors(doc, doc["farthest"], parsed=False)} if failed else made


def _errors(doc: Mapping[str, Any], off: float, *, parsed: bool) -> dict[str, float]:
    error = min(off, doc["farthest"])
    return {"abs_error": error, "skill": 1 - error / doc["deviation"], "parse_rate": float(parsed)}
