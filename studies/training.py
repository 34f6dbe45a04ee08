"""The study of training.md: what fine-tuning buys on held-out questions, and whether it survives compression.

python docs/studies/training.py train [ARM …]     trains every seed of an arm; goes on where it stopped
python docs/studies/training.py answer [NAME …]   answers with the full cache; goes on where it stopped
python docs/studies/training.py longer [NAME …]   the same at twice the length
python docs/studies/training.py evicted [NAME …]  answers from a quarter of the cache; goes on where it stopped
python docs/studies/training.py cells [NAME …]    gold_nll under every recipe; goes on where it stopped
python docs/studies/training.py table             writes the tables of training.md anew from the committed samples

A NAME is one of BASES, or an arm and a seed, as `plain-0`; adapters go to runs/studies/training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from lceval.stats import cluster_bootstrap

SAMPLES = Path(__file__).parent / "training"
RUNS = Path("runs/studies/training")
TASK, METADATA = "lc_squad_ao_1k", {"split": "test", "questions": 5}
LONGER = "lc_squad_ao_2k"
# The base and how it is asked: with its chat template or without, the reply its own or begun for it.
BASES: dict[str, dict[str, Any]] = {
    "base": {},
    "base-begun": {"begin": "Answer:"},
    "base-plain-text": {"template": False},
    "base-plain-text-begun": {"template": False, "begin": "Answer:"},
}
SEEDS = (0, 1, 2)
RECIPE: dict[str, Any] = {
    "model": {"pretrained": "smollm2-135m", "dtype": "bfloat16"},
    "data": {"datasets": ["squad"], "length_k": 1, "split": "train", "questions": 8, "seeds": [1, 2, 3]},
    "optim": {"learning_rate": 5e-4, "max_steps": 60, "contexts_per_step": 2},
    "save_steps": 20,
    "keep_checkpoints": None,
}
EVICTORS = ["snapkv", "expected_attention", "knorm"]
# What is added to the recipe. `plain` is the other arms' control: the same data, steps and seeds.
DRAWN: dict[str, Any] = {"evictors": EVICTORS, "keep": [0.15, 1.0], "full": 0.3}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "aware": {"robust": DRAWN},
    "twin": {"robust": {**DRAWN, "full": 0.0, "distill": 1.0}},
}
CHECKPOINTS = (20, 40)
METRICS = ("subem", "em", "gold_nll", "gold_kept")
# streaming and tova are never used in training.
MARK = "<!-- tables of the committed samples -->\n"
CELLS = [f"{name}:{keep}" for keep in (0.5, 0.25) for name in (*EVICTORS, "streaming", "tova")]
GENERATED = ["snapkv:0.25", "expected_attention:0.25", "tova:0.25"]
ASKED = ["tova:0.25"]  # with the question in the scores
# Several recipes or lengths take long in float32; models are compared with each other, and all are in bfloat16.
FAST: dict[str, Any] = {"dtype": "bfloat16", "merge": True}
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
    return [*BASES, *tuned()]


def tuned() -> list[str]:
    """The models that were trained to the end."""
    return [f"{arm}-{seed}" for arm in ARMS for seed in SEEDS]


def curve() -> list[str]:
    """The checkpoints of the learning curve."""
    return [f"plain-0-step-{step}" for step in CHECKPOINTS]


def adapter(name: str) -> dict[str, str]:
    """The model argument that loads a model of the study."""
    if name in BASES:
        return {}
    run, _, step = name.partition("-step-")
    return {"peft": str(RUNS / run / f"checkpoints/checkpoint-{step}" if step else RUNS / run)}


def answer(name: str) -> None:
    """Answers, and gold_nll, over the full cache."""
    measure(name, "full", ["full"], **BASES.get(name, {}))


def longer(name: str) -> None:
    """The same of contexts twice as long as those trained on."""
    measure(name, "longer", ["full"], task=LONGER, dtype="bfloat16", merge=name not in BASES, **BASES.get(name, {}))


def evicted(name: str) -> None:
    """Answers from a quarter of the cache, and from all of it."""
    measure(name, "evicted", ["full", *GENERATED], **FAST)
    measure(name, "asked", ASKED, compress="aware", **FAST)


def cells(wanted: Sequence[str]) -> None:
    """gold_nll under every recipe: of all these models without the question first."""
    for compress, name in product(COMPRESS, wanted):
        measure(name, compress, CELLS, nll_only=True, compress=compress, **FAST)


def measure(name: str, what: str, recipes: Sequence[str], task: str = TASK, **options: Any) -> None:
    """Run what is missing of a file of samples."""
    from lceval.bench.evaluate import bench

    bench(
        task,
        recipes,
        pretrained="smollm2-135m",
        contexts=None,
        against_hf=False,
        diagnose="gold",
        metadata=METADATA,
        batch_size=5,
        output=RUNS / "samples" / f"{name}-{what}.jsonl",
        **options,
        **adapter(name),
    )
    keep(name, what)


def keep(name: str, what: str) -> None:
    """What is committed of a finished measurement: for every recipe and question the METRICS."""
    settings, *rows = map(json.loads, (RUNS / "samples" / f"{name}-{what}.jsonl").read_text().splitlines())
    scores: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        scores.setdefault(row["kv"], {})[row["id"]] = [row.get(metric) for metric in METRICS]
    clusters = {row["id"]: row["cluster"] for row in rows}
    kept = {"settings": settings, "metrics": METRICS, "clusters": clusters, "scores": scores}
    SAMPLES.mkdir(exist_ok=True)
    (SAMPLES / f"{name}-{what}.json").write_text(json.dumps(kept, separators=(",", ":")) + "\n")


Rows = dict[str, dict[str, Any]]
Values = dict[str, float]


def samples(name: str, what: str, kv: str = "full") -> Rows:
    """The committed samples of a cell, by question."""
    kept = json.loads((SAMPLES / f"{name}-{what}.json").read_text())
    return {
        key: {"cluster": kept["clusters"][key], **dict(zip(kept["metrics"], scores, strict=True))}
        for key, scores in kept["scores"][kv].items()
    }


def interval(values: Values, clusters: dict[str, str], sign: str = "", scale: float = 1.0) -> str:
    """A mean with its interval, by context; alone where all values are the same."""
    if len({*values.values()}) == 1:
        return f"{scale * next(iter(values.values())):{sign}.3g}"
    found = cluster_bootstrap([scale * x for x in values.values()], [clusters[key] for key in values])
    middle, low, high = (round(x, 9) + 0.0 for x in found)  # means of three seeds may miss 0 by a last bit
    return f"{middle:{sign}.3g} [{low:{sign}.3g}, {high:{sign}.3g}]"


def minus(a: Values, b: Values) -> Values:
    """The difference of each of a's questions."""
    return {key: value - b[key] for key, value in a.items()}


