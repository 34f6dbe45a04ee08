"""The study of docs/studies/tuned.md: differences between adapters, paired by question, from the committed scores.

python studies/tuned.py keep FOLDER …    save the scores of run folders by question in tuned-samples.json
python studies/tuned.py table            rewrite the differences in docs/studies/tuned-tables.md
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import mean

from lceval.records.results import read_runs
from lceval.stats.estimates import cluster_bootstrap

SAMPLES = Path(__file__).parent / "tuned-samples.json"
TABLES = Path(__file__).parents[1] / "docs" / "studies" / "tuned-tables.md"
MARK = "<!-- differences between adapters -->\n"
SWEEP_MARK = "<!-- the table of tuned.json -->\n"  # the rest of the page is written by sweeps.py
BASE, CONTROL, OTHERS = "none", "plain", ("compression-aware", "self-distillation")
METRICS = ("subem", "gold_kept")
RETRIEVED = "BM25"
Scores = dict[str, float]


def keep(folders: list[Path]) -> None:
    """Save SubEM and gold_kept by context, recipe, adapter and question, and the context of each question."""
    clusters: dict[str, str] = {}
    scores: dict[str, dict[str, dict[str, dict[str, Scores]]]] = {metric: {} for metric in METRICS}
    for run in sorted(read_runs(folders), key=lambda run: (run.tasks[0].context or "", run.recipe, run.peft or "")):
        (task,) = run.tasks
        setting = RETRIEVED if str(task.context).startswith("rag") else "full context"
        name = Path(run.peft).name if run.peft else BASE
        for metric in METRICS:
            values = {s.id: {**s.metrics, **s.diagnosis}[metric] for s in task.samples}
            scores[metric].setdefault(setting, {}).setdefault(run.recipe, {})[name] = values
        clusters |= {s.id: s.cluster for s in task.samples}
    SAMPLES.write_text(json.dumps({"clusters": clusters, **scores}, separators=(",", ":")) + "\n")


def interval(values: Scores, clusters: dict[str, str], sign: str = "") -> str:
    """Mean in % with its 95% interval over contexts; the mean alone where the interval is undefined."""
    middle, low, high = (100 * x for x in cluster_bootstrap([*values.values()], [clusters[key] for key in values]))
    return f"{middle:{sign}.1f}" + ("" if math.isnan(low) else f" [{low:{sign}.1f}, {high:{sign}.1f}]")


def minus(a: Scores, b: Scores) -> Scores:
    """a - b by question."""
    return {key: value - b[key] for key, value in a.items()}


def mean_of(runs: list[Scores]) -> Scores:
    """Mean over runs, by question."""
    return {key: mean(run[key] for run in runs) for key in runs[0]}


def seeds(scores: dict[str, Scores], arm: str) -> list[str]:
    """Seeds of an arm that have scores."""
    return [name.removeprefix(f"{arm}-") for name in scores if name.startswith(f"{arm}-")]


def gain(scores: dict[str, Scores], arm: str) -> Scores:
    """Gain of an arm over the control (of the control over the base), averaged over the seeds of the arm."""
    pairs = [(f"{arm}-{seed}", BASE if arm == CONTROL else f"{CONTROL}-{seed}") for seed in seeds(scores, arm)]
    return mean_of([minus(scores[a], scores[b]) for a, b in pairs])


def table() -> str:
    """SubEM in % of the control and gains of the arms; also averaged over all evictors, with and without seed 0."""
    committed = json.loads(SAMPLES.read_text())
    titles = ["seeds", CONTROL, f"{CONTROL} - base", *(f"{arm} - {CONTROL}" for arm in OTHERS)]
    lines = ["| context | recipe | " + " | ".join(titles) + " |", "| --- | --- |" + " ---: |" * len(titles)]
    for setting, recipes in committed["subem"].items():
        evicted = [scores for recipe, scores in recipes.items() if recipe != "full"]
        means = {name: mean_of([scores[name] for scores in evicted]) for name in evicted[0]}
        rows = {**recipes, "mean over evictors": means}
        later = {name: scores for name, scores in means.items() if not name.endswith("-0")}
        if seeds(later, CONTROL):
            rows[f"mean over evictors, seeds {' and '.join(seeds(later, CONTROL))}"] = later
        for recipe, scores in rows.items():
            own = [scores[f"{CONTROL}-{seed}"] for seed in seeds(scores, CONTROL)]
            cells = [str(len(own)), interval(mean_of(own), committed["clusters"])]
            cells += [
                interval(gain(scores, arm), committed["clusters"], "+") if seeds(scores, arm) else "-"
                for arm in (CONTROL, *OTHERS)
            ]
            lines.append(f"| {setting} | {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def split() -> str:
    """SubEM with BM25, split by whether the control keeps a larger share of the gold passages' slots than overall."""
    committed = json.loads(SAMPLES.read_text())
    part = [f"{CONTROL}", f"{OTHERS[0]} - {CONTROL}"]
    titles = ["n gold kept", *part, "n gold evicted", *part]
    lines = ["| recipe | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for recipe, scores in committed["subem"][RETRIEVED].items():
        if recipe != "full":
            names = [f"{CONTROL}-{seed}" for seed in seeds(scores, CONTROL)]
            own, gains = mean_of([scores[name] for name in names]), gain(scores, OTHERS[0])
            shares = mean_of([committed["gold_kept"][RETRIEVED][recipe][name] for name in names])
            kept = {key for key, share in shares.items() if share > float(recipe.partition(":")[2])}
            cells = []
            for keys in (kept, own.keys() - kept):
                cells.append(str(len(keys)))
                for values, sign in ((own, ""), (gains, "+")):
                    subset = {key: values[key] for key in values if key in keys}
                    cells.append(interval(subset, committed["clusters"], sign))
            lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> str:
    """The tables of differences."""
    heading = "## SubEM with BM25 by whether the gold passages were kept, in %"
    return f"## SubEM and differences between adapters, in %\n\n{table()}\n\n{heading}\n\n{split()}\n\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"] and len(sys.argv) > 2:
        keep([Path(folder) for folder in sys.argv[2:]])
    elif sys.argv[1:] == ["table"]:
        page = TABLES.read_text()
        TABLES.write_text(page.partition(MARK)[0] + MARK + tables() + SWEEP_MARK + page.partition(SWEEP_MARK)[2])
    else:
        raise SystemExit(__doc__)
