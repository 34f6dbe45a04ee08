"""The differences between adapters in tuned.md: paired by question, from the committed scores.

python docs/studies/tuned.py keep FOLDER …    files the cells' scores by question in tuned-samples.json
python docs/studies/tuned.py table            prints the table of tuned.md
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
Scores = dict[str, float]


def keep(folders: list[Path]) -> None:
    """SubEM by context, recipe, adapter and question; and each question's cluster."""
    clusters: dict[str, str] = {}
    scores: dict[str, dict[str, dict[str, Scores]]] = {}
    for run in sorted(read_runs(folders), key=lambda run: (run.tasks[0].context or "", run.recipe, run.peft or "")):
        (task,) = run.tasks
        shown = "what BM25 finds" if str(task.context).startswith("rag") else "the whole context"
        name = Path(run.peft).name if run.peft else BASE
        scores.setdefault(shown, {}).setdefault(run.recipe, {})[name] = {s.id: s.metrics["subem"] for s in task.samples}
        clusters |= {s.id: s.cluster for s in task.samples}
    KEPT.write_text(json.dumps({"clusters": clusters, "scores": scores}, separators=(",", ":")) + "\n")


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


def gain(scores: dict[str, Scores], arm: str) -> Scores:
    """What an arm adds to the control (the control to the base), over the seeds that both have."""
    seeds = [name.partition("-")[2] for name in scores if name.startswith(f"{arm}-")]
    against = BASE if arm == CONTROL else CONTROL
    pairs = [(f"{arm}-{seed}", against if against == BASE else f"{against}-{seed}") for seed in seeds]
    return mean_of([minus(scores[a], scores[b]) for a, b in pairs])


def table() -> str:
    """SubEM in % of the control, and what arms add; also in the mean over all recipes that evict."""
    kept = json.loads(KEPT.read_text())
    titles = ["seeds", CONTROL, f"{CONTROL} - {BASE}", *(f"{arm} - {CONTROL}" for arm in OTHERS)]
    lines = ["| context | recipe | " + " | ".join(titles) + " |", "| --- | --- |" + " ---: |" * len(titles)]
    for shown, recipes in kept["scores"].items():
        evicted = [scores for recipe, scores in recipes.items() if recipe != "full"]
        means = {name: mean_of([scores[name] for scores in evicted]) for name in evicted[0]}
        for recipe, scores in {**recipes, "mean of those that evict": means}.items():
            own = [values for name, values in scores.items() if name.startswith(f"{CONTROL}-")]
            cells = [str(len(own)), interval(mean_of(own), kept["clusters"])]
            cells += [interval(gain(scores, arm), kept["clusters"], "+") for arm in (CONTROL, *OTHERS)]
            lines.append(f"| {shown} | {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"] and len(sys.argv) > 2:
        keep([Path(folder) for folder in sys.argv[2:]])
    elif sys.argv[1:] == ["table"]:
        print(table())
    else:
        raise SystemExit(__doc__)