def exists(what: str, *names: str) -> bool:
    """Whether all of these models were measured."""
    return all((SAMPLES / f"{name}-{what}.json").exists() for name in names)


def of(arm: str) -> list[str]:
    """An arm's models."""
    return [f"{arm}-{seed}" for seed in SEEDS]


def over_seeds(arm: str, what: str, kv: str, metric: str) -> Values:
    """A question's value, the mean over the seeds of an arm: what varies between questions is left."""
    runs = [samples(name, what, kv) for name in of(arm)]
    return {key: mean(run[key][metric] for run in runs) for key in runs[0]}


def measured_arms(what: str) -> list[str]:
    """The arms of which all seeds were measured, the control first; none without the control."""
    arms = [arm for arm in ARMS if exists(what, *of(arm))]
    return arms if arms[:1] == ["plain"] else []


def clusters(what: str) -> dict[str, str]:
    """Each question's context."""
    return {key: row["cluster"] for key, row in samples("plain-0", what).items()}


def header(*columns: str) -> list[str]:
    """The first two lines of a table."""
    return ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]


def line(*cells: str) -> str:
    """Another one."""
    return "| " + " | ".join(cells) + " |"


def answers_table(what: str) -> str:
    """SubEM (%), exact match (%) and gold_nll with the full cache, and the gain over the best base."""
    bases = [samples(name, what) for name in BASES if exists(what, name)]
    base = max(bases, key=lambda rows: mean(r["subem"] for r in rows.values()))
    contexts, scales = {key: row["cluster"] for key, row in base.items()}, {"subem": 100, "em": 100, "gold_nll": 1}
    shown: dict[str, dict[str, Values]] = {}
    for name in [*names(), *curve()]:
        if exists(what, name):
            rows = samples(name, what)
            shown[name] = {metric: {key: row[metric] for key, row in rows.items()} for metric in scales}
    for arm in ARMS:
        if exists(what, *of(arm)):
            shown[f"{arm}, {len(SEEDS)} seeds"] = {m: over_seeds(arm, what, "full", m) for m in scales}
    best = {key: row["subem"] for key, row in base.items()}
    lines = header("model", "n", "SubEM %", "EM %", "gold_nll", "SubEM - best base")
    for name, values in shown.items():
        cells = [interval(values[metric], contexts, "", scale) for metric, scale in scales.items()]
        gain = "-" if values["subem"] == best else interval(minus(values["subem"], best), contexts, "+", 100)
        lines.append(line(name, str(len(values["subem"])), *cells, gain))
    for arm in measured_arms(what)[1:]:
        one, other = (shown[f"{name}, {len(SEEDS)} seeds"] for name in (arm, "plain"))
        gains = [interval(minus(one[metric], other[metric]), contexts, "+", scale) for metric, scale in scales.items()]
        lines.append(line(f"{arm} - plain", str(len(best)), *gains, "-"))
    return "\n".join(lines)


