"""The differences between adapters in tuned.md: paired by question, from the committed scores.

python docs/studies/tuned.py keep FOLDER …    files the cells' scores by question in tuned-samples.json
python docs/studies/tuned.py table            prints the tables of tuned.md
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import mean

from lceval.results import read_runs
from lceval.stats import cluster_bootstrap

KEPT = Path(__file__).parent / "tuned-samples.json"
BASE, CONTROL, OTHERS = "none", "plain", ("aware", "twin")
METRICS = ("subem", "gold_kept")
FOUND = "what BM25 finds"
Scores = dict[str, float]


def keep(folders: list[Path]) -> None:
    """SubEM and gold_kept by context, recipe, adapter and question; and each question's cluster."""
    clusters: dict[str, str] = {}
    scores: dict[str, dict[str, dict[str, dict[str, Scores]]]] = {metric: {} for metric in METRICS}
    for run in sorted(read_runs(folders), key=lambda run: (run.tasks[0].context or "", run.recipe, run.peft or "")):
        (task,) = run.tasks
        shown = FOUND if str(task.context).startswith("rag") else "the whole context"
        name = Path(run.peft).name if run.peft else BASE
        for metric in METRICS:
            found = {s.id: {**s.metrics, **s.diagnosis}[metric] for s in task.samples}
            scores[metric].setdefault(shown, {}).setdefault(run.recipe, {})[name] = found
        clusters |= {s.id: s.cluster for s in task.samples}
    KEPT.write_text(json.dumps({"clusters": clusters, **scores}, separators=(",", ":")) + "\n")


def interval(values: Scores, clusters: dict[str, str], sign: str = "") -> str:
    """A mean in % with its interval, by cluster; alone where clusters do not differ."""
    middle, low, high = (100 * x for x in cluster_bootstrap([*values.values()], [clusters[key] for key in values]))
    return f"{middle:{sign}.1f}" + ("" if math.isnan(low) else f" [{low:{sign}.1f}, {high:{sign}.1f}]")


def minus(a: Scores, b: Scores) -> Scores:
    """The difference of each question."""
    return {key: value - b[key] for key, value in a.items()}


def mean_of(runs: list[Scores]) -> Scores:
    """The mean of each question."""
    return {key: mean(run[key] for run in runs) for key in runs[0]}


def seeds(scores: dict[str, Scores], arm: str) -> list[str]:
    """Of which an arm was measured."""
    return [name.partition("-")[2] for name in scores if name.startswith(f"{arm}-")]


def gain(scores: dict[str, Scores], arm: str) -> Scores:
    """What an arm adds to the control (the control to the base), over the seeds that both have."""
    against = BASE if arm == CONTROL else CONTROL
    pairs = [(f"{arm}-{seed}", against if against == BASE else f"{against}-{seed}") for seed in seeds(scores, arm)]
    return mean_of([minus(scores[a], scores[b]) for a, b in pairs])


def table() -> str:
    """SubEM in % of the control, and what arms add; also in the mean over all recipes that evict, and without the seed
    that was measured first."""
    kept = json.loads(KEPT.read_text())
    titles = ["seeds", CONTROL, f"{CONTROL} - {BASE}", *(f"{arm} - {CONTROL}" for arm in OTHERS)]
    lines = ["| context | recipe | " + " | ".join(titles) + " |", "| --- | --- |" + " ---: |" * len(titles)]
    for shown, recipes in kept["subem"].items():
        evicted = [scores for recipe, scores in recipes.items() if recipe != "full"]
        means = {name: mean_of([scores[name] for scores in evicted]) for name in evicted[0]}
        rows = {**recipes, "mean of those that evict": means}
        later = {name: scores for name, scores in means.items() if not name.endswith("-0")}
        if seeds(later, CONTROL):
            rows[f"the same, seeds {' and '.join(seeds(later, CONTROL))}"] = later
        for recipe, scores in rows.items():
            own = [scores[f"{CONTROL}-{seed}"] for seed in seeds(scores, CONTROL)]
            cells = [str(len(own)), interval(mean_of(own), kept["clusters"])]
            cells += [
                interval(gain(scores, arm), kept["clusters"], "+") if seeds(scores, arm) else "-"
                for arm in (CONTROL, *OTHERS)
            ]
            lines.append(f"| {shown} | {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def split() -> str:
    """Over retrieved passages, by whether the control's cache keeps more of the gold ones' slots than of all slots."""
    kept = json.loads(KEPT.read_text())
    part = [f"{CONTROL}", f"{OTHERS[0]} - {CONTROL}"]
    titles = ["n survived", *part, "n lost", *part]
    lines = ["| recipe | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for recipe, scores in kept["subem"][FOUND].items():
        if recipe != "full":
            names = [f"{CONTROL}-{seed}" for seed in seeds(scores, CONTROL)]
            own, added = mean_of([scores[name] for name in names]), gain(scores, OTHERS[0])
            shares = mean_of([kept["gold_kept"][FOUND][recipe][name] for name in names])
            there = {key for key, share in shares.items() if share > float(recipe.partition(":")[2])}
            cells = []
            for some in (there, own.keys() - there):
                cells.append(str(len(some)))
                for values, sign in ((own, ""), (added, "+")):
                    cells.append(interval({key: values[key] for key in values if key in some}, kept["clusters"], sign))
            lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"] and len(sys.argv) > 2:
        keep([Path(folder) for folder in sys.argv[2:]])
    elif sys.argv[1:] == ["table"]:
        print(table(), split(), sep="\n\n")
    else:
        raise SystemExit(__doc__)
