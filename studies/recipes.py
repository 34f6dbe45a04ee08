"""The study of recipes.md: ten evictors and more on real questions, question-agnostic, one prefill a context.

python docs/studies/recipes.py run nqopen        measures; goes on where it stopped
python docs/studies/recipes.py run kvlookup
python docs/studies/recipes.py table             prints the tables of recipes.md from the committed samples
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from lceval.stats import cluster_bootstrap

HERE = Path(__file__).parent
CONTROL = "random:0.25:sinks=4:recent=64"
EVICTORS = ["streaming", "lacache", "tova", "snapkv", "adakv", "knorm", "keydiff", "expected_attention"]
RECIPES = ["full", "random:0.25", CONTROL, *(f"{name}:0.25" for name in EVICTORS), "int4", "fier:0.1"]
STUDIES: dict[str, dict[str, Any]] = {
    # h2o and kvzip cost about as much as reading the context again: on the shorter study alone.
    "nqopen": {"task": "lc_nqopen_ao_4k", "contexts": 10, "recipes": [*RECIPES, "h2o:0.25", "kvzip:0.25"]},
    "kvlookup": {"task": "lc_kvlookup_ao_4k", "contexts": 40, "recipes": RECIPES},
}


def samples(name: str) -> list[dict[str, Any]]:
    """The committed samples of a study."""
    return [json.loads(line) for line in (HERE / f"recipes-{name}.jsonl").read_text().splitlines()[1:]]


def measure(name: str) -> None:
    """Run what is missing of a study."""
    from lceval.bench.evaluate import bench

    bench(
        **STUDIES[name],
        pretrained="smollm2-135m",
        against_hf=False,
        diagnose="gold",
        nll_only=True,
        output=HERE / f"recipes-{name}.jsonl",
    )


def table(name: str) -> str:
    """One row a recipe, by gold_nll; intervals are 95%, by context; differences are paired by question."""
    rows = samples(name)
    by_recipe: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_recipe.setdefault(row["kv"], {})[row["id"]] = row
    head = ["recipe", "kept %", "gold kept %", "gold_nll", "- control", "rho"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    full, control = by_recipe["full"], by_recipe[CONTROL]
    for recipe, own in sorted(by_recipe.items(), key=lambda item: mean(item[1], "gold_nll")):
        lost = [(row["gold_kept"], row["gold_nll"] - full[key]["gold_nll"]) for key, row in own.items()]
        varies = len({kept for kept, _ in lost}) > 1
        cells = [
            f"`{recipe}`",
            f"{100 * mean(own, 'kept_share'):.1f}",
            f"{100 * mean(own, 'gold_kept'):.1f}",
            interval(own, lambda key, own=own: own[key]["gold_nll"]),  # type: ignore[misc]
            "" if recipe == CONTROL else interval(own, lambda k, own=own: own[k]["gold_nll"] - control[k]["gold_nll"]),  # type: ignore[misc]
            f"{spearmanr(*zip(*lost, strict=True)).statistic:+.2f}" if varies else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean(rows: dict[str, dict[str, Any]], field: str) -> float:
    """The mean of a field."""
    return sum(row[field] for row in rows.values()) / len(rows)


def interval(rows: dict[str, dict[str, Any]], value: Callable[[str], float], output_format: str = "{:.3f}") -> str:
    """A mean with its interval."""
    numbers = cluster_bootstrap([value(key) for key in rows], [row["cluster"] for row in rows.values()])
    middle, low, high = (output_format.format(number) for number in numbers)
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"] and len(sys.argv) == 3 and sys.argv[2] in STUDIES:
        measure(sys.argv[2])
    elif sys.argv[1:] == ["table"]:
        for study in STUDIES:
            print(f"{STUDIES[study]['task']}\n\n{table(study)}\n")
    else:
        raise SystemExit(__doc__)
