"""The study of docs/studies/training.md: what fine-tuning gains on held-out questions, with and without compression.

python studies/training.py train [ARM …]     train all seeds of an arm
python studies/training.py answer [NAME …]   generate answers with the full cache
python studies/training.py longer [NAME …]   the same on contexts twice as long
python studies/training.py evicted [NAME …]  generate answers with 25% of the cache kept
python studies/training.py cells [NAME …]    measure gold_nll under every recipe
python studies/training.py table             rewrite docs/studies/training-tables.md from the committed scores

A NAME is one of BASES, or an arm and a seed, as `plain-0`. Rerun the same command to resume. Adapters are written to
runs/studies/training.
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

from lceval.stats.estimates import cluster_bootstrap

SAMPLES = Path(__file__).parent / "training"
TABLES = Path(__file__).parents[1] / "docs" / "studies" / "training-tables.md"
RUNS = Path("runs/studies/training")
TASK, METADATA = "lc_squad_ao_1k", {"split": "test", "questions": 5}
LONGER = "lc_squad_ao_2k"
# The base model with and without its chat template, and with and without the start of the reply in the prompt.
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
# Keys added to RECIPE. `plain` is the control of the other arms: the same data, steps and seeds.
EVICTION: dict[str, Any] = {"evictors": EVICTORS, "keep": [0.15, 1.0], "full": 0.3}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compression-aware": {"compression_aware": EVICTION},
    "self-distillation": {"compression_aware": {**EVICTION, "full": 0.0, "self_distillation": 1.0}},
}
CHECKPOINTS = (20, 40)
METRICS = ("subem", "em", "gold_nll", "gold_kept")
MARK = "<!-- tables of the committed samples -->\n"
# streaming and tova are never used in training.
CELLS = [f"{name}:{keep}" for keep in (0.5, 0.25) for name in (*EVICTORS, "streaming", "tova")]
GENERATED = ["snapkv:0.25", "expected_attention:0.25", "tova:0.25"]
GENERATED_QUERY_AWARE = ["tova:0.25"]
# Several recipes or lengths are slow in float32; models that are compared with each other all run in bfloat16.
FAST: dict[str, Any] = {"dtype": "bfloat16", "merge": True}
QUERY_AWARE = {"query-agnostic": False, "query-aware": True}


def train(arm: str) -> None:
    """Train all seeds of an arm."""
    from lceval.training.config import parse
    from lceval.training.train import train as run

    for seed in SEEDS:
        record = run(parse({**RECIPE, **ARMS[arm], "seed": seed, "output": str(RUNS / f"{arm}-{seed}")}, arm))
        committed = {key: record[key] for key in ("recipe", "data", "parameters", "wall_s", "losses")}
        SAMPLES.mkdir(exist_ok=True)
        (SAMPLES / f"{arm}-{seed}-train.json").write_text(json.dumps(committed) + "\n")


def names() -> list[str]:
    """All models, in the order of the tables."""
    return [*BASES, *tuned()]


def tuned() -> list[str]:
    """The models trained for all steps."""
    return [f"{arm}-{seed}" for arm in ARMS for seed in SEEDS]


def curve() -> list[str]:
    """The checkpoints of the learning curve."""
    return [f"plain-0-step-{step}" for step in CHECKPOINTS]


def adapter(name: str) -> dict[str, str]:
    """Model arguments that load the adapter; none for a base."""
    if name in BASES:
        return {}
    run, _, step = name.partition("-step-")
    return {"peft": str(RUNS / run / f"checkpoints/checkpoint-{step}" if step else RUNS / run)}


def answer(name: str) -> None:
    """Answers and gold_nll with the full cache."""
    measure(name, "full", ["full"], **BASES.get(name, {}))


def longer(name: str) -> None:
    """Answers and gold_nll with the full cache, on contexts twice as long as in training."""
    measure(name, "longer", ["full"], task=LONGER, dtype="bfloat16", merge=name not in BASES, **BASES.get(name, {}))


def evicted(name: str) -> None:
    """Answers with 25% of the cache kept, and with the full cache."""
    measure(name, "evicted", ["full", *GENERATED], **FAST)
    measure(name, "answers-query-aware", GENERATED_QUERY_AWARE, query_aware=True, **FAST)


def cells(models: Sequence[str]) -> None:
    """gold_nll under every recipe: all models query-agnostic, then all query-aware."""
    for (part, query_aware), name in product(QUERY_AWARE.items(), models):
        measure(name, part, CELLS, nll_only=True, query_aware=query_aware, **FAST)


def measure(name: str, part: str, recipes: Sequence[str], task: str = TASK, **options: Any) -> None:
    """Run the missing samples of a model and a part of the study, and save their scores."""
    from lceval.bench.comparison import bench

    bench(
        task,
        recipes,
        pretrained="smollm2-135m",
        contexts=None,
        against_hf=False,
        diagnose="gold",
        metadata=METADATA,
        batch_size=5,
        output=RUNS / "samples" / f"{name}-{part}.jsonl",
        **options,
        **adapter(name),
    )
    save(name, part)


def save(name: str, part: str) -> None:
    """Write the METRICS by recipe and question to the folder that is committed."""
    settings, *rows = map(json.loads, (RUNS / "samples" / f"{name}-{part}.jsonl").read_text().splitlines())
    scores: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        scores.setdefault(row["kv"], {})[row["id"]] = [row.get(metric) for metric in METRICS]
    clusters = {row["id"]: row["cluster"] for row in rows}
    committed = {"settings": settings, "metrics": METRICS, "clusters": clusters, "scores": scores}
    SAMPLES.mkdir(exist_ok=True)
    (SAMPLES / f"{name}-{part}.json").write_text(json.dumps(committed, separators=(",", ":")) + "\n")


Rows = dict[str, dict[str, Any]]
Values = dict[str, float]


def samples(name: str, part: str, kv: str = "full") -> Rows:
    """The committed scores of a model under a recipe, by question."""
    committed = json.loads((SAMPLES / f"{name}-{part}.json").read_text())
    return {
        key: {"cluster": committed["clusters"][key], **dict(zip(committed["metrics"], scores, strict=True))}
        for key, scores in committed["scores"][kv].items()
    }


def interval(values: Values, clusters: dict[str, str], sign: str = "", scale: float = 1.0) -> str:
    """Mean with its 95% interval over contexts; the mean alone where all values are equal."""
    if len({*values.values()}) == 1:
        return f"{scale * next(iter(values.values())):{sign}.3g}"
    bounds = cluster_bootstrap([scale * x for x in values.values()], [clusters[key] for key in values])
    # Rounded because the mean of three seeds can differ from 0 in its last bit.
    middle, low, high = (round(x, 9) + 0.0 for x in bounds)
    return f"{middle:{sign}.3g} [{low:{sign}.3g}, {high:{sign}.3g}]"


def minus(a: Values, b: Values) -> Values:
    """a - b by question, for the questions of a."""
    return {key: value - b[key] for key, value in a.items()}


def exists(part: str, *names: str) -> bool:
    """Whether all of these models have scores for a part of the study."""
    return all((SAMPLES / f"{name}-{part}.json").exists() for name in names)


def models_of(arm: str) -> list[str]:
    """The models of an arm, one per seed."""
    return [f"{arm}-{seed}" for seed in SEEDS]


def over_seeds(arm: str, part: str, kv: str, metric: str) -> Values:
    """Mean over the seeds of an arm, by question: intervals then describe the variation between questions."""
    runs = [samples(name, part, kv) for name in models_of(arm)]
    return {key: mean(run[key][metric] for run in runs) for key in runs[0]}


def measured_arms(part: str) -> list[str]:
    """The arms with scores for all seeds, the control first; empty without the control."""
    arms = [arm for arm in ARMS if exists(part, *models_of(arm))]
    return arms if arms[:1] == ["plain"] else []


def clusters(part: str) -> dict[str, str]:
    """The context of each question."""
    return {key: row["cluster"] for key, row in samples("plain-0", part).items()}


def header(*columns: str) -> list[str]:
    """Header and alignment row of a table."""
    return ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]


def line(*cells: str) -> str:
    """One row of a table."""
    return "| " + " | ".join(cells) + " |"


def answers_table(part: str) -> str:
    """SubEM (%), exact match (%) and gold_nll with the full cache, and the gain over the best base."""
    bases = [samples(name, part) for name in BASES if exists(part, name)]
    base = max(bases, key=lambda rows: mean(r["subem"] for r in rows.values()))
    contexts, scales = {key: row["cluster"] for key, row in base.items()}, {"subem": 100, "em": 100, "gold_nll": 1}
    scores: dict[str, dict[str, Values]] = {}
    for name in [*names(), *curve()]:
        if exists(part, name):
            rows = samples(name, part)
            scores[name] = {metric: {key: row[metric] for key, row in rows.items()} for metric in scales}
    for arm in ARMS:
        if exists(part, *models_of(arm)):
            scores[f"{arm}, {len(SEEDS)} seeds"] = {m: over_seeds(arm, part, "full", m) for m in scales}
    best = {key: row["subem"] for key, row in base.items()}
    lines = header("model", "n", "SubEM %", "EM %", "gold_nll", "Δ SubEM vs best base")
    for name, values in scores.items():
        cells = [interval(values[metric], contexts, "", scale) for metric, scale in scales.items()]
        gain = "-" if values["subem"] == best else interval(minus(values["subem"], best), contexts, "+", 100)
        lines.append(line(name, str(len(values["subem"])), *cells, gain))
    for arm in measured_arms(part)[1:]:
        treated, control = (scores[f"{name}, {len(SEEDS)} seeds"] for name in (arm, "plain"))
        gains = [interval(minus(treated[m], control[m]), contexts, "+", scale) for m, scale in scales.items()]
        lines.append(line(f"{arm} - plain", str(len(best)), *gains, "-"))
    return "\n".join(lines)


def evicted_table() -> str:
    """SubEM (%) with 25% of the cache kept: the control and the gains of the other arms, split by gold_kept."""
    control, *others = measured_arms("evicted")
    contexts = clusters("evicted")
    columns = [control, *(f"{arm} - {control}" for arm in others)]
    lines = header("recipe", *columns, "n gold kept", *columns, "n gold evicted", *columns)
    parts = [("evicted", kv) for kv in ("full", *GENERATED)]
    if measured_arms("answers-query-aware") == [control, *others]:
        parts += [("answers-query-aware", kv) for kv in GENERATED_QUERY_AWARE]
    for part, kv in parts:
        own = over_seeds(control, part, kv, "subem")
        gains = [minus(over_seeds(arm, part, kv, "subem"), own) for arm in others]
        kept = gold_kept_questions(part, kv) if kv != "full" else set()
        cells = []
        for keys in ({*own}, kept, own.keys() - kept) if kept else ({*own},):
            cells += [str(len(keys)), interval(only(own, keys), contexts, "", 100)]
            cells += [interval(only(gain, keys), contexts, "+", 100) for gain in gains]
        cells += ["-"] * (3 * (1 + len(columns)) - len(cells))
        lines.append(line(f"{kv}, query-aware" if part == "answers-query-aware" else kv, *cells[1:]))
    return "\n".join(lines)


def nll_delta(arm: str, part: str, kv: str) -> Values:
    """Δ gold_nll of a recipe vs the arm's own full cache; for the full cache gold_nll itself."""
    values = over_seeds(arm, part, kv, "gold_nll")
    return values if kv == "full" else minus(values, over_seeds(arm, part, "full", "gold_nll"))


