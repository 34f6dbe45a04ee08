"""Scorers alone: what a scorer should imitate, and how large it and its data should be.

python studies/scorers.py train [NAME ...]     train the scorers (2 to 25 minutes each on one core)
python studies/scorers.py choose [NAME ...]    gold_nll on the contexts for the choice
python studies/scorers.py measure [NAME ...]   gold_nll on SQuAD's test split; of the chosen one on further data sets
python studies/scorers.py table                write docs/studies/scorers-tables.md from the saved scores

`kvzip`, `kvzip-plus` and `attention` are those of studies/learned.py, which have to be trained first. The others
imitate KVzip+ too: by linear maps, from 5 instead of 48 contexts, and a larger one from 100. All are fitted on training
splits. Twelve annual reports that are reported nowhere choose. The model is the base model. Rerun the same command to
resume. Needs LCEVAL_DATA.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import learned
from parts import Rows, added, bench, interval, samples, share, table, train_scorer

SAMPLES = Path(__file__).parent / "scorers"
TABLES = Path(__file__).parents[1] / "docs" / "studies" / "scorers-tables.md"
TITLE = "# Scorers alone: all tables\n\n"
RUNS = Path("runs/studies/scorers")
OLD = ("kvzip", "kvzip-plus", "attention")
# Scorer -> recipe it starts from, and changes of it.
NEW: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("kvzip_linear", {"target": "kvzip+"}),
    "contexts-5": ("kvzip_mlp", {"target": "kvzip+", "contexts": 5}),
    "large-100": (
        "kvzip_mlp",
        {
            "target": "kvzip+",
            "contexts": 100,
            "data": {"seeds": [1, 2, 3]},
            "mlp": {"hidden": 96, "tokens": 100_000},
        },
    ),
}
SCORERS = (*OLD, *NEW)
BUDGETS = (0.5, 0.25, 0.1, 0.05)
KVZAP = [f"kvzap:{budget}" for budget in BUDGETS]
CHOICE = "lc_filings_ao_1k"
CHOICE_SEED = 1  # of the reports for the choice; the reported ones are those of seed 0
SQUAD = "lc_squad_ao_1k"
THRESHOLDS = [f"kvzap:threshold={value}" for value in (-6, -5, -4, -3)]
CHUNK, INT4 = "kvzap:0.25:when=chunk", "kvzap:0.25+int4"
# Task -> metadata, number of contexts, and recipes of the chosen scorer beside KVZAP. Other scorers are measured on
# SQuAD alone.
TASKS: dict[str, tuple[dict[str, Any], int | None, list[str]]] = {
    SQUAD: ({"split": "test", "questions": 4}, 80, [INT4, *THRESHOLDS]),
    "lc_nqopen_ao_2k": ({"split": "test", "questions": 4}, 20, ["kvzip:0.25"]),
    "lc_musique_ao_2k": ({"split": "test"}, 20, ["kvzip:0.25"]),
    "lc_nqopen_ao_4k": ({"split": "test", "questions": 4}, 10, [CHUNK, INT4]),
    "lc_nqopen_ao_8k": ({"split": "test", "questions": 4}, 5, [CHUNK, INT4]),
    CHOICE: ({}, None, ["kvzip:0.25"]),
}


def folder(name: str) -> Path:
    return (learned.RUNS if name in OLD else RUNS) / name


def train(names: Sequence[str]) -> None:
    """Train the scorers that studies/learned.py does not train."""
    for name in [name for name in names if name in NEW]:
        train_scorer(*NEW[name], folder(name), SAMPLES)


def choose(names: Sequence[str]) -> None:
    """gold_nll on the contexts for the choice."""
    for name in names:
        options: dict[str, Any] = {"contexts": None, "metadata": {"data_seed": CHOICE_SEED}, "nll_only": True}
        bench(RUNS, SAMPLES, f"choice-{name}", CHOICE, ["full", *KVZAP], scorer=str(folder(name)), **options)


def measure(names: Sequence[str]) -> None:
    """gold_nll on SQuAD; of the chosen scorer on all data sets; without a context."""
    for name in names:
        for task in TASKS if name == chosen() else [SQUAD]:
            metadata, contexts, others = TASKS[task]
            recipes = ["full", *KVZAP, *(others if name == chosen() else [])]
            options: dict[str, Any] = {"contexts": contexts, "metadata": metadata, "nll_only": True}
            bench(RUNS, SAMPLES, name, task, recipes, scorer=str(folder(name)), **options)
            options["metadata"] = {**metadata, "context": "none"}
            bench(RUNS, SAMPLES, "none", task, ["full"], **options)


def rows(part: str, task: str, kv: str, metric: str = "gold_nll") -> Rows:
    """A metric by question; empty where it is not measured."""
    return {key: (row["cluster"], row[metric]) for key, row in samples(SAMPLES, part, task).get(kv, {}).items()}


def choice(name: str) -> float:
    """The mean gold_nll over the budgets on the contexts for the choice; infinite where it is not measured."""
    of = [value for kv in KVZAP for _, value in rows(f"choice-{name}", CHOICE, kv).values()]
    return mean(of) if of else float("inf")


def chosen() -> str:
    return min(SCORERS, key=choice)


def tables() -> str:
    """All tables of the tables page."""
    body = []
    for name in SCORERS:
        record = json.loads(((learned.SAMPLES if name in OLD else SAMPLES) / f"{name}-scorer.json").read_text())
        full = rows(f"choice-{name}", CHOICE, "full")
        cells = [added(rows(f"choice-{name}", CHOICE, kv), full) for kv in KVZAP]
        overlaps = [f"{record['held_out']['overlap'][str(budget)]:.3f}" for budget in learned.BUDGETS]
        size = f"{record['scorer']['parameters'] * 2 / 1e6:.1f}"
        body.append([f"`{name}`", size, str(record["data"]["contexts"]), f"{choice(name):.3f}", *cells, *overlaps])
    head = ["scorer", "MB", "contexts", "mean gold_nll", *(f"added, {kv}" for kv in KVZAP)]
    parts = ["## On the contexts for the choice", table([*head, *(f"overlap at {b}" for b in learned.BUDGETS)], body)]
    for task, (*_, others) in TASKS.items():
        none, body, ways = rows("none", task, "full"), [], []
        recipes = [*KVZAP, *others]
        for name in SCORERS:
            if full := rows(name, task, "full"):
                of = [rows(name, task, kv) for kv in recipes]
                body.append([f"`{name}`", interval(full), *(added(losses, full) for losses in of)])
                ways.append([f"`{name}`", *(share(losses, full, none) for losses in of)])
        if body:
            parts += [f"## `{task}`: gold_nll, and what each recipe adds", table(["scorer", "full", *recipes], body)]
            parts += [f"## `{task}`: share of the way from no context to full (%)", table(["scorer", *recipes], ways)]
    parts += ["## A threshold on the scores instead of a budget", thresholds()]
    return "\n\n".join(parts) + "\n"


def thresholds() -> str:
    """The kept share of the cache and the added gold_nll on SQuAD under budgets and thresholds of the chosen scorer."""
    full, body = rows(chosen(), SQUAD, "full"), []
    for kv in (*KVZAP, *THRESHOLDS):
        kept = [100 * value for _, value in rows(chosen(), SQUAD, kv, "kept_share").values()]
        if kept:
            body.append([f"`{kv}`", f"{mean(kept):.1f}", added(rows(chosen(), SQUAD, kv), full)])
    return table(["recipe", "kept %", "added gold_nll"], body)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train" | "choose" | "measure" as step, *names] if {*names} <= {*SCORERS}:
            {"train": train, "choose": choose, "measure": measure}[step](names or SCORERS)
        case ["table"]:
            TABLES.write_text(TITLE + tables())
        case _:
            raise SystemExit(__doc__)
