"""`lceval judge calibrate`: agreement of a judge with the human labels of FinanceBench's predictions."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lceval.core.errors import UserError
from lceval.core.io import read_objects
from lceval.core.text_tables import aligned
from lceval.judge import kappas, probes, rubrics
from lceval.judge.backends.hf import SCORES
from lceval.judge.backends.rule import LABEL
from lceval.judge.client import Client
from lceval.judge.rubrics import Case
from lceval.stats import kappa

FILE = "financebench/human_graded_predictions.jsonl"
LABELS = {"Correct Answer": "correct", "Incorrect Answer": "incorrect", "Refusal": "refusal"}
SEED = 1234
PROBED_CHARACTERS = 300
"""Maximum length of the wrong answers used in injection probes."""


@dataclass(frozen=True)
class Graded:
    """A human-graded prediction: its line in the file (from 0), its question's id, the human label."""

    row: int
    question_id: str
    human: str
    case: Case


def graded(file: Path | None = None) -> list[Graded]:
    """The human-graded predictions.

    Raises:
        UserError: no data folder, no such file, or an invalid line.
    """
    if file is None:
        folder = os.environ.get("LCEVAL_DATA")
        if not folder:
            raise UserError(
                f"calibration requires {FILE}: set LCEVAL_DATA to the folder that contains it, or pass --data FILE"
            )
        file = Path(folder) / FILE
    predictions = []
    for number, (where, row) in enumerate(read_objects(file)):
        try:
            case = Case(str(row["question"]), (str(row["gold_answer"]),), str(row["model_answer"]))
            predictions.append(Graded(number, str(row["financebench_id"]), LABELS[row["label"]], case))
        except (KeyError, TypeError) as error:
            raise UserError(f"{where} is not a human-graded prediction of FinanceBench ({error!r:.80})") from None
    return predictions


def stratified(rows: Sequence[Graded], limit: int | None) -> list[Graded]:
    """`limit` rows, stratified by label and deterministic; in the file's order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    if limit < len(LABELS):
        raise UserError(f"--limit {limit}: expected {len(LABELS)} or more, one per label")
    rng = random.Random(SEED)
    pools = {label: [row for row in rows if row.human == label] for label in LABELS.values()}
    exact = {label: limit * len(pool) / len(rows) for label, pool in pools.items()}
    share = {label: int(value) for label, value in exact.items()}
    for label in sorted(exact, key=lambda one: share[one] - exact[one])[: limit - sum(share.values())]:
        share[label] += 1
    chosen = [row for label, pool in pools.items() for row in rng.sample(pool, share[label])]
    return sorted(chosen, key=lambda row: row.row)


def calibrate(
    client: Client, rows: Sequence[Graded], *, repeats: int = 1, probed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report, and one line per row with its index, id and labels, without text.

    Args:
        repeats: verdicts per row, with the labels in a different order each time.
        probed: number of injection probes; 0 disables them.
    """
    rubric = rubrics.load(kappas.RUBRIC)
    cases = [row.case for row in rows]
    rounds = [client.judge_all(rubric, cases, repeat=repeat) for repeat in range(repeats)]
    labels = [[None if v.grades is None else str(v.grades["verdict"]) for v in verdicts] for verdicts in rounds]
    wrong = [r.case for r in rows if r.human == "incorrect" and len(r.case.solution) <= PROBED_CHARACTERS][:probed]
    reasons = [verdict.reason for verdict in rounds[0] if verdict.grades is None]
    results = {
        "rubric": rubric.key,
        "data": FILE,
        **kappa.agreement(labels[0], [r.human for r in rows], [r.question_id for r in rows], [*LABELS.values()]),
        "reasons": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
        "clipped": sum(verdict.clipped > 0 for verdict in rounds[0]),
        "consistency": kappa.consistency(labels),
        "probes": probes.probe(client, rubric, wrong) if wrong else None,
    }
    lines = [
        {"row": row.row, "id": row.question_id, "human": row.human, "judge": label}
        | ({} if label else {"reason": verdict.reason})
        | _log_likelihoods(verdict.reply)
        for row, label, verdict in zip(rows, labels[0], rounds[0], strict=True)
    ]
    return client.report(results), lines


def _log_likelihoods(reply: str) -> dict[str, Any]:
    """The log-likelihoods of the labels, if the judge chose by them."""
    try:
        return {SCORES: json.loads(reply)[SCORES]["verdict"]}
    except (ValueError, KeyError, TypeError):
        return {}


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    interval = report["kappa_interval"]
    bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    judge = report["judge"] if not report["rule_based"] else f"{report['judge']} ({LABEL})"
    lines = [
        f"{judge}, rubric {report['rubric']}: {report['judged']} of {report['n']} judged, {report['unjudged']} unjudged"
        f", {report['clipped']} clipped",
        f"kappa {_number(report['kappa'])}{bounds} (95% CI over {report['clusters']} questions)",
        f"accuracy {_number(report['accuracy'])}; majority baseline {_number(report['majority'])}",
        "",
        aligned(
            [
                ["human / judge", *report["confusion"]],
                *([label, *map(str, row.values())] for label, row in report["confusion"].items()),
            ]
        ),
    ]
    if same := report["consistency"]:
        lines += ["", f"{same['repeats']} repeats: {same['unanimous']:.3f} of {same['cases']} rows unanimous"]
    if attacks := report["probes"]:
        rows = [["probe", "fooled", "flipped", "n", "modification of a wrong answer"]]
        rows += [
            [name, *(str(row[key]) for key in ("fooled", "flipped", "n", "about"))] for name, row in attacks.items()
        ]
        lines += ["", aligned(rows, left=(0, 4))]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
