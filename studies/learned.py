"""A pilot of learned eviction: scorers of three targets, for the base and an adapter.

python studies/learned.py scorers [NAME]   train the scorers (about 12 minutes each on one core)
python studies/learned.py adapter          train the answer-only adapter
python studies/learned.py choose [MODEL]   gold_nll of every scorer on the contexts for the choice
python studies/learned.py measure [MODEL]  gold_nll of all methods and answers of four
python studies/learned.py table            write docs/studies/learned-tables.md from the saved scores

Scorers are fitted on training splits, chosen on four of the twelve annual reports, and reported on the test split of
SQuAD, the other reports and lists of UUIDs. Rerun the same command to resume. Everything trained and all samples are in
runs/studies/learned. Needs LCEVAL_DATA.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import parts
from parts import bench, table, train_scorer

from lceval.stats.estimates import Stratum, cluster_bootstrap, recovery

SAMPLES = Path(__file__).parent / "learned"
TABLES = Path(__file__).parents[1] / "docs" / "studies" / "learned-tables.md"
TITLE = "# Learned eviction: all tables\n\n"
RUNS = Path("runs/studies/learned")
# Scorer -> changes of the shipped recipe kvzip_mlp; `adapter` is trained with the adapter in place.
SCORERS: dict[str, dict[str, Any]] = {
    "kvzip": {},
    "kvzip-plus": {"target": "kvzip+"},
    "attention": {"target": "attention"},
    "adapter": {"model": {"peft": str(RUNS / "ao")}},
}
MODELS: dict[str, dict[str, Any]] = {"base": {}, "ao": {"peft": str(RUNS / "ao"), "merge": True}}
ADAPTER: dict[str, Any] = {
    "model": {"pretrained": "smollm2-135m", "dtype": "float32"},
    "data": {"datasets": ["squad"], "length_k": 1, "split": "train", "questions": 8, "seeds": [1, 2, 3]},
    "optim": {"learning_rate": 5e-4, "max_steps": 40, "contexts_per_step": 2},
}
# Task -> metadata and number of contexts; None is all of them.
TASKS: dict[str, tuple[dict[str, Any], int | None]] = {
    "lc_squad_ao_1k": ({"split": "test", "questions": 4}, 80),
    "lc_filings_ao_1k": ({}, None),
    "lc_kvlookup_ao_4k": ({}, 6),
}
CHOICE, CHOSEN_ON = "lc_filings_ao_1k", 4
BUDGETS = (0.5, 0.25, 0.1)
LEARNED = [f"kvzap:{budget}" for budget in BUDGETS]
OTHERS = [f"{name}:{budget}" for name in ("kvzip", "expected_attention", "snapkv") for budget in BUDGETS]
OTHERS += [f"random:{budget}:sinks=4:recent=64" for budget in BUDGETS]
ANSWERED = ["full", "kvzap:0.25", "kvzip:0.25", "snapkv:0.25"]
ANSWERED_TASKS = ("lc_squad_ao_1k", "lc_filings_ao_1k")


def train_scorers(names: Sequence[str]) -> None:
    """Train these scorers; that of the adapter after `adapter`."""
    for name in names:
        train_scorer("kvzip_mlp", SCORERS[name], RUNS / name, SAMPLES)


def train_adapter() -> None:
    """Train the answer-only adapter."""
    from lceval.training.config import parse
    from lceval.training.train import train

    train(parse({**ADAPTER, "output": str(RUNS / "ao")}, "ao"))


def choose(models: Sequence[str]) -> None:
    """gold_nll of every scorer on the contexts for the choice."""
    for model in models:
        for scorer in SCORERS:
            options = {**MODELS[model], "scorer": str(RUNS / scorer), "contexts": CHOSEN_ON, "nll_only": True}
            bench(RUNS, SAMPLES, f"choice-{model}-{scorer}", CHOICE, LEARNED, metadata={}, **options)


def chosen(model: str) -> str:
    """The scorer with the lowest mean gold_nll over the budgets on the contexts for the choice."""
    nll = {}
    for scorer in SCORERS:
        scores = samples(f"choice-{model}-{scorer}", CHOICE)
        nll[scorer] = mean(row["gold_nll"] for kv in LEARNED for row in scores[kv].values())
    return min(nll, key=lambda scorer: nll[scorer])


def measure(models: Sequence[str]) -> None:
    """gold_nll of all methods, answers of four of them, and both without a context."""
    for model in models:
        for task, (metadata, contexts) in TASKS.items():
            options = {"metadata": metadata, "contexts": contexts, **MODELS[model]}
            scorer = str(RUNS / chosen(model))
            recipes = ["full", *LEARNED, *OTHERS]
            bench(RUNS, SAMPLES, f"nll-{model}", task, recipes, nll_only=True, scorer=scorer, **options)
            if task in ANSWERED_TASKS:
                bench(RUNS, SAMPLES, f"answers-{model}", task, ANSWERED, scorer=scorer, **options)
            options["metadata"] = {**metadata, "context": "none"}
            bench(RUNS, SAMPLES, f"none-{model}", task, ["full"], nll_only=True, **options)


def samples(name: str, task: str) -> parts.Samples:
    """The committed scores of a part by recipe and question."""
    return parts.samples(SAMPLES, name, task)


def reported(name: str, task: str) -> parts.Samples:
    """The samples without those on the contexts for the choice."""
    every = samples(name, task)
    if task != CHOICE:
        return every
    clusters = list(dict.fromkeys(row["cluster"] for row in every["full"].values()))[:CHOSEN_ON]
    return {kv: {key: row for key, row in rows.items() if row["cluster"] not in clusters} for kv, rows in every.items()}


def interval(rows: dict[str, dict[str, Any]], metric: str, scale: float = 1.0) -> str:
    """Mean with its 95% interval over contexts."""
    values = [scale * row[metric] for row in rows.values()]
    middle, low, high = cluster_bootstrap(values, [row["cluster"] for row in rows.values()])
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def tables() -> str:
    """All tables of the tables page."""
    parts = ["## Choice of the scorer", choices()]
    for model in MODELS:
        parts += [f"## gold_nll, model `{model}`, scorer `{chosen(model)}`", losses(model)]
        parts += [f"## Share of the way from no context to full in gold_nll (%), model `{model}`", ways(model)]
        parts += [f"## SubEM (%), model `{model}`", answers(model)]
    return "\n\n".join(parts) + "\n"


def choices() -> str:
    """gold_nll of every scorer on the contexts for the choice, and its held-out figures."""
    rows = []
    for model in MODELS:
        for scorer in SCORERS:
            held_out = json.loads((SAMPLES / f"{scorer}-scorer.json").read_text())["held_out"]
            scores = samples(f"choice-{model}-{scorer}", CHOICE)
            losses_of = [f"{mean(row['gold_nll'] for row in scores[kv].values()):.3f}" for kv in LEARNED]
            overlaps = [f"{held_out['overlap'][str(budget)]:.3f}" for budget in BUDGETS]
            rows.append([f"`{model}`, `{scorer}`", *losses_of, f"{held_out['correlation']:.3f}", *overlaps])
    losses_head = [f"gold_nll at {budget}" for budget in BUDGETS]
    return table(["model, scorer", *losses_head, "correlation", *(f"overlap at {b}" for b in BUDGETS)], rows)


def losses(model: str) -> str:
    """gold_nll of all methods on all tasks."""
    scores = {task: reported(f"nll-{model}", task) for task in TASKS}
    none = {task: reported(f"none-{model}", task)["full"] for task in TASKS}
    rows = [["context=none", *(interval(none[task], "gold_nll") for task in TASKS)]]
    rows += [
        [f"`{kv}`", *(interval(scores[task][kv], "gold_nll") for task in TASKS)] for kv in ("full", *LEARNED, *OTHERS)
    ]
    return table(["recipe", *(f"`{task}`" for task in TASKS)], rows)


def ways(model: str) -> str:
    """How much of what the full context gains over none each recipe keeps, in gold_nll."""
    scores = {task: reported(f"nll-{model}", task) for task in TASKS}
    none = {task: reported(f"none-{model}", task)["full"] for task in TASKS}
    rows = [[f"`{kv}`", *(way(scores[task], none[task], kv) for task in TASKS)] for kv in (*LEARNED, *OTHERS)]
    return table(["recipe", *(f"`{task}`" for task in TASKS)], rows)


def way(scores: dict[str, dict[str, dict[str, Any]]], none: dict[str, dict[str, Any]], kv: str) -> str:
    """One cell of `ways`, with its 95% interval over contexts."""
    gains = [[none[key]["gold_nll"] - scores[of][key]["gold_nll"] for key in scores["full"]] for of in (kv, "full")]
    clusters = [row["cluster"] for row in scores["full"].values()]
    share = recovery([Stratum(gains[0], gains[1], clusters)])
    if share.value is None:
        return "-"
    bounds = "n/a" if share.lo is None or share.hi is None else f"{100 * share.lo:.0f}, {100 * share.hi:.0f}"
    return f"{100 * share.value:.0f} [{bounds}]"


def answers(model: str) -> str:
    """SubEM of four recipes."""
    scores = {task: reported(f"answers-{model}", task) for task in ANSWERED_TASKS}
    rows = [[f"`{kv}`", *(interval(scores[task][kv], "subem", 100) for task in ANSWERED_TASKS)] for kv in ANSWERED]
    return table(["recipe", *(f"`{task}`" for task in ANSWERED_TASKS)], rows)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["scorers", *names] if {*names} <= {*SCORERS}:
            train_scorers(names or list(SCORERS))
        case ["adapter"]:
            train_adapter()
        case ["choose", *models] if {*models} <= {*MODELS}:
            choose(models or list(MODELS))
        case ["measure", *models] if {*models} <= {*MODELS}:
            measure(models or list(MODELS))
        case ["table"]:
            TABLES.write_text(TITLE + tables())
        case _:
            raise SystemExit(__doc__)
