"""The study of contexts.md: everything, the gold documents, nothing, or what a retriever finds, on the packaged model.

python docs/studies/contexts.py run [NAME …]     measures; goes on where it stopped
python docs/studies/contexts.py table            prints the tables of contexts.md from the committed samples
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lceval.stats import cluster_bootstrap

SAMPLES = Path(__file__).parent / "contexts"
RAG = {"context": "rag", "chunk": 128, "budget": 512}
SHOWN: dict[str, dict[str, Any]] = {
    "full": {},
    "gold": {"context": "gold"},
    "none": {"context": "none"},
    "rag bm25": {**RAG, "retriever": "bm25"},
    "rag dense": {**RAG, "retriever": "dense"},
}
# task, how many contexts make 40 questions, which contexts, the score of an answer
STUDIES: dict[str, tuple[str, int, list[str], str]] = {
    "nqopen-2k": ("lc_nqopen_ao_2k", 10, [*SHOWN], "subem"),
    "nqopen-4k": ("lc_nqopen_ao_4k", 10, [*SHOWN], "subem"),
    "hotpotpool-2k": ("lc_hotpotpool_ao_2k", 10, [*SHOWN], "subem"),
    "hotpotpool-4k": ("lc_hotpotpool_ao_4k", 10, [*SHOWN], "subem"),
    "financebench": ("lc_financebench_ao", 20, ["gold", "none"], "subem"),
    "tatqa": ("lc_tatqa_ao", 8, ["full", "gold", "none"], "subem"),
    "quality": ("lc_quality_mc", 4, ["full", "none"], "acc"),
}
BATCH = {"tatqa": 6, "nqopen-4k": 4, "hotpotpool-4k": 4}  # questions at a time: the same answers, sooner


def measure(name: str) -> None:
    """Run what is missing of a study."""
    from lceval.bench.evaluate import bench

    task, contexts, shown, _ = STUDIES[name]
    for context in shown:
        bench(
            task,
            ["full"],
            pretrained="smollm2-135m",
            contexts=contexts,
            against_hf=False,
            diagnose="gold",
            metadata=SHOWN[context],
            **({"batch_size": BATCH[name]} if name in BATCH else {}),
            output=SAMPLES / f"{name}-{context.replace(' ', '-')}.jsonl",
        )


def samples(name: str, context: str) -> dict[str, dict[str, Any]]:
    """The committed samples of a cell, by question."""
    lines = (SAMPLES / f"{name}-{context.replace(' ', '-')}.jsonl").read_text().splitlines()[1:]
    return {row["id"]: row for row in map(json.loads, lines)}


def table(name: str) -> str:
    """One row a context; intervals are 95%, by context, and differences are paired by question."""
    _, _, shown, score = STUDIES[name]
    first = samples(name, shown[0])
    measures = [score, *(["gold_nll"] if "gold_nll" in next(iter(first.values())) else [])]
    head = ["context", "n", *(title for m in measures for title in (m, f"{m} - {shown[0]}"))]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for context in shown:
        own = samples(name, context)
        assert own.keys() == first.keys(), (name, context)
        cells = [context, str(len(own))]
        for m in measures:
            cells.append(interval(own, lambda key, own=own, m=m: own[key][m]))  # type: ignore[misc]
            paired = interval(own, lambda key, own=own, m=m: own[key][m] - first[key][m], sign="+")  # type: ignore[misc]
            cells.append("" if context == shown[0] else paired)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(rows: dict[str, dict[str, Any]], value: Callable[[str], float], sign: str = "") -> str:
    """A mean with its interval."""
    values = [value(key) for key in rows]
    if sign and not any(values):
        return "0"  # no answer differs: a bootstrap over that knows nothing
    numbers = cluster_bootstrap(values, [row["cluster"] for row in rows.values()])
    middle, low, high = (f"{number:{sign}.3f}" for number in numbers)
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    wanted = sys.argv[2:] or [*STUDIES]
    if sys.argv[1:2] == ["run"] and set(wanted) <= set(STUDIES):
        for study in wanted:
            measure(study)
    elif sys.argv[1:] == ["table"]:
        for study, (task, *_) in STUDIES.items():
            print(f"{task}\n\n{table(study)}\n")
    else:
        raise SystemExit(__doc__)
