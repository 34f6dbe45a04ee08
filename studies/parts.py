"""Scores of the studies of learned eviction: a part is one task under some recipes with one model and one scorer.

`bench` runs what is missing of a part and commits its scores; the rest makes cells of tables from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lceval.stats.estimates import Estimate, Stratum, difference, mean_of, recovery

METRICS = ("subem", "gold_nll", "gold_kept", "kept_share")
Rows = dict[str, tuple[str, float]]
"""Question -> context and value."""
Samples = dict[str, dict[str, dict[str, Any]]]
"""Recipe -> question -> metrics and `cluster`, the context."""


def train_scorer(shipped: str, changes: Mapping[str, Any], output: Path, saved: Path) -> None:
    """Train the scorer of a shipped recipe with changes, and write what it learned from to the folder `saved`."""
    from lceval.training.scorers import spec
    from lceval.training.scorers.learn import learn

    values = spec.read(shipped).model_dump(mode="json")
    for key, change in changes.items():
        values[key] = {**values[key], **change} if isinstance(change, dict) else change
    record = learn(spec.parse({**values, "output": str(output)}, output.name))
    committed = {key: record[key] for key in ("recipe", "data", "wall_s", "scorer", "held_out")}
    saved.mkdir(exist_ok=True)
    (saved / f"{output.name}-scorer.json").write_text(json.dumps(committed) + "\n")


def bench(
    runs: Path,
    saved: Path,
    name: str,
    task: str,
    recipes: Sequence[str],
    *,
    contexts: int | None,
    metadata: Mapping[str, Any],
    metrics: Sequence[str] = METRICS,
    **options: Any,
) -> None:
    """Run the missing samples of a part in runs/samples, and write metrics by recipe and question to `saved`."""
    from lceval.bench import comparison

    file = runs / "samples" / f"{name}-{task}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    comparison.bench(
        task,
        recipes,
        pretrained="smollm2-135m",
        contexts=contexts,
        metadata=metadata,
        against_hf=False,
        diagnose="gold",
        batch_size=4,
        output=file,
        **options,
    )
    saved.mkdir(exist_ok=True)
    commit(file, saved / f"{name}-{task}.json", metrics)


def commit(file: Path, target: Path, metrics: Sequence[str]) -> None:
    """Write these metrics of the samples of a benchmark, by recipe and question, to a file that is committed."""
    _, *rows = map(json.loads, file.read_text().splitlines())
    scores: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        scores.setdefault(row["kv"], {})[row["id"]] = [row.get(metric) for metric in metrics]
    clusters = {row["id"]: row["cluster"] for row in rows}
    committed = {"metrics": metrics, "clusters": clusters, "scores": scores}
    target.write_text(json.dumps(committed, separators=(",", ":")) + "\n")


@cache
def samples(folder: Path, name: str, task: str) -> Samples:
    """The committed scores of a part, each with its context as `cluster`; empty where it is not measured."""
    file = folder / f"{name}-{task}.json"
    if not file.exists():
        return {}
    committed = json.loads(file.read_text())
    return {
        kv: {
            key: {"cluster": committed["clusters"][key], **dict(zip(committed["metrics"], values, strict=True))}
            for key, values in of_recipe.items()
        }
        for kv, of_recipe in committed["scores"].items()
    }


def text(estimate: Estimate, form: str, scale: float = 1) -> str:
    """An estimate with its 95% interval over contexts, in a format of numbers."""
    if estimate.value is None:
        return "-"
    bounds = ", ".join(format(scale * bound, form) for bound in estimate.interval or ())
    return f"{format(scale * estimate.value, form)} [{bounds or 'n/a'}]"


def interval(rows: Rows, scale: float = 1) -> str:
    """The mean: of NLLs, or at a scale of 100 of shares in %."""
    if not rows:
        return "-"
    mean = mean_of([value for _, value in rows.values()], [cluster for cluster, _ in rows.values()])
    return text(mean, ".3f" if scale == 1 else ".1f", scale)


def added(rows: Rows, base: Rows) -> str:
    """The mean difference to other values of the same questions."""
    return text(difference([_paired(rows, base)]), "+.3f") if rows and base else "-"


def share(rows: Rows, full: Rows, none: Rows | None = None) -> str:
    """What rows keep of full, in %: of its values, or of how far these are below none."""
    if not rows or not full or none == {}:
        return "-"
    if none:
        rows, full = ({key: (of[key][0], none[key][1] - of[key][1]) for key in rows} for of in (rows, full))
    return text(recovery([_paired(rows, full)]), ".0f", 100)


def _paired(ours: Rows, theirs: Rows) -> Stratum:
    return Stratum([v for _, v in ours.values()], [theirs[key][1] for key in ours], [c for c, _ in ours.values()])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