def gold_kept(arm: str, part: str, kv: str) -> Values:
    """Share of the slots of a question's gold passages that are kept."""
    return over_seeds(arm, part, kv, "gold_kept")


def gold_kept_questions(part: str, kv: str) -> set[str]:
    """Questions whose gold passages keep a larger share of their slots than the whole context, under the control."""
    share = float(kv.partition(":")[2])
    return {key for key, kept in gold_kept("plain", part, kv).items() if kept > share}


def only(values: Values, keys: set[str]) -> Values:
    """The values of these questions."""
    return {key: value for key, value in values.items() if key in keys}


def cells_table(part: str) -> str:
    """Δ gold_nll vs the full cache and gold kept %: the control and the gains of the other arms."""
    control, *others = measured_arms(part)
    contexts, gains = clusters(part), [f"{arm} - {control}" for arm in others]
    lines = header("recipe", f"Δ gold_nll vs full, {control}", *gains, f"gold kept %, {control}", *gains)
    for kv in ["full", *CELLS]:
        cells = []
        for values, scale in ((partial(nll_delta, part=part, kv=kv), 1), (partial(gold_kept, part=part, kv=kv), 100)):
            own = values(control)
            cells.append(interval(own, contexts, "", scale))
            cells += [interval(minus(values(arm), own), contexts, "+", scale) for arm in others]
        lines.append(line(kv, *cells))
    return "\n".join(lines)


