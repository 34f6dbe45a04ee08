"""`lceval score`: a task's metrics on outputs that were made elsewhere.

Predictions are jsonl with `id` and `prediction`. What is right comes from the task's rows, matched by id, where the
data is at hand; else from a `ground_truth` beside each prediction. LOFT's own files (`qid`, `model_outputs`) are scored
by LOFT's metrics against its file of queries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lceval.errors import UserError
from lceval.stats import cluster_bootstrap
from lceval.tasks import catalogue
from lceval.tasks.catalogue import Task
from lceval.tasks.icr import loft

SOURCES = ("rows", "ground_truth")


@dataclass(frozen=True)
class Sample:
    """One prediction with its scores; None where a scorer does not apply to it."""

    id: str
    cluster: Hashable
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class Prediction:
    """One line of a predictions file; `truth` is None where the line has none."""

    text: str
    truth: list[str] | None


def score(
    name: str,
    predictions: Path,
    *,
    gold: Path | None = None,
    by: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report of `lceval score`; scores are shares between 0 and 1.

    Args:
        name: a task, or one of `loft.SCORERS`.
        gold: LOFT's file of queries.
        by: "rows" or "ground_truth"; None takes the rows where they can be built without a network.
        metadata: what lm_eval's `--metadata` takes, and the tokenizer of tasks that measure a length.

    Raises:
        UserError: no such task, one without text outputs, no truth at hand, or a line that does not fit.
    """
    if name in loft.SCORERS:
        if gold is None:
            raise UserError(f"{name} compares with LOFT's queries: pass their file as --gold.")
        return _report(name, *_by_queries(name, predictions, gold), matched_by="gold")
    if gold is not None:
        raise UserError(f"--gold is for LOFT's files ({', '.join(loft.SCORERS)}); {name} has its rows.")
    if by not in (None, *SOURCES):
        raise UserError(f"--by {by!r}: expected one of {', '.join(SOURCES)}.")
    task = catalogue.find(name)
    config = catalogue.task_config(task)
    if config["output_type"] != "generate_until":
        raise UserError(f"{name} is scored by log-likelihood: there is no text to score.")
    said = _predictions(predictions)
    by = by or _source(task, said, metadata or {})
    if by == "ground_truth":
        samples = _by_truth(task, config["process_results"], said, predictions)
        missing: list[str] = []
    else:
        samples, missing = _by_rows(task, config["process_results"], said, metadata or {}, predictions)
    return _report(name, samples, missing, matched_by=by, headline=config["metadata"]["headline"])


def _source(task: Task, said: Mapping[str, Prediction], metadata: Mapping[str, Any]) -> str:
    """Rows where they can be built here, or where there is nothing else."""
    from lceval import listing
    from lceval.tasks.tokens import names_tokenizer

    if not all(prediction.truth is not None for prediction in said.values()):
        return "rows"
    measured = task.length_k is None or names_tokenizer(metadata)
    return "rows" if measured and listing.at_hand(task.dataset) else "ground_truth"


def _lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a jsonl file, each with its place."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"cannot read {file}: {reason}.") from error
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}): expected one object a line.") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} is a {type(record).__name__}: expected an object.")
        found.append((where, record))
    if not found:
        raise UserError(f"{file} is empty: expected one JSON object a line.")
    return found


