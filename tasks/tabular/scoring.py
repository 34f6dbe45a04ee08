"""Metrics of a predicted target: class by name, or error of a number.

Both use the extracted answer. A base model may continue the table instead of answering: without `Answer:`, the first
line is used, and of a line that repeats the row, the part after the arrow; neither counts as parsed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lceval.tasks.parsing import extract, normalize
from lceval.tasks.scoring import with_telemetry
from lceval.tasks.tabular.tables import ARROW

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")


def _target(output: str) -> tuple[str, bool]:
    """The predicted target of an output, and whether the output has the required format."""
    answer, parsed = extract(output)
    first = next((line for line in answer.splitlines() if line.strip()), "")
    before, arrow, after = first.rpartition(ARROW.strip())
    return (after, parsed and not before.strip()) if arrow else (first, parsed)


def label_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of classification: `acc` is 1.0 if the normalised answer is the name of the class.

    `parse_rate` is 1.0 if the output has the required format and is one of the classes.
    """
    answer, parsed = _target(str(results[0]))
    prediction = normalize(answer)
    parsed = parsed and prediction in {normalize(name) for name in doc["classes"]}
    metrics = {"acc": float(prediction == normalize(doc["answers"][0])), "parse_rate": float(parsed)}
    return with_telemetry(metrics, results[0], parsed=parsed)


def target_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of regression: `abs_error`, and `skill` = 1 - error / deviation.

    `deviation` is the mean absolute deviation of the training targets from their median: predicting the median has a
    skill of about 0, the true value has 1. Errors are capped at that of the training target farthest from the true
    value, which is also the error of an output without a number and of a failed sample: answering is never worse.
    """
    answer, parsed = _target(str(results[0]))
    number = _NUMBER.search(answer)
    parsed = parsed and number is not None
    error = abs(float(number[0].replace(",", "")) - doc["target"]) if number else doc["farthest"]
    scored = with_telemetry(_errors(doc, error, parsed=parsed), results[0], parsed=parsed)
    # A failed sample has 0 for every metric, which would be a perfect `abs_error`.
    failed = scored.get("kv", {}).get("status") == "error"
    return {**scored, **_errors(doc, doc["farthest"], parsed=False)} if failed else scored


def _errors(doc: Mapping[str, Any], uncapped: float, *, parsed: bool) -> dict[str, float]:
    error = min(uncapped, doc["farthest"])
    return {"abs_error": error, "skill": 1 - error / doc["deviation"], "parse_rate": float(parsed)}
