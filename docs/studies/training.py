"""The study of training.md: what fine-tuning buys on held-out questions, and whether it survives compression.

python docs/studies/training.py train [ARM …]     trains every seed of an arm; goes on where it stopped
python docs/studies/training.py answer [NAME …]   answers with the full cache; goes on where it stopped
python docs/studies/training.py cells [NAME …]    gold_nll under every recipe; goes on where it stopped
python docs/studies/training.py table             writes the tables of training.md anew from the committed samples

A NAME is `base`, `base-plain-text`, or an arm and a seed, as `plain-0`; adapters go to runs/studies/training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lceval.stats import cluster_bootstrap

SAMPLES = Path(__file__).parent / "training"
RUNS = Path("runs/studies/training")
TASK, METADATA = "lc_squad_ao_1k", {"split": "test", "questions": 5}
SEEDS = (0, 1, 2)
RECIPE: dict[str, Any] = {
    "model": {"pretrained": "smollm2-135m", "dtype": "bfloat16"},
    "data": {"datasets": ["squad"], "length_k": 1, "split": "train", "questions": 8, "seeds": [1, 2, 3]},
    "optim": {"lr": 5e-4, "steps": 60, "contexts": 2},
    "save_steps": 20,
    "keep_checkpoints": None,
}
EVICTORS = ["snapkv", "expected_attention", "knorm"]
# What is added to the recipe. `plain` is the other arms' control: the same data, steps and seeds.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "aware": {"robust": {"evictors": EVICTORS, "keep": [0.15, 1.0], "full": 0.3}},
}
CHECKPOINTS = (20, 40)
# streaming and tova are never used in training.
MARK = "<!-- tables of the committed samples -->\n"
CELLS = [f"{name}:{keep}" for keep in (0.5, 0.25) for name in (*EVICTORS, "streaming", "tova")]
COMPRESS = ("agnostic", "aware")


def train(arm: str) -> None:
    """Every seed of an arm."""
    from lceval.training.config import parse
    from lceval.training.run import train as run

    for seed in SEEDS:
        record = run(parse({**RECIPE, **ARMS[arm], "seed": seed, "output": str(RUNS / f"{arm}-{seed}")}, arm))
        kept = {key: record[key] for key in ("recipe", "data", "parameters", "wall_s", "losses")}
        SAMPLES.mkdir(exist_ok=True)
        (SAMPLES / f"{arm}-{seed}-train.json").write_text(json.dumps(kept) + "\n")


def names() -> list[str]:
    """All models, in the order of the tables."""
    return ["base", "base-plain-text", *(f"{arm}-{seed}" for arm in ARMS for seed in SEEDS)]


def curve() -> list[str]:
    """The checkpoints of the learning curve."""
    return [f"plain-0-step-{step}" for step in CHECKPOINTS]


def adapter(name: str) -> dict[str, str]:
    """The model argument that loads a model of the study."""
    if name.startswith("base"):
        return {}
    run, _, step = name.partition("-step-")
    return {"peft": str(RUNS / run / f"checkpoints/checkpoint-{step}" if step else RUNS / run)}


def answer(name: str) -> None:
    """Answers, and gold_nll, over the full cache."""
    measure(name, "full", ["full"], nll_only=False, template=name != "base-plain-text")


def cells(name: str) -> None:
    """gold_nll under every recipe."""
    for compress in COMPRESS:
        measure(name, compress, CELLS, nll_only=True, compress=compress)


def measure(name: str, what: str, recipes: Sequence[str], **options: Any) -> None:
    """Run what is missing of a file of samples."""
    from lceval.bench.evaluate import bench

    bench(
        TASK,
        recipes,
        pretrained="smollm2-135m",
        contexts=None,
        against_hf=False,
        diagnose="gold",
        metadata=METADATA,
        batch_size=5,
        output=SAMPLES / f"{name}-{what}.jsonl",
        **options,
        **adapter(name),
    )


Rows = dict[str, dict[str, Any]]


def samples(name: str, what: str, kv: str = "full") -> Rows:
    """The committed samples of a cell, by question."""
    lines = (SAMPLES / f"{name}-{what}.jsonl").read_text().splitlines()[1:]
    return {row["id"]: row for row in map(json.loads, lines) if row["kv"] == kv}


def interval(rows: Rows, value: Callable[[str], float], sign: str = "", scale: float = 1.0) -> str:
    """A mean with its interval, by context."""
    values = [scale * value(key) for key in rows]
    middle, low, high = cluster_bootstrap(values, [row["cluster"] for row in rows.values()])
    return f"{middle:{sign}.3g} [{low:{sign}.3g}, {high:{sign}.3g}]"


def mean_over(arm: str, what: str, kv: str, metric: str) -> Rows:
    """A question's value, the mean over the seeds of an arm: what varies between questions is left."""
    runs = [samples(f"{arm}-{seed}", what, kv) for seed in SEEDS]
    return {key: {**row, metric: sum(run[key][metric] for run in runs) / len(runs)} for key, row in runs[0].items()}


