"""The study of docs/studies/contexts.md: full context, gold documents, no context and RAG on the packaged model.

python studies/contexts.py run [NAME …]     measure; rerun the same command to resume
python studies/contexts.py table            rewrite docs/studies/contexts-tables.md from the committed samples
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lceval.stats.estimates import cluster_bootstrap

SAMPLES = Path(__file__).parent / "contexts"
TABLES = Path(__file__).parents[1] / "docs" / "studies" / "contexts-tables.md"
MARK = "<!-- tables of the committed samples -->\n"
RAG = {"context": "rag", "chunk": 128, "budget": 512}
CONTEXTS: dict[str, dict[str, Any]] = {
    "full": {},
    "gold": {"context": "gold"},
    "none": {"context": "none"},
    "rag bm25": {**RAG, "retriever": "bm25"},
    "rag dense": {**RAG, "retriever": "dense"},
}
# Task, number of contexts (for about 40 questions), context settings, metric.
STUDIES: dict[str, tuple[str, int, list[str], str]] = {
    "nqopen-2k": ("lc_nqopen_ao_2k", 10, [*CONTEXTS], "subem"),
    "nqopen-4k": ("lc_nqopen_ao_4k", 10, [*CONTEXTS], "subem"),
    "hotpotpool-2k": ("lc_hotpotpool_ao_2k", 10, [*CONTEXTS], "subem"),
    "hotpotpool-4k": ("lc_hotpotpool_ao_4k", 10, [*CONTEXTS], "subem"),
    "financebench": ("lc_financebench_ao", 20, ["gold", "none"], "subem"),
    "tatqa": ("lc_tatqa_ao", 8, ["full", "gold", "none"], "subem"),
    "quality": ("lc_quality_mc", 4, ["full", "none"], "acc"),
}
BATCH = {"tatqa": 6, "nqopen-4k": 4, "hotpotpool-4k": 4}  # changes the time, not the answers


def measure(name: str) -> None:
    """Run the missing samples of a study."""
    from lceval.bench.comparison import bench

    task, contexts, settings, _ = STUDIES[name]
    for context in settings:
        bench(
            task,
            ["full"],
            pretrained="smollm2-135m",
            contexts=contexts,
            against_hf=False,
            diagnose="gold",
            metadata=CONTEXTS[context],
            **({"batch_size": BATCH[name]} if name in BATCH else {}),
            output=SAMPLES / f"{name}-{context.replace(' ', '-')}.jsonl",
        )


def samples(name: str, context: str) -> dict[str, dict[str, Any]]:
    """Committed samples of a context setting, by question."""
    lines = (SAMPLES / f"{name}-{context.replace(' ', '-')}.jsonl").read_text().splitlines()[1:]
    return {row["id"]: row for row in map(json.loads, lines)}


def table(name: str) -> str:
    """One row per context setting; 95% intervals over contexts, differences paired by question."""
    _, _, settings, metric = STUDIES[name]
    reference = samples(name, settings[0])
    metrics = [metric, *(["gold_nll"] if "gold_nll" in next(iter(reference.values())) else [])]
    head = ["context", "n", *(title for m in metrics for title in (m, f"Δ {m} vs {settings[0]}"))]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for context in settings:
        own = samples(name, context)
        assert own.keys() == reference.keys(), (name, context)
        cells = [context, str(len(own))]
        for m in metrics:
            cells.append(interval(own, lambda key, own=own, m=m: own[key][m]))  # type: ignore[misc]
            paired = interval(own, lambda key, own=own, m=m: own[key][m] - reference[key][m], sign="+")  # type: ignore[misc]
            cells.append("" if context == settings[0] else paired)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(rows: dict[str, dict[str, Any]], value: Callable[[str], float], sign: str = "") -> str:
    """Mean with its 95% interval over contexts."""
    values = [value(key) for key in rows]
    if sign and not any(values):
        return "0"  # a bootstrap over equal values has no width
    numbers = cluster_bootstrap(values, [row["cluster"] for row in rows.values()])
    middle, low, high = (f"{number:{sign}.3f}" for number in numbers)
    return f"{middle} [{low}, {high}]"


def tables() -> str:
    """All tables of the tables page."""
    return "\n\n".join(f"## {task}\n\n{table(name)}" for name, (task, *_) in STUDIES.items()) + "\n"


if __name__ == "__main__":
    selected = sys.argv[2:] or [*STUDIES]
    if sys.argv[1:2] == ["run"] and set(selected) <= set(STUDIES):
        for study in selected:
            measure(study)
    elif sys.argv[1:] == ["table"]:
        TABLES.write_text(TABLES.read_text().partition(MARK)[0] + MARK + tables())
    else:
        raise SystemExit(__doc__)