def _keyed(file: Path, key: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The objects by an id that each has and no two share."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, record in _lines(file):
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise UserError(f"{where} has {key}={value!r:.40}: expected a string or a whole number.")
        if str(value) in found:
            raise UserError(f"{where} has {key}={value!r:.40} a second time: each must be unique.")
        found[str(value)] = where, record
    return found


def _predictions(file: Path) -> dict[str, Prediction]:
    found = {}
    for id_, (where, record) in _keyed(file, "id").items():
        text = record.get("prediction")
        if not isinstance(text, str):
            raise UserError(f"{where} has prediction={text!r:.40}: expected a string (an empty one counts as wrong).")
        truth = record.get("ground_truth")
        answers = [truth] if isinstance(truth, str) else truth
        if answers is not None and not (
            isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
        ):
            raise UserError(f"{where} has ground_truth={truth!r:.40}: expected a string or a list of strings.")
        found[id_] = Prediction(text, answers)
    return found


Scorer = Callable[[Mapping[str, Any], Sequence[Any]], dict[str, Any]]


def _by_truth(task: Task, scorer: Scorer, said: Mapping[str, Prediction], file: Path) -> list[Sample]:
    samples = []
    for id_, prediction in said.items():
        if prediction.truth is None:
            raise UserError(f"{file} id={id_!r} has no ground_truth: give one with every prediction, or score by rows.")
        try:
            scores = scorer({"answers": prediction.truth}, [prediction.text])
        except KeyError as error:
            raise UserError(
                f"{task.name} needs more of a row than its answers ({error}): score by rows, with the data at hand."
            ) from error
        except UserError as error:
            raise UserError(f"{file} id={id_!r}: {error}") from error
        samples.append(Sample(id_, id_, scores))
    return samples


def _by_rows(
    task: Task, scorer: Scorer, said: Mapping[str, Prediction], metadata: Mapping[str, Any], file: Path
) -> tuple[list[Sample], list[str]]:
    """Every row with its prediction; a row without one is scored as an empty output."""
    from lceval.models import packaged
    from lceval.tasks import tokens
    from lceval.tasks.build import rows_of

    tokens.ALIASES.setdefault(packaged.NAME, lambda: str(packaged.folder()))
    rows = rows_of(task, metadata)
    unknown = sorted(said.keys() - {row["id"] for row in rows})
    if unknown:
        advice = " or pass --by ground_truth" if said[unknown[0]].truth is not None else ""
        raise UserError(
            f"{file} has {len(unknown)} ids that the {len(rows)} rows of {task.name} do not have, the first "
            f"{unknown[0]!r:.60}: the rows have ids like {rows[0]['id']!r:.60}; take the other lines out{advice}."
        )
    samples = [
        Sample(row["id"], row["cluster"], scorer(row, [said[row["id"]].text if row["id"] in said else ""]))
        for row in rows
    ]
    return samples, [row["id"] for row in rows if row["id"] not in said]


def _by_queries(name: str, predictions: Path, gold: Path) -> tuple[list[Sample], list[str]]:
    """Every turn of every query; one without a prediction is scored as an empty output."""
    said, queries = _keyed(predictions, "qid"), _keyed(gold, "qid")
    unknown = sorted(said.keys() - queries.keys())
    if unknown:
        raise UserError(f"{predictions} has qid={unknown[0]!r} that {gold} does not have.")
    samples = []
    for id_, (where, query) in queries.items():
        answers = query.get("answers")
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{where} has answers={answers!r:.40}: expected a list of one or more.")
        outputs: Any = said[id_][1].get("model_outputs") if id_ in said else [[] for _ in range(loft.turns_of(answers))]
        if not (isinstance(outputs, list) and outputs and all(isinstance(turn, list) for turn in outputs)):
            raise UserError(f"{said[id_][0]} has model_outputs={outputs!r:.40}: expected a list for each turn.")
        try:
            turns = loft.turns(outputs, answers)
        except ValueError as error:
            raise UserError(f"{where} and its prediction do not fit ({error}).") from error
        samples += [Sample(id_, id_, loft.SCORERS[name](*turn)) for turn in turns]
    return samples, [id_ for id_ in queries if id_ not in said]


def _report(
    name: str, samples: Sequence[Sample], missing: Sequence[str], *, matched_by: str, headline: str = ""
) -> dict[str, Any]:
    """Means with intervals; a scorer that applies to no sample has neither."""
    scores: dict[str, float | None] = {}
    intervals: dict[str, list[float] | None] = {}
    for scorer in samples[0].scores:
        known = [(float(value), sample.cluster) for sample in samples if (value := sample.scores[scorer]) is not None]
        mean, low, high = cluster_bootstrap([value for value, _ in known], [cluster for _, cluster in known])
        scores[scorer] = None if math.isnan(mean) else mean
        intervals[scorer] = None if math.isnan(low) else [low, high]
    return {
        "task": name,
        "n": len(samples),
        "missing": len(missing),
        "missing_ids": list(missing),
        "matched_by": matched_by,
        "clusters": len({sample.cluster for sample in samples}),
        "headline": headline or next(iter(scores)),
        "scores": scores,
        "intervals": intervals,
    }


def render(report: Mapping[str, Any]) -> str:
    """The report as text, one scorer a line, the headline marked."""
    missing = f", {report['missing']} of them missing and scored as empty" if report["missing"] else ""
    head = f"{report['task']}: {report['n']} samples matched by {report['matched_by']}{missing}"
    width = max(len(scorer) for scorer in report["scores"]) + 2
    lines = []
    for scorer, value in report["scores"].items():
        shown, interval = "n/a" if value is None else f"{value:.4f}", report["intervals"][scorer]
        mark = "*" if scorer == report["headline"] else ""
        bounds = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "-"
        lines.append(f"{scorer + mark:<{width}}{shown:>7}  {bounds}")
    return "\n".join([head, f"{'scorer':<{width}}{'score':>7}  95% interval", *lines])