def evicted_table() -> str:
    """SubEM (%) from a quarter of the cache: control, and what other arms add; of all questions, and of two parts."""
    control, *others = measured_arms("evicted")
    contexts = clusters("evicted")
    columns = [control, *(f"{arm} - {control}" for arm in others)]
    lines = header("recipe", *columns, "n survived", *columns, "n lost", *columns)
    asked = [("asked", kv) for kv in ASKED] if measured_arms("asked") == [control, *others] else []
    for what, kv in [("evicted", "full"), *(("evicted", kv) for kv in GENERATED), *asked]:
        own = over_seeds(control, what, kv, "subem")
        gains = [minus(over_seeds(arm, what, kv, "subem"), own) for arm in others]
        there = survived(what, kv) if kv != "full" else set()
        cells = []
        for some in ({*own}, there, own.keys() - there) if there else ({*own},):
            cells += [str(len(some)), interval(only(own, some), contexts, "", 100)]
            cells += [interval(only(gain, some), contexts, "+", 100) for gain in gains]
        cells += ["-"] * (3 * (1 + len(columns)) - len(cells))
        lines.append(line(f"{kv}, question in the scores" if what == "asked" else kv, *cells[1:]))
    return "\n".join(lines)


def rise(arm: str, what: str, kv: str) -> Values:
    """What a recipe adds to gold_nll over the own full cache; with the full cache gold_nll itself."""
    found = over_seeds(arm, what, kv, "gold_nll")
    return found if kv == "full" else minus(found, over_seeds(arm, what, "full", "gold_nll"))


