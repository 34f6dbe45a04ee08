"""`lceval score`: a task's metrics on outputs of other tools.

Predictions are jsonl with `id` and `prediction`. Gold answers are those of the task's rows, matched by id, if the data
is available, else the `ground_truth` of each prediction. LOFT's own files (`qid`, `model_outputs`) are scored by LOFT's
metrics against its file of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lceval.core.errors import UserError
from lceval.core.io import read_objects
from lceval.core.text_tables import aligned
from lceval.stats.estimates import mean_of
from lceval.tasks import catalogue, lm_eval_config
from lceval.tasks.catalogue import Task
from lceval.tasks.icr import loft

SOURCES = ("rows", "ground_truth")


@dataclass(frozen=True)
class ScoredPrediction:
    """Scores of one prediction; None for a metric that does not apply to it."""

    id: str
    cluster: Hashable
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class Prediction:
    """A line of a predictions file; `truth` is None without a ground_truth."""

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
    """Report of `lceval score`; scores are in [0, 1].

    Args:
        name: a task, or one of `loft.SCORERS`.
        predictions: jsonl file.
        gold: LOFT's file of queries.
        by: "rows" or "ground_truth"; None for the rows if they can be built offline.
        metadata: lm_eval's `--metadata`, and the tokenizer for tasks with a length.

    Raises:
        UserError: an unknown task, a task without text outputs, no gold answers, or an invalid line.
    """
    if name in loft.SCORERS:
        if gold is None:
            raise UserError(f"{name} requires LOFT's file of queries: pass it as --gold.")
        return _report(name, *_by_queries(name, predictions, gold), matched_by="gold")
    if gold is not None:
        raise UserError(f"--gold is only for LOFT's files ({', '.join(loft.SCORERS)}), not for {name}.")
    if by not in (None, *SOURCES):
        raise UserError(f"--by {by!r}: expected one of {', '.join(SOURCES)}.")
    task = catalogue.find(name)
    config = lm_eval_config.task_config(task)
    if config["output_type"] != "generate_until":
        raise UserError(f"{name} is scored by log-likelihood: it has no text outputs to score.")
    predicted = _predictions(predictions)
    by = by or _source(task, predicted, metadata or {})
    if by == "ground_truth":
        samples = _by_truth(task, config["process_results"], predicted, predictions)
        missing: list[str] = []
    else:
        samples, missing = _by_rows(task, config["process_results"], predicted, metadata or {}, predictions)
    return _report(name, samples, missing, matched_by=by, headline=config["metadata"]["headline"])


def _source(task: Task, predicted: Mapping[str, Prediction], metadata: Mapping[str, Any]) -> str:
    """Rows if they can be built offline or there is no ground truth; else ground_truth."""
    from lceval.data import listing
    from lceval.tasks.tokens import names_tokenizer

    if not all(prediction.truth is not None for prediction in predicted.values()):
        return "rows"
    measured = task.length_k is None or names_tokenizer(metadata)
    return "rows" if measured and listing.at_hand(task.dataset) else "ground_truth"


def _keyed(file: Path, key: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Index the objects of a jsonl file by a unique id."""
    by_id: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, record in read_objects(file):
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise UserError(f"{where}: invalid {key}={value!r:.40}: expected a string or an integer.")
        if str(value) in by_id:
            raise UserError(f"{where}: duplicate {key}={value!r:.40}: each must be unique.")
        by_id[str(value)] = where, record
    if not by_id:
        raise UserError(f"{file} is empty: expected one JSON object per line.")
    return by_id


def _predictions(file: Path) -> dict[str, Prediction]:
    by_id = {}
    for id_, (where, record) in _keyed(file, "id").items():
        text = record.get("prediction")
        if not isinstance(text, str):
            raise UserError(
                f"{where}: invalid prediction={text!r:.40}: expected a string (an empty one counts as wrong)."
            )
        truth = record.get("ground_truth")
        answers = [truth] if isinstance(truth, str) else truth
        if answers is not None and not (
            isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
        ):
            raise UserError(f"{where}: invalid ground_truth={truth!r:.40}: expected a string or a list of strings.")
        by_id[id_] = Prediction(text, answers)
    return by_id


Scorer = Callable[[Mapping[str, Any], Sequence[Any]], dict[str, Any]]