def answers_table() -> str:
    """SubEM (%), exact match (%) and gold_nll with the full cache, and the gain over the better base prompt."""
    bases = [name for name in ("base", "base-plain-text") if (SAMPLES / f"{name}-full.jsonl").exists()]
    base = max((samples(name, "full") for name in bases), key=lambda r: _mean(r, "subem"))
    lines = ["| model | n | SubEM % | EM % | gold_nll | SubEM - base |", "| --- |" + " ---: |" * 5]
    for name in [*names(), *curve()]:
        if not (SAMPLES / f"{name}-full.jsonl").exists():
            continue
        rows = samples(name, "full")
        if rows.keys() != base.keys():
            continue  # still being measured
        paired = interval(rows, lambda key, rows=rows: rows[key]["subem"] - base[key]["subem"], "+", 100)  # type: ignore[misc]
        gain = "-" if rows == base else paired
        shown = [interval(rows, lambda key, rows=rows, m=m: rows[key][m], "", s) for m, s in _SHOWN]  # type: ignore[misc]
        lines.append("| " + " | ".join([name, str(len(rows)), *shown, gain]) + " |")
    return "\n".join(lines)


_SHOWN = (("subem", 100), ("em", 100), ("gold_nll", 1))


def _mean(rows: Rows, metric: str) -> float:
    return sum(row[metric] for row in rows.values()) / len(rows)


def measured(compress: str) -> bool:
    """Whether the control's cells are there."""
    return all((SAMPLES / f"plain-{seed}-{compress}.jsonl").exists() for seed in SEEDS)


def cells_table(compress: str) -> str:
    """The rise of gold_nll over the own full cache: base, plain, each other arm, and their paired difference."""
    arms = [arm for arm in ARMS if all((SAMPLES / f"{arm}-{seed}-{compress}.jsonl").exists() for seed in SEEDS)]
    lines = ["| recipe | " + " | ".join([*arms, *(f"{arm} - plain" for arm in arms[1:])]) + " |"]
    lines.append("| --- |" + " ---: |" * (2 * len(arms) - 1))
    for kv in ["full", *CELLS]:
        found = {arm: mean_over(arm, compress, kv, "gold_nll") for arm in arms}
        full = {arm: mean_over(arm, compress, "full", "gold_nll") for arm in arms}

        def rise(arm: str, key: str, kv: str = kv, found: Any = found, full: Any = full) -> float:
            return float(found[arm][key]["gold_nll"] - (full[arm][key]["gold_nll"] if kv != "full" else 0))

        own = [interval(found[arm], lambda key, arm=arm: rise(arm, key), "+" if kv != "full" else "") for arm in arms]  # type: ignore[misc]
        against = [
            interval(found[arm], lambda key, arm=arm: rise(arm, key) - rise("plain", key), "+")  # type: ignore[misc]
            for arm in arms[1:]
        ]
        lines.append("| " + " | ".join([kv, *own, *against]) + " |")
    return "\n".join(lines)


def tables() -> str:
    """All tables, as they stand in training.md."""
    found = ["## With the full cache", answers_table()]
    for compress in filter(measured, COMPRESS):
        found += [f"## gold_nll under recipes, {compress}", cells_table(compress)]
    return "\n\n".join(found) + "\n"


if __name__ == "__main__":
    command, wanted = sys.argv[1:2], sys.argv[2:]
    if command == ["train"] and set(wanted) <= set(ARMS):
        for arm in wanted or ARMS:
            train(arm)
    elif command == ["answer"] and set(wanted) <= {*names(), *curve()}:
        for name in wanted or [*names(), *curve()]:
            answer(name)
    elif command == ["cells"] and set(wanted) <= set(names()):
        for name in wanted or [n for n in names() if n != "base-plain-text"]:
            cells(name)
    elif sys.argv[1:] == ["table"]:
        page = SAMPLES.with_suffix(".md")
        page.write_text(page.read_text().partition(MARK)[0] + MARK + tables())
    else:
        raise SystemExit(__doc__)
