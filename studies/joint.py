"""An adapter and learned eviction together: which way of training them keeps answers when the cache is small?

python studies/joint.py train [ARM-SEED ...]    train adapters, and the scorers of joint arms
python studies/joint.py measure [ARM-SEED ...]  gold_nll of every recipe
python studies/joint.py table                   write docs/studies/joint-tables.md from the saved scores

All arms learn from the same contexts of SQuAD's training split, 40 steps of 2 contexts with 8 questions, from three
seeds: `ao` with the full cache; `under` under kvzap by a fixed scorer; `joint` with the scorer, through gates; `distil`
the same with self-distillation from the full cache. The scorer at the start is `kvzip-plus` of studies/learned.py,
which has to be trained first. Four annual reports choose between arms; SQuAD's test split and the other reports are
reported. Rerun the same command to resume. Everything trained and all samples are in runs/studies/joint. Needs
LCEVAL_DATA.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from learned import commit, table

from lceval.stats.estimates import Stratum, cluster_bootstrap, difference, recovery

SAMPLES = Path(__file__).parent / "joint"
TABLES = Path(__file__).parents[1] / "docs" / "studies" / "joint-tables.md"
TITLE = "# Learned eviction and an adapter together: all tables\n\n"
RUNS = Path("runs/studies/joint")
START = Path("runs/studies/learned/kvzip-plus")
SEEDS = (0, 1, 2)
LEARNED = {"evictors": ["kvzap"], "keep": [0.1, 0.5], "full": 0.3}
TRAINED = {"init": str(START), "learning_rate": 1e-3, "temperature": [1.0, 0.1]}
ARMS: dict[str, dict[str, Any] | None] = {
    "ao": None,
    "under": {**LEARNED, "scorer": {"init": str(START)}},
    "joint": {**LEARNED, "scorer": TRAINED},
    "distil": {**LEARNED, "scorer": TRAINED, "self_distillation": 1.0},
}
MODELS = [f"{arm}-{seed}" for arm in ARMS for seed in SEEDS]
OWN_SCORER = ("joint", "distil")
# Task -> metadata and number of contexts; None is all of them.
TASKS: dict[str, tuple[dict[str, Any], int | None]] = {
    "lc_squad_ao_1k": ({"split": "test", "questions": 4}, 80),
    "lc_filings_ao_1k": ({}, None),
}
# The first four annual reports choose between arms; they are not reported.
CHOICE, CHOSEN_ON = "lc_filings_ao_1k", 4
BUDGETS = (0.5, 0.25, 0.1)
KVZAP = [f"kvzap:{budget}" for budget in BUDGETS]
PRIMARY = "lc_squad_ao_1k", "kvzap:0.25"
METRICS = ("gold_nll", "gold_kept", "kept_share")


def train(models: Sequence[str]) -> None:
    """Train the adapters, with their scorers."""
    from lceval.training.config import parse
    from lceval.training.train import train as run

    for model in models:
        arm, _, seed = model.partition("-")
        recipe: dict[str, Any] = {
            "model": {"pretrained": "smollm2-135m", "dtype": "float32"},
            "data": {"datasets": ["squad"], "length_k": 1, "split": "train", "questions": 8, "seeds": [1, 2, 3]},
            "optim": {"learning_rate": 5e-4, "max_steps": 40, "contexts_per_step": 2},
            "compression_aware": ARMS[arm],
            "seed": int(seed),
            "save_steps": 10,
            "output": str(RUNS / model),
        }
        record = run(parse(recipe, model))
        committed = {key: record.get(key) for key in ("recipe", "data", "wall_s", "losses", "scorer")}
        SAMPLES.mkdir(exist_ok=True)
        (SAMPLES / f"{model}.json").write_text(json.dumps(committed) + "\n")
        shutil.rmtree(RUNS / model / "checkpoints", ignore_errors=True)


def measure(models: Sequence[str]) -> None:
    """gold_nll of all questions under every recipe, by the scorer of the model and by that of the start."""
    for model in models:
        scorers = {"start": START, **({"own": RUNS / model / "scorer"} if model.startswith(OWN_SCORER) else {})}
        for task in TASKS:
            for name, scorer in scorers.items():
                # What does not depend on the scorer is measured once.
                others = ["full", "kvzip:0.25"] if name == "start" else ["full"]
                bench(f"{model}-{name}", task, [*others, *KVZAP], peft=str(RUNS / model), scorer=str(scorer))
            metadata = {**TASKS[task][0], "context": "none"}
            bench(f"{model}-none", task, ["full"], peft=str(RUNS / model), metadata=metadata)


def bench(name: str, task: str, recipes: Sequence[str], **options: Any) -> None:
    """Run the missing samples of a part, and write METRICS by recipe and question to the folder that is committed."""
    from lceval.bench import comparison

    file = RUNS / "samples" / f"{name}-{task}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"contexts": TASKS[task][1], "metadata": TASKS[task][0], **options}
    comparison.bench(
        task,
        recipes,
        pretrained="smollm2-135m",
        against_hf=False,
        diagnose="gold",
        nll_only=True,
        batch_size=4,
        merge=True,
        output=file,
        **settings,
    )
    commit(file, SAMPLES / f"{name}-{task}.json", METRICS)


def losses(arm: str, scorer: str, task: str, kv: str, *, chosen_on: bool = False) -> dict[str, tuple[str, float]]:
    """Cluster and gold_nll of every reported question, the mean over the seeds that are measured.

    chosen_on: those on the contexts for the choice instead.
    """
    by_question: dict[str, list[float]] = {}
    clusters: dict[str, str] = {}
    for seed in SEEDS:
        file = SAMPLES / f"{arm}-{seed}-{scorer}-{task}.json"
        if not file.exists():
            continue
        committed = json.loads(file.read_text())
        clusters = committed["clusters"]
        for key, values in committed["scores"][kv].items():
            by_question.setdefault(key, []).append(values[0])
    first = list(dict.fromkeys(clusters.values()))[:CHOSEN_ON] if task == CHOICE else []
    return {
        key: (clusters[key], mean(values))
        for key, values in by_question.items()
        if (clusters[key] in first) == chosen_on
    }


def interval(rows: dict[str, tuple[str, float]]) -> str:
    """Mean with its 95% interval over contexts."""
    if not rows:
        return "-"
    middle, low, high = cluster_bootstrap([nll for _, nll in rows.values()], [cluster for cluster, _ in rows.values()])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def added(rows: dict[str, tuple[str, float]], base: dict[str, tuple[str, float]]) -> str:
    """The mean difference to other losses of the same questions, with its 95% interval over contexts."""
    if not rows or not base:
        return "-"
    values = [[of[key][1] for key in rows] for of in (rows, base)]
    estimate = difference([Stratum(values[0], values[1], [cluster for cluster, _ in rows.values()])])
    return f"{estimate.value:+.3f} [{estimate.lo:+.3f}, {estimate.hi:+.3f}]"


def way(arm: str, scorer: str, task: str, kv: str) -> str:
    """The share in % of the way from no context to the full one that a recipe keeps, with its 95% interval."""
    none, full, rows = (losses(arm, *of) for of in (("none", task, "full"), (scorer, task, "full"), (scorer, task, kv)))
    if not none:
        return "-"
    gains = [[none[key][1] - of[key][1] for key in rows] for of in (rows, full)]
    share = recovery([Stratum(gains[0], gains[1], [cluster for cluster, _ in rows.values()])])
    return "-" if share.value is None else f"{100 * share.value:.0f} [{100 * share.lo:.0f}, {100 * share.hi:.0f}]"


def measured() -> list[tuple[str, str, int]]:
    """Every arm and scorer with the number of seeds that are measured."""
    pairs = [(arm, scorer) for arm in ARMS for scorer in ("start", *(["own"] if arm in OWN_SCORER else []))]
    counts = [
        (arm, scorer, sum((SAMPLES / f"{arm}-{seed}-{scorer}-{PRIMARY[0]}.json").exists() for seed in SEEDS))
        for arm, scorer in pairs
    ]
    return [(arm, scorer, count) for arm, scorer, count in counts if count]


def tables() -> str:
    """All tables of the tables page."""
    parts = []
    for task in TASKS:
        parts += [f"## `{task}`: gold_nll, and what each budget adds to the full cache", of_task(task)]
    task, kv = PRIMARY
    base = losses("ao", "start", task, kv)
    rows = [
        [f"`{arm}`, scorer `{scorer}`", str(count), added(losses(arm, scorer, task, kv), base)]
        for arm, scorer, count in measured()
        if arm != "ao"
    ]
    parts += [f"## Primary cell, `{task}` under `{kv}`: gold_nll minus that of `ao`", table(["arm", "seeds", kv], rows)]
    ways = [
        [f"`{arm}`, scorer `{scorer}`", *(way(arm, scorer, task, of) for of in KVZAP)] for arm, scorer, _ in measured()
    ]
    parts += [f"## `{task}`: share of the way from no context to full (%)", table(["arm", *KVZAP], ways)]
    rows = [
        [f"`{arm}`, scorer `{scorer}`", *(chosen_mean(arm, scorer, of) for of in KVZAP)]
        for arm, scorer, _ in measured()
    ]
    parts += ["## gold_nll on the contexts for the choice", table(["arm", *KVZAP], rows)]
    return "\n\n".join(parts) + "\n"


def chosen_mean(arm: str, scorer: str, kv: str) -> str:
    rows = losses(arm, scorer, CHOICE, kv, chosen_on=True)
    return f"{mean(nll for _, nll in rows.values()):.3f}" if rows else "-"


def of_task(task: str) -> str:
    """gold_nll under full of every arm and scorer, and what eviction adds to it."""
    rows = []
    for arm, scorer, count in measured():
        full = losses(arm, scorer, task, "full")
        cells = [added(losses(arm, scorer, task, kv), full) for kv in KVZAP]
        kvzip = added(losses(arm, scorer, task, "kvzip:0.25"), full) if scorer == "start" else "-"
        rows.append([f"`{arm}`, scorer `{scorer}`", str(count), interval(full), *cells, kvzip])
    return table(["arm", "seeds", "full", *KVZAP, "kvzip:0.25"], rows)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train", *models] if {*models} <= {*MODELS}:
            train(models or MODELS)
        case ["measure", *models] if {*models} <= {*MODELS}:
            measure(models or MODELS)
        case ["table"]:
            TABLES.write_text(TITLE + tables())
        case _:
            raise SystemExit(__doc__)