def _by_truth(task: Task, scorer: Scorer, predicted: Mapping[str, Prediction], file: Path) -> list[ScoredPrediction]:
    samples = []
    for id_, prediction in predicted.items():
        if prediction.truth is None:
            raise UserError(f"{file} id={id_!r}: no ground_truth: add it to every prediction, or use --by rows.")
        try:
            scores = scorer({"answers": prediction.truth}, [prediction.text])
        except KeyError as error:
            raise UserError(
                f"{task.name} requires more fields of a row than its answers ({error}): use --by rows, with the data."
            ) from error
        except UserError as error:
            raise UserError(f"{file} id={id_!r}: {error}") from error
        samples.append(ScoredPrediction(id_, id_, scores))
    return samples


def _by_rows(
    task: Task, scorer: Scorer, predicted: Mapping[str, Prediction], metadata: Mapping[str, Any], file: Path
) -> tuple[list[ScoredPrediction], list[str]]:
    """Score every row; a row without a prediction is scored as an empty output."""
    from lceval import packaged
    from lceval.tasks import tokens
    from lceval.tasks.build import rows_of

    tokens.ALIASES.setdefault(packaged.NAME, lambda: str(packaged.folder()))
    rows = rows_of(task, metadata)
    unknown = sorted(predicted.keys() - {row["id"] for row in rows})
    if unknown:
        advice = " or pass --by ground_truth" if predicted[unknown[0]].truth is not None else ""
        raise UserError(
            f"{file} has {len(unknown)} ids that are not among the {len(rows)} rows of {task.name}, the first "
            f"{unknown[0]!r:.60}: the rows have ids like {rows[0]['id']!r:.60}; remove the other lines{advice}."
        )
    samples = [
        ScoredPrediction(
            row["id"], row["cluster"], scorer(row, [predicted[row["id"]].text if row["id"] in predicted else ""])
        )
        for row in rows
    ]
    return samples, [row["id"] for row in rows if row["id"] not in predicted]


def _by_queries(name: str, predictions: Path, gold: Path) -> tuple[list[ScoredPrediction], list[str]]:
    """Score every turn of every query; a query without a prediction is scored as empty outputs."""
    predicted, queries = _keyed(predictions, "qid"), _keyed(gold, "qid")
    unknown = sorted(predicted.keys() - queries.keys())
    if unknown:
        raise UserError(f"{predictions}: unknown qid={unknown[0]!r}: not in {gold}.")
    samples = []
    for id_, (where, query) in queries.items():
        answers = query.get("answers")
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{where}: invalid answers={answers!r:.40}: expected a non-empty list.")
        outputs: Any = (
            predicted[id_][1].get("model_outputs") if id_ in predicted else [[] for _ in range(loft.turns_of(answers))]
        )
        if not (isinstance(outputs, list) and outputs and all(isinstance(turn, list) for turn in outputs)):
            raise UserError(
                f"{predicted[id_][0]} has an invalid model_outputs={outputs!r:.40}: expected one list per turn."
            )
        try:
            turns = loft.turns(outputs, answers)
        except ValueError as error:
            raise UserError(f"{where} and its prediction do not match ({error}).") from error
        samples += [ScoredPrediction(id_, id_, loft.SCORERS[name](*turn)) for turn in turns]
    return samples, [id_ for id_ in queries if id_ not in predicted]


def _report(
    name: str, samples: Sequence[ScoredPrediction], missing: Sequence[str], *, matched_by: str, headline: str = ""
) -> dict[str, Any]:
    """Means with confidence intervals; None for a metric that applies to no prediction."""
    scores: dict[str, float | None] = {}
    intervals: dict[str, list[float] | None] = {}
    for metric in samples[0].scores:
        scored = [(float(value), sample.cluster) for sample in samples if (value := sample.scores[metric]) is not None]
        mean = mean_of([value for value, _ in scored], [cluster for _, cluster in scored])
        scores[metric], intervals[metric] = mean.value, mean.interval
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
    """Format the report, one metric per line; the headline is marked by *."""
    missing = f", {report['missing']} of them missing and scored as empty" if report["missing"] else ""
    head = f"{report['task']}: {report['n']} samples matched by {report['matched_by']}{missing}"
    rows = [("metric", "score", "95% interval")]
    for metric, value in report["scores"].items():
        formatted, interval = "n/a" if value is None else f"{value:.4f}", report["intervals"][metric]
        mark = "*" if metric == report["headline"] else ""
        bounds = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "-"
        rows.append((metric + mark, formatted, bounds))
    return f"{head}\n{aligned(rows, (0, 2))}"
