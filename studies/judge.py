"""The calibration tables of docs/judge.md: agreement of judges with FinanceBench's human labels.

python studies/judge.py run [NAME …]     grade the predictions
python studies/judge.py table            print the tables of docs/judge.md from the committed verdicts

Row numbers, ids, grades and log-likelihoods are committed, texts of predictions are not. Rerun the same command to
resume.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lceval.stats.kappa import agreement

VERDICTS = Path(__file__).parent / "judge"
LABELS = ("correct", "incorrect", "refusal")
# Arguments of `lceval judge calibrate` by judge.
JUDGES: dict[str, list[str]] = {
    "rule": ["--judge", "rule", "--probes", "40"],
    "smollm2": ["--judge", "hf:smollm2-135m", "--limit", "200", "--max-characters", "1000", "--probes", "10"],
}
Row = dict[str, Any]


def measure(name: str) -> None:
    """Calibrate a judge; save its verdicts and the results of the injection probes."""
    import contextlib
    import io

    from lceval.cli import invoke

    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        output = str(VERDICTS / f"{name}.jsonl")
        code = invoke(["judge", "calibrate", *JUDGES[name], "--output", output, "--json"])
    if code:
        raise SystemExit(code)
    report = json.loads(stdout.getvalue())
    summary = {key: report[key] for key in ("judge", "revision", "rubric", "rule_based", "clipped", "probes")}
    (VERDICTS / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")


def rows(name: str) -> list[Row]:
    """Committed verdicts of a judge."""
    return [json.loads(line) for line in (VERDICTS / f"{name}.jsonl").read_text().splitlines()]


def raw(verdicts: list[Row]) -> list[str | None]:
    """The judge's labels."""
    return [row["judge"] for row in verdicts]


def prior_corrected(verdicts: list[Row]) -> list[str | None]:
    """The label whose log-likelihood exceeds its mean over all rows the most: removes the judge's label prior."""
    scores = [row["log_likelihoods"] for row in verdicts]
    prior = {label: sum(row[label] for row in scores) / len(scores) for label in LABELS}
    return [max(LABELS, key=lambda label, row=row: row[label] - prior[label]) for row in scores]  # type: ignore[misc]


SIDES: list[tuple[str, str, Callable[[list[Row]], list[str | None]]]] = [
    ("`rule` (rule-based)", "rule", raw),
    ("`hf:smollm2-135m`", "smollm2", raw),
    ("`hf:smollm2-135m`, label prior removed", "smollm2", prior_corrected),
]


def table() -> str:
    """Agreement with the human labels, one row per judge."""
    lines = ["| judge | n | unjudged | accuracy | most frequent label | kappa [95% CI] |", "| --- |" + " ---: |" * 5]
    for title, name, labels in SIDES:
        verdicts = rows(name)
        a = agreement(labels(verdicts), [row["human"] for row in verdicts], [row["id"] for row in verdicts], LABELS)
        interval = "n/a" if a["kappa_interval"] is None else "{:.2f}, {:.2f}".format(*a["kappa_interval"])
        cells = [title, a["n"], a["unjudged"], f"{a['accuracy']:.3f}", f"{a['majority']:.3f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{a['kappa']:.2f} [{interval}]"])) + " |")
    return "\n".join(lines)


def confusion(title: str) -> str:
    """Confusion matrix: human labels in rows, the judge's in columns."""
    name, labels = next((name, labels) for side, name, labels in SIDES if side == title)
    verdicts = rows(name)
    humans, ids = [row["human"] for row in verdicts], [row["id"] for row in verdicts]
    counts = agreement(labels(verdicts), humans, ids, LABELS)["confusion"]
    lines = [f"| human label | {' | '.join(LABELS)} |", "| --- |" + " ---: |" * len(LABELS)]
    return "\n".join(
        [*lines, *(f"| {label} | {' | '.join(str(n) for n in row.values())} |" for label, row in counts.items())]
    )


def attacks() -> str:
    """Wrong answers graded as correct, by injection probe."""
    reports = {name: json.loads((VERDICTS / f"{name}.json").read_text())["probes"] for name in JUDGES}
    sizes = {name: report["plain"]["n"] for name, report in reports.items()}
    lines = ["| probe | " + " | ".join(f"`{name}`, of {n}" for name, n in sizes.items()) + " |"]
    lines.append("| --- |" + " ---: |" * len(sizes))
    for probe, result in reports["rule"].items():
        counts = [str(report[probe]["fooled"]) for report in reports.values()]
        lines.append(f"| {result['about']} (`{probe}`) | {' | '.join(counts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    selected = sys.argv[2:] or [*JUDGES]
    if sys.argv[1:2] == ["run"] and set(selected) <= set(JUDGES):
        for judge in selected:
            measure(judge)
    elif sys.argv[1:] == ["table"]:
        print(table(), *(f"{title}\n\n{confusion(title)}" for title, _, _ in SIDES), attacks(), sep="\n\n")
    else:
        raise SystemExit(__doc__)
