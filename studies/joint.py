"""An adapter and learned eviction together: which way of training them keeps answers when the cache is small?

python studies/joint.py train [ARM-SEED ...]    train adapters, and the scorers of joint arms
python studies/joint.py measure [ARM-SEED ...]  answers and gold_nll under every recipe
python studies/joint.py keep ARM-SEED ...       save trained adapters with their scorers in 16 bit in studies/adapters
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
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from parts import Rows, added, bench, interval, samples, share, table

SAMPLES = Path(__file__).parent / "joint"
TABLES = Path(__file__).parents[1] / "docs" / "studies" / "joint-tables.md"
TITLE = "# Learned eviction and an adapter together: all tables\n\n"
RUNS = Path("runs/studies/joint")
KEPT, ADAPTER = Path("studies/adapters"), "adapter_model.safetensors"
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
# KVzip reads a context three more times: measured under two models.
WITH_KVZIP = ("ao-0", "joint-0")


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


def keep(models: Sequence[str]) -> None:
    """Save adapters and their scorers in 16 bit in the folder that is committed."""
    import torch
    from safetensors.torch import load_file, save_file

    for model in models:
        folder = KEPT / model
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.to(torch.bfloat16) for key, value in load_file(RUNS / model / ADAPTER).items()}
        save_file(weights, folder / ADAPTER, metadata={"format": "pt"})
        config = json.loads((RUNS / model / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "smollm2-135m"
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if model.startswith(OWN_SCORER):
            shutil.copytree(RUNS / model / "scorer", folder / "scorer", dirs_exist_ok=True)


def measure(models: Sequence[str]) -> None:
    """Answers and gold_nll under every recipe by the scorer of the arm; gold_nll alone where that is not its own."""
    for model in models:
        own = model.startswith(OWN_SCORER)
        for task, (metadata, contexts) in TASKS.items():
            options = {"contexts": contexts, "metadata": metadata, "peft": str(RUNS / model), "merge": True}
            if own:
                scorer = str(RUNS / model / "scorer")
                bench(RUNS, SAMPLES, f"{model}-own", task, ["full", *KVZAP], scorer=scorer, **options)
            recipes = ["full", *(["kvzip:0.25"] if model in WITH_KVZIP else []), *KVZAP]
            bench(RUNS, SAMPLES, f"{model}-start", task, recipes, scorer=str(START), nll_only=own, **options)
            options["metadata"] = {**metadata, "context": "none"}
            bench(RUNS, SAMPLES, f"{model}-none", task, ["full"], nll_only=True, **options)


def seeds(arm: str, scorer: str, task: str, kv: str = "full", metric: str = "gold_nll") -> tuple[int, ...]:
    """The seeds of which a metric was measured."""

    def has(seed: int) -> bool:
        rows = samples(SAMPLES, f"{arm}-{seed}-{scorer}", task).get(kv)
        return bool(rows) and next(iter(rows.values())).get(metric) is not None

    return tuple(filter(has, SEEDS))


def values(
    arm: str,
    scorer: str,
    task: str,
    kv: str,
    of_seeds: Sequence[int] | None = None,
    *,
    metric: str = "gold_nll",
    chosen_on: bool = False,
) -> Rows:
    """The metric of every reported question, its mean over the seeds (default: those that are measured).

    chosen_on: of the contexts for the choice instead.
    """
    by_question: dict[str, list[float]] = {}
    clusters: dict[str, str] = {}
    for seed in seeds(arm, scorer, task, kv, metric) if of_seeds is None else of_seeds:
        for key, row in samples(SAMPLES, f"{arm}-{seed}-{scorer}", task)[kv].items():
            by_question.setdefault(key, []).append(row[metric])
            clusters[key] = row["cluster"]
    first = list(dict.fromkeys(clusters.values()))[:CHOSEN_ON] if task == CHOICE else []
    return {
        key: (clusters[key], mean(of_question))
        for key, of_question in by_question.items()
        if (clusters[key] in first) == chosen_on
    }


def measured() -> list[tuple[str, str, int]]:
    """Every arm and scorer with the number of seeds that are measured."""
    pairs = [(arm, scorer) for arm in ARMS for scorer in ("start", *(["own"] if arm in OWN_SCORER else []))]
    counts = [(arm, scorer, len(seeds(arm, scorer, PRIMARY[0]))) for arm, scorer in pairs]
    return [row for row in counts if row[2]]


def tables() -> str:
    """All tables of the tables page."""
    parts = []
    for task in TASKS:
        parts += [f"## `{task}`: gold_nll, and what each budget adds to the full cache", of_task(task)]
        parts += [f"## `{task}`: share of the way from no context to full (%)", by_budget(task, way)]
        parts += [f"## `{task}`: SubEM (%), and what each budget keeps of it", answers(task)]
        parts += [f"## `{task}`: SubEM minus that of `ao`", by_budget(task, answers_above_ao)]
    parts += [f"## Primary cell, `{PRIMARY[0]}` under `{PRIMARY[1]}`: gold_nll minus that of `ao`", primary()]
    parts += ["## gold_nll on the contexts for the choice", by_budget(CHOICE, chosen_mean)]
    return "\n\n".join(parts) + "\n"


def beside_ao(arm: str, scorer: str, task: str, kv: str, metric: str = "gold_nll") -> tuple[Rows, Rows]:
    """A metric of an arm and of `ao`, of the seeds that both have."""
    both = sorted({*seeds(arm, scorer, task, kv, metric)} & {*seeds("ao", "start", task, kv, metric)})
    ours, theirs = (values(*of, task, kv, both, metric=metric) for of in ((arm, scorer), ("ao", "start")))
    return ours, theirs


def primary() -> str:
    """The differences in the primary cell, also where `ao` keeps more of the gold slots than on average, and less."""
    task, kv = PRIMARY
    kept = values("ao", "start", task, kv, metric="gold_kept")
    middle = mean(value for _, value in kept.values())
    more = {key for key, (_, value) in kept.items() if value > middle}
    body = []
    for arm, scorer, count in measured():
        if arm != "ao":
            ours, theirs = beside_ao(arm, scorer, task, kv)
            split = [{key: row for key, row in ours.items() if (key in more) == is_more} for is_more in (True, False)]
            body.append([name(arm, scorer), str(count), *(added(rows, theirs) for rows in (ours, *split))])
    heads = f"{len(more)} with more gold slots in `ao`", f"{len(kept) - len(more)} with less"
    return table(["arm", "seeds", "all questions", *heads], body)


def name(arm: str, scorer: str) -> str:
    return f"`{arm}`, scorer `{scorer}`"


def by_budget(task: str, cell: Callable[[str, str, str, str], str]) -> str:
    rows = [[name(arm, scorer), *(cell(arm, scorer, task, kv) for kv in KVZAP)] for arm, scorer, _ in measured()]
    return table(["arm", *KVZAP], rows)


def way(arm: str, scorer: str, task: str, kv: str) -> str:
    """The share of the way from no context to the full one, of the seeds of which both are measured."""
    both = sorted({*seeds(arm, "none", task)} & {*seeds(arm, scorer, task, kv)})
    rows, full, none = (
        values(arm, *of, both) for of in ((scorer, task, kv), (scorer, task, "full"), ("none", task, "full"))
    )
    return share(rows, full, none)


def answers_above_ao(arm: str, scorer: str, task: str, kv: str) -> str:
    return "-" if arm == "ao" else added(*beside_ao(arm, scorer, task, kv, "subem"))


def chosen_mean(arm: str, scorer: str, task: str, kv: str) -> str:
    rows = values(arm, scorer, task, kv, chosen_on=True)
    return f"{mean(nll for _, nll in rows.values()):.3f}" if rows else "-"


def of_task(task: str) -> str:
    """gold_nll under full of every arm and scorer, and what eviction adds to it."""
    rows = []
    for arm, scorer, count in measured():
        cells = []
        for kv in (*KVZAP, "kvzip:0.25"):
            same = seeds(arm, scorer, task, kv)
            cells.append(added(*(values(arm, scorer, task, of, same) for of in (kv, "full"))))
        rows.append([name(arm, scorer), str(count), interval(values(arm, scorer, task, "full")), *cells])
    return table(["arm", "seeds", "full", *KVZAP, "kvzip:0.25, seed 0"], rows)


def answers(task: str) -> str:
    """SubEM under full of every arm with the scorer it was trained with, and the share that eviction keeps."""
    rows = []
    for arm, scorer, _ in measured():
        if not (same := seeds(arm, scorer, task, metric="subem")):
            continue
        full = values(arm, scorer, task, "full", same, metric="subem")
        kept = [values(arm, scorer, task, kv, same, metric="subem") for kv in KVZAP]
        cells = [f"{interval(of, 100)}; {share(of, full)}" for of in kept]
        rows.append([name(arm, scorer), str(len(same)), interval(full, 100), *cells])
    return table(["arm", "seeds", "full", *(f"{kv}; retention" for kv in KVZAP)], rows)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train", *models] if {*models} <= {*MODELS}:
            train(models or MODELS)
        case ["measure", *models] if {*models} <= {*MODELS}:
            measure(models or MODELS)
        case ["keep", *models] if models and {*models} <= {*MODELS}:
            keep(models)
        case ["table"]:
            TABLES.write_text(TITLE + tables())
        case _:
            raise SystemExit(__doc__)