def split_table(part: str) -> str:
    """Δ gold_nll vs the full cache, split by whether the gold passages were kept or evicted."""
    control, *others = measured_arms(part)
    contexts, columns = clusters(part), [f"Δ gold_nll, {control}", *(f"{arm} - {control}" for arm in others)]
    lines = header("recipe", "n gold kept", *columns, "n gold evicted", *columns)
    for kv in CELLS:
        own, kept = nll_delta(control, part, kv), gold_kept_questions(part, kv)
        cells = []
        for keys in (kept, own.keys() - kept):
            cells += [str(len(keys)), interval(only(own, keys), contexts)]
            cells += [interval(only(minus(nll_delta(arm, part, kv), own), keys), contexts, "+") for arm in others]
        lines.append(line(kv, *cells))
    return "\n".join(lines)


def self_distillation_table(part: str) -> str:
    """What self-distillation adds to compression-aware training."""
    contexts, arms = clusters(part), ("self-distillation", "compression-aware")
    lines = header("recipe", " - ".join(arms), "gold kept", "gold evicted")
    for kv in CELLS:
        gain = minus(*(nll_delta(arm, part, kv) for arm in arms))
        kept = gold_kept_questions(part, kv)
        parts = (gain, only(gain, kept), only(gain, gain.keys() - kept))
        lines.append(line(kv, *(interval(values, contexts, "+") for values in parts)))
    return "\n".join(lines)


