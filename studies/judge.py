"""The calibration tables of docs/judge.md: judges against the people who graded FinanceBench's predictions.

python docs/studies/judge.py run [NAME …]     measures; goes on where it stopped
python docs/studies/judge.py table            prints the tables of docs/judge.md from the committed verdicts

Committed are places, ids, grades and log-likelihoods, none of the predictions' text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lceval.judge.agreement import agreement

VERDICTS = Path(__file__).parent / "judge"
LABELS = ("correct", "incorrect", "refusal")
# name: the command's arguments
JUDGES: dict[str, list[str]] = {
    "rule": ["--judge", "rule", "--probes", "40"],
    "smollm2": ["--judge", "hf:smollm2-135m", "--limit", "200", "--max-characters", "1000", "--probes", "10"],
}
Row = dict[str, Any]


def measure(name: str) -> None:
    """Calibrate a judge and keep its verdicts, and what the probes did to it."""
    import contextlib
    import io

    from lceval.cli import invoke

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        output = str(VERDICTS / f"{name}.jsonl")
        code = invoke(["judge", "calibrate", *JUDGES[name], "--output", output, "--json"])
    if code:
        raise SystemExit(code)
    report = json.loads(said.getvalue())
    kept = {key: report[key] for key in ("judge", "revision", "rubric", "rule_based", "clipped", "probes")}
    (VERDICTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def rows(name: str) -> list[Row]:
    """The committed verdicts of a judge."""
    return [json.loads(line) for line in (VERDICTS / f"{name}.jsonl").read_text().splitlines()]


def as_given(found: list[Row]) -> list[str | None]:
    """The judge's verdicts as they are."""
    return [row["judge"] for row in found]


def less_its_habit(found: list[Row]) -> list[str | None]:
    """The label whose log-likelihood is highest above its own mean over the rows: what is left without the habit."""
    every = [row["log_likelihoods"] for row in found]
    habit = {label: sum(scores[label] for scores in every) / len(every) for label in LABELS}
    return [max(LABELS, key=lambda label, s=scores: s[label] - habit[label]) for scores in every]  # type: ignore[misc]


SIDES: list[tuple[str, str, Callable[[list[Row]], list[str | None]]]] = [
    ("`rule` (rule-based)", "rule", as_given),
    ("`hf:smollm2-135m`", "smollm2", as_given),
    ("the same, less its habit", "smollm2", less_its_habit),
]


def table() -> str:
    """One row a judge."""
    lines = ["| judge | n | unjudged | accuracy | most frequent label | kappa [95% CI] |", "| --- |" + " ---: |" * 5]
    for title, name, read in SIDES:
        found = rows(name)
        a = agreement(read(found), [row["human"] for row in found], [row["id"] for row in found], LABELS)
        interval = "n/a" if a["kappa_interval"] is None else "{:.2f}, {:.2f}".format(*a["kappa_interval"])
        cells = [title, a["n"], a["unjudged"], f"{a['accuracy']:.3f}", f"{a['majority']:.3f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{a['kappa']:.2f} [{interval}]"])) + " |")
    return "\n".join(lines)


def confusion(title: str) -> str:
    """How people's grades (rows) and a judge's (columns) fall together."""
    name, read = next((name, read) for side, name, read in SIDES if side == title)
    found = rows(name)
    counts = agreement(read(found), [r["human"] for r in found], [r["id"] for r in found], LABELS)["confusion"]
    lines = [f"| people | {' | '.join(LABELS)} |", "| --- |" + " ---: |" * len(LABELS)]
    return "\n".join(
        [*lines, *(f"| {one} | {' | '.join(str(n) for n in row.values())} |" for one, row in counts.items())]
    )


def attacks() -> str:
    """How many wrong answers passed as correct, by what was done to them."""
    reports = {name: json.loads((VERDICTS / f"{name}.json").read_text())["probes"] for name in JUDGES}
    sizes = {name: report["plain"]["n"] for name, report in reports.items()}
    lines = ["| done to a wrong answer | " + " | ".join(f"`{name}`, of {n}" for name, n in sizes.items()) + " |"]
    lines.append("| --- |" + " ---: |" * len(sizes))
    for probe, found in reports["rule"].items():
        counts = [str(report[probe]["fooled"]) for report in reports.values()]
        lines.append(f"| {found['about']} (`{probe}`) | {' | '.join(counts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    wanted = sys.argv[2:] or [*JUDGES]
    if sys.argv[1:2] == ["run"] and set(wanted) <= set(JUDGES):
        for judge in wanted:
            measure(judge)
    elif sys.argv[1:] == ["table"]:
        print(table(), *(f"{title}\n\n{confusion(title)}" for title, _, _ in SIDES), attacks(), sep="\n\n")
    else:
        raise SystemExit(__doc__)
