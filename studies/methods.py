"""The study of docs/studies/methods.md: every method at a quarter of the KV cache.

python studies/methods.py run nqopen chunk      measure; rerun the same command to resume
python studies/methods.py table                 rewrite docs/studies/methods-tables.md from the committed samples

Tasks: nqopen, kvlookup. Parts: query-agnostic, query-aware, chunk (eviction while a context is read),
seconds (one recipe at a time). Run it where the repository is: a path is part of the samples' identity.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lceval.stats.estimates import cluster_bootstrap

HERE = Path(__file__).parent
SAMPLES = HERE / "methods"
TABLES = HERE.parent / "docs" / "studies" / "methods-tables.md"
MARK = "<!-- tables of the committed samples -->\n"
TASKS = {"nqopen": "lc_nqopen_ao_4k", "kvlookup": "lc_kvlookup_ao_4k"}
CONTROL = "random:0.25:sinks=4:recent=64"
EVICTORS = [
    *("streaming", "lacache", "tova", "snapkv", "pyramidkv", "adakv", "criticalkv", "chunkkv", "knorm", "keydiff"),
    *("lagkv", "expected_attention", "compactor", "duo", "rkv", "kvzap"),
]
AT_END = ["full", "random:0.25", CONTROL, *(f"{name}:0.25" for name in EVICTORS), "keydiff:0.25:block=128"]
# Each of these costs another prefill, or about as much.
SLOW = ["h2o:0.25", "kvzip:0.25", "kvzip:0.25:plus=true"]
NO_EVICTOR = [
    *("fp8", "int4", "int4:rotate=hadamard", "int2", "int2:rotate=hadamard", "fier:0.1", "quest:0.1", "retrieval:0.1")
]
CHUNK = ":when=chunk"
READING = ["streaming", "lacache", "tova", "snapkv", "knorm", "keydiff", "rkv", "kvzap"]
HEADS = "tests/peers/text.txt"
# Recipes, model arguments, and the number of contexts by task: 40 questions in both, but for `seconds`. Each recipe of
# `chunk` reads every context anew, so it is of one task.
PARTS: dict[str, tuple[list[str], dict[str, Any], dict[str, int]]] = {
    "query-agnostic": ([*AT_END, *NO_EVICTOR, *SLOW], {"heads": HEADS}, {"nqopen": 10, "kvlookup": 40}),
    "query-aware": (
        ["full", CONTROL, "snapkv:0.25", "finch:0.25"],
        {"query_aware": True},
        {"nqopen": 10, "kvlookup": 40},
    ),
    "chunk": ([f"{name}:0.25{CHUNK}" for name in READING], {}, {"nqopen": 10}),
    "seconds": ([*AT_END, *NO_EVICTOR, *SLOW], {"heads": HEADS}, {"nqopen": 1}),
}
Rows = dict[str, dict[str, Any]]


def measure(name: str, part: str) -> None:
    """Run the missing samples of a part of a task's study."""
    from lceval.bench.comparison import bench

    recipes, model_args, contexts = PARTS[part]
    # Recipes that run together share a prefill that has the cost of all of them.
    for together in [[recipe] for recipe in recipes] if part == "seconds" else [recipes]:
        bench(
            TASKS[name],
            together,
            pretrained="smollm2-135m",
            contexts=contexts[name],
            against_hf=False,
            diagnose="gold",
            nll_only=True,
            output=SAMPLES / f"{name}-{part}.jsonl",
            **model_args,
        )


def samples(name: str, part: str) -> dict[str, Rows]:
    """Committed samples of a part, by recipe and question."""
    by_recipe: dict[str, Rows] = {}
    for line in (SAMPLES / f"{name}-{part}.jsonl").read_text().splitlines()[1:]:
        row = json.loads(line)
        by_recipe.setdefault(row["kv"], {})[row["id"]] = row
    return by_recipe


def table(name: str, part: str) -> str:
    """One row per recipe, sorted by gold_nll; 95% intervals over contexts, differences paired by question."""
    by_recipe, times = samples(name, part), seconds()
    body = [
        [
            f"`{recipe}`",
            *(f"{100 * value:.1f}" for value in (kv_share(own), mean(own, "gold_kept"))),
            interval(own, "gold_nll"),
            "" if recipe == CONTROL else interval(own, "gold_nll", by_recipe[CONTROL]),
            *([f"{times[recipe]:.1f}"] if part == "query-agnostic" else []),
        ]
        for recipe, own in sorted(by_recipe.items(), key=lambda item: mean(item[1], "gold_nll"))
    ]
    head = ["recipe", "KV bytes %", "gold kept %", "gold_nll", "Δ vs control"]
    return markdown([*head, *(["seconds"] if part == "query-agnostic" else [])], body)


def reading_table(name: str) -> str:
    """Eviction while a context is read against eviction at the end of the prefill, on the same questions."""
    chunk, at_end = samples(name, "chunk"), samples(name, "query-agnostic")
    body = []
    for method in READING:
        while_reading = chunk[f"{method}:0.25{CHUNK}"]
        one_go, control = ({key: at_end[kv][key] for key in while_reading} for kv in (f"{method}:0.25", CONTROL))
        body.append(
            [
                f"`{method}:0.25`",
                interval(one_go, "gold_nll"),
                interval(while_reading, "gold_nll"),
                interval(while_reading, "gold_nll", one_go),
                interval(while_reading, "gold_nll", control),
                *(f"{100 * mean(own, 'gold_kept'):.1f}" for own in (one_go, while_reading)),
            ]
        )
    head = ["recipe", "at the end", "`when=chunk`", "Δ vs at the end", "Δ vs control"]
    return markdown([*head, "gold kept %, at the end", "gold kept %, `when=chunk`"], body)


def seconds() -> dict[str, float]:
    """Seconds of prefill and compression of one context, each recipe alone."""
    by_recipe = {kv: next(iter(rows.values())) for kv, rows in samples("nqopen", "seconds").items()}
    return {kv: row["prefill_s"] + row["compress_s"] for kv, row in by_recipe.items()}


def kv_share(rows: Rows) -> float:
    """Bytes of the compressed contexts as a share of the uncompressed ones."""
    return mean(rows, "kv_bytes") / mean(rows, "kv_bytes_full")


def mean(rows: Rows, field: str) -> float:
    """Mean of a field."""
    return sum(row[field] for row in rows.values()) / len(rows)


def interval(rows: Rows, field: str, without: Rows | None = None) -> str:
    """Mean, or mean difference, with its 95% interval over contexts."""
    values = [row[field] - (without[key][field] if without else 0) for key, row in rows.items()]
    numbers = cluster_bootstrap(values, [row["cluster"] for row in rows.values()])
    middle, low, high = (f"{number:.3f}" for number in numbers)
    return f"{middle} [{low}, {high}]"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text."""
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in body)])


def tables() -> str:
    """All tables of the tables page."""
    parts = []
    for name, task in TASKS.items():
        parts += [f"## {task}, query-agnostic", table(name, "query-agnostic")]
        parts += [f"## {task}, query-aware", table(name, "query-aware")]
    parts += [f"## {TASKS['nqopen']}, evicted while a context is read", reading_table("nqopen")]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"] and len(sys.argv) == 4 and sys.argv[2] in PARTS.get(sys.argv[3], ([], {}, {}))[2]:
        measure(*sys.argv[2:])
    elif sys.argv[1:] == ["table"]:
        TABLES.write_text(TABLES.read_text().partition(MARK)[0] + MARK + tables())
    else:
        raise SystemExit(__doc__)