def cells_table(what: str) -> str:
    """The rise of gold_nll and the share of the gold passages' slots that stay: control, and what other arms add."""
    control, *others = measured_arms(what)
    contexts, added = clusters(what), [f"{arm} - {control}" for arm in others]
    lines = header("recipe", f"rise, {control}", *added, f"kept, {control}", *added)
    for kv in ["full", *CELLS]:
        cells = []
        for values, scale in ((partial(rise, what=what, kv=kv), 1), (partial(gold_kept, what=what, kv=kv), 100)):
            own = values(control)
            cells.append(interval(own, contexts, "", scale))
            cells += [interval(minus(values(arm), own), contexts, "+", scale) for arm in others]
        lines.append(line(kv, *cells))
    return "\n".join(lines)


def gold_kept(arm: str, what: str, kv: str) -> Values:
    """The share of a question's gold passages' slots that stay."""
    return over_seeds(arm, what, kv, "gold_kept")


def survived(what: str, kv: str) -> set[str]:
    """The questions of whose gold passages the control keeps more than of all slots."""
    share = float(kv.partition(":")[2])
    return {key for key, kept in gold_kept("plain", what, kv).items() if kept > share}


def only(values: Values, keys: set[str]) -> Values:
    """Those questions alone."""
    return {key: value for key, value in values.items() if key in keys}


def split_table(what: str) -> str:
    """What other arms add to the rise, where the gold passages survived and where they are lost."""
    control, *others = measured_arms(what)
    contexts, added = clusters(what), [f"{arm} - {control}" for arm in others]
    lines = header("recipe", "n survived", f"rise, {control}", *added, "n lost", f"rise, {control}", *added)
    for kv in CELLS:
        own, there = rise(control, what, kv), survived(what, kv)
        cells = []
        for some in (there, own.keys() - there):
            cells += [str(len(some)), interval(only(own, some), contexts)]
            cells += [interval(only(minus(rise(arm, what, kv), own), some), contexts, "+") for arm in others]
        lines.append(line(kv, *cells))
    return "\n".join(lines)


def twins_table(what: str) -> str:
    """What learning from the full cache in the same pass adds to compression-aware training."""
    contexts = clusters(what)
    lines = header("recipe", "twin - aware", "where survived", "where lost")
    for kv in CELLS:
        added, there = minus(rise("twin", what, kv), rise("aware", what, kv)), survived(what, kv)
        parts = (added, only(added, there), only(added, added.keys() - there))
        lines.append(line(kv, *(interval(part, contexts, "+") for part in parts)))
    return "\n".join(lines)


def tables() -> str:
    """All tables, as they stand in training.md."""
    found = ["## With the full cache", answers_table("full")]
    if exists("longer", "base", "plain-0"):
        found += ["## With the full cache, at 2k", answers_table("longer")]
    if len(measured_arms("evicted")) > 1:
        found += ["## Answers from a quarter of the cache, SubEM in %", evicted_table()]
    for what in COMPRESS:
        if len(measured_arms(what)) > 1:
            found += [f"## gold_nll under recipes, {what}", cells_table(what)]
            found += [f"## By what became of the gold passages, {what}", split_table(what)]
        if "twin" in measured_arms(what):
            found += [f"## The two compression-aware arms, {what}", twins_table(what)]
    return "\n\n".join(found) + "\n"


if __name__ == "__main__":
    command, wanted = sys.argv[1:2], sys.argv[2:]
    if command == ["train"] and set(wanted) <= set(ARMS):
        for arm in wanted or ARMS:
            train(arm)
    elif command == ["answer"] and set(wanted) <= {*names(), *curve()}:
        for name in wanted or [*names(), *curve()]:
            answer(name)
    elif command == ["longer"] and set(wanted) <= {*names()}:
        for name in wanted or tuned():
            longer(name)
    elif command == ["evicted"] and set(wanted) <= {*tuned()}:
        for name in wanted or tuned():
            evicted(name)
    elif command == ["cells"] and set(wanted) <= set(tuned()):
        cells(wanted or tuned())
    elif sys.argv[1:] == ["table"]:
        page = SAMPLES.with_suffix(".md")
        page.write_text(page.read_text().partition(MARK)[0] + MARK + tables())
    else:
        raise SystemExit(__doc__)