def tables() -> str:
    """All tables of the tables page."""
    parts = ["## Full cache, 1k tokens", answers_table("full")]
    if exists("longer", "base", "plain-0"):
        parts += ["## Full cache, 2k tokens", answers_table("longer")]
    if len(measured_arms("evicted")) > 1:
        parts += ["## SubEM (%) with 25% of the cache kept", evicted_table()]
    for part in QUERY_AWARE:
        if len(measured_arms(part)) > 1:
            parts += [f"## gold_nll under eviction, {part}", cells_table(part)]
            parts += [f"## gold_nll by whether the gold passages were kept, {part}", split_table(part)]
        if "self-distillation" in measured_arms(part):
            parts += [f"## Self-distillation vs compression-aware training, {part}", self_distillation_table(part)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    command, selected = sys.argv[1:2], sys.argv[2:]
    if command == ["train"] and set(selected) <= set(ARMS):
        for arm in selected or ARMS:
            train(arm)
    elif command == ["answer"] and set(selected) <= {*names(), *curve()}:
        for name in selected or [*names(), *curve()]:
            answer(name)
    elif command == ["longer"] and set(selected) <= {*names()}:
        for name in selected or tuned():
            longer(name)
    elif command == ["evicted"] and set(selected) <= {*tuned()}:
        for name in selected or tuned():
            evicted(name)
    elif command == ["cells"] and set(selected) <= set(tuned()):
        cells(selected or tuned())
    elif sys.argv[1:] == ["table"]:
        TABLES.write_text(TABLES.read_text().partition(MARK)[0] + MARK + tables())
    else:
        raise SystemExit(__doc__)
