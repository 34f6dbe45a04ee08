"""The study of docs/studies/recipes.md: evictors, quantization and sparse attention, query-agnostic.

python studies/recipes.py run nqopen        measure; rerun the same command to resume
python studies/recipes.py run kvlookup
python studies/recipes.py table             rewrite docs/studies/recipes-tables.md from the committed samples
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from lceval.stats.estimates import cluster_bootstrap

HERE = Path(__file__).parent
TABLES = HERE.parent / "docs" / "studies" / "recipes-tables.md"
MARK = "<!-- tables of the committed samples -->\n"
CONTROL = "random:0.25:sinks=4:recent=64"
EVICTORS = ["streaming", "lacache", "tova", "snapkv", "adakv", "knorm", "keydiff", "expected_attention"]
RECIPES = ["full", "random:0.25", CONTROL, *(f"{name}:0.25" for name in EVICTORS), "int4", "fier:0.1"]
STUDIES: dict[str, dict[str, Any]] = {
    # h2o and kvzip cost about as much as a second prefill: only in the study with fewer contexts.
    "nqopen": {"task": "lc_nqopen_ao_4k", "contexts": 10, "recipes": [*RECIPES, "h2o:0.25", "kvzip:0.25"]},
    "kvlookup": {"task": "lc_kvlookup_ao_4k", "contexts": 40, "recipes": RECIPES},
}


def samples(name: str) -> list[dict[str, Any]]:
    """Committed samples of a study."""
    return [json.loads(line) for line in (HERE / f"recipes-{name}.jsonl").read_text().splitlines()[1:]]


def measure(name: str) -> None:
    """Run the missing samples of a study."""
    from lceval.bench.comparison import bench

    bench(
        **STUDIES[name],
        pretrained="smollm2-135m",
        against_hf=False,
        diagnose="gold",
        nll_only=True,
        output=HERE / f"recipes-{name}.jsonl",
    )


def table(name: str) -> str:
    """One row per recipe, sorted by gold_nll; 95% intervals over contexts, differences paired by question."""
    rows = samples(name)
    by_recipe: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_recipe.setdefault(row["kv"], {})[row["id"]] = row
    head = ["recipe", "KV kept %", "gold kept %", "gold_nll", "Δ vs control", "rho"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    full, control = by_recipe["full"], by_recipe[CONTROL]
    for recipe, own in sorted(by_recipe.items(), key=lambda item: mean(item[1], "gold_nll")):
        pairs = [(row["gold_kept"], row["gold_nll"] - full[key]["gold_nll"]) for key, row in own.items()]
        varies = len({kept for kept, _ in pairs}) > 1
        cells = [
            f"`{recipe}`",
            f"{100 * mean(own, 'kept_share'):.1f}",
            f"{100 * mean(own, 'gold_kept'):.1f}",
            interval(own, lambda key, own=own: own[key]["gold_nll"]),  # type: ignore[misc]
            "" if recipe == CONTROL else interval(own, lambda k, own=own: own[k]["gold_nll"] - control[k]["gold_nll"]),  # type: ignore[misc]
            f"{spearmanr(*zip(*pairs, strict=True)).statistic:+.2f}" if varies else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean(rows: dict[str, dict[str, Any]], field: str) -> float:
    """Mean of a field."""
    return sum(row[field] for row in rows.values()) / len(rows)


def interval(rows: dict[str, dict[str, Any]], value: Callable[[str], float]) -> str:
    """Mean with its 95% interval over contexts."""
    numbers = cluster_bootstrap([value(key) for key in rows], [row["cluster"] for row in rows.values()])
    middle, low, high = (f"{number:.3f}" for number in numbers)
    return f"{middle} [{low}, {high}]"


def tables() -> str:
    """All tables of the tables page."""
    return "\n\n".join(f"## {study['task']}\n\n{table(name)}" for name, study in STUDIES.items()) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"] and len(sys.argv) == 3 and sys.argv[2] in STUDIES:
        measure(sys.argv[2])
    elif sys.argv[1:] == ["table"]:
        TABLES.write_text(TABLES.read_text().partition(MARK)[0] + MARK + tables())
    else:
        raise SystemExit(__doc__)
