"""The paper's Table 2 in small: adapters and learned eviction on six data sets, beside RAG with equal bytes.

python studies/table2.py run [ARM ...]     run the cells of these arms, as sweeps
python studies/table2.py keep              save the scores by question in table2.json
python studies/table2.py table             write docs/studies/table2-tables.md from the saved scores

Arms are `base`, `ao` (an adapter trained on answers with the full cache) and `joint` (trained together with its
scorer), those of studies/joint.py with seed 0. The first two evict by a scorer of studies/learned.py, which has to be
trained first. RAG retrieves 128-token chunks by BM25, up to a quarter of the context's tokens. The other cells read the
whole context, query-agnostic. At most 60 questions a cell, of the test split where there is one. Rerun the same command
to resume. Run folders are in runs/studies/table2. Needs LCEVAL_DATA.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from parts import Rows, added, interval, share, table

if TYPE_CHECKING:
    from lceval.runs.sweep.grid import Grid

SCORES = Path(__file__).parent / "table2.json"
TABLES = Path(__file__).parents[1] / "docs" / "studies" / "table2-tables.md"
TITLE = "# The paper's Table 2 in small: all tables\n\n"
RUNS = Path("runs/studies/table2")
START = "runs/studies/learned/kvzip-plus"
# Arm -> adapter and scorer.
ARMS: dict[str, tuple[str | None, str]] = {
    "base": (None, START),
    "ao": ("studies/adapters/ao-0", START),
    "joint": ("studies/adapters/joint-0", "studies/adapters/joint-0/scorer"),
}
LIMIT = 60
POOL = {"split": "test", "questions": 4}
RAG = {"context": "rag", "retriever": "bm25", "chunk": 128, "budget": 0.25}
KVZAP = "kvzap:0.25"
# Task -> name, context setting of the whole context, the change of RAG, further budgets. Whole filings of FinanceBench
# do not fit the model: its context is the pages with the evidence, and RAG has about a quarter of their tokens.
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    "lc_squad_ao_1k": ("SQuAD 1k", POOL, {}, ["kvzap:0.5", "kvzap:0.1"]),
    "lc_nqopen_ao_2k": ("Natural Questions 2k", POOL, {}, ["kvzap:0.5", "kvzap:0.1"]),
    "lc_hotpotpool_ao_2k": ("HotpotQA 2k", POOL, {}, []),
    "lc_filings_ao_1k": ("annual reports 1k", {}, {}, []),
    "lc_financebench_ao": ("FinanceBench, evidence pages", {"context": "gold"}, {"budget": 256}, []),
    "lc_quality_mc": ("QuALITY", {}, {}, []),
}


def grids(arm: str) -> Iterator[Grid]:
    """The sweeps of an arm: per task whole contexts under each recipe, then RAG and no context."""
    from lceval.runs.sweep.grid import Grid

    adapter, scorer = ARMS[arm]
    for task, (_, whole, changes, budgets) in TASKS.items():
        settings: dict[str, Any] = {
            "models": ["smollm2-135m"],
            "adapters": [adapter],
            "scorers": [scorer],
            "tasks": [task],
            "limit": LIMIT,
            "batch_size": 4,
            "model_args": {"diagnose": "gold", "dtype": "float32", **({"merge": True} if adapter else {})},
        }
        yield Grid(recipes=["full", KVZAP, *budgets], contexts=[whole or "full"], **settings)
        others = [{**whole, **RAG, **changes}, {**whole, "context": "none"}]
        yield Grid(recipes=["full"], contexts=others, **settings)


def run(arms: Sequence[str]) -> None:
    """Run the missing cells."""
    from lceval.runs.sweep.execution import sweep
    from lceval.runs.sweep.plan import plan

    for arm in arms:
        for grid in grids(arm):
            outcome = sweep(plan(grid), RUNS / arm)
            if outcome.failed:
                raise SystemExit(f"failed: {outcome.failed}")


def keep() -> None:
    """Save score, gold_nll and bytes of every question, by task, arm and cell."""
    from lceval.records.results import read_runs

    saved: dict[str, Any] = {}
    for arm in ARMS:
        for one in read_runs([RUNS / arm]) if (RUNS / arm).is_dir() else ():
            (task,) = one.tasks
            cell = {"rag": "RAG", "none": "none"}.get(str(task.context).partition(":")[0], one.recipe)
            of_task = saved.setdefault(task.task, {"metric": task.headline, "clusters": {}, "scores": {}})
            of_task["clusters"] |= {s.id: s.cluster for s in task.samples}
            of_task["scores"].setdefault(arm, {})[cell] = {
                s.id: [s.score, float(f"{({**s.metrics, **s.diagnosis})['gold_nll']:.6g}"), s.kv_bytes]
                for s in task.samples
            }
    SCORES.write_text(json.dumps(saved, separators=(",", ":"), sort_keys=True) + "\n")


def rows_of(of_task: dict[str, Any], arm: str, cell: str, column: int) -> Rows:
    """Cluster and value of every question; an unanswered one counts as 0."""
    of_cell = of_task["scores"].get(arm, {}).get(cell, {})
    return {key: (of_task["clusters"][key], values[column] or 0.0) for key, values in of_cell.items()}


def tables() -> str:
    """All tables of the tables page."""
    saved = json.loads(SCORES.read_text())
    parts = []
    for task, (name, *_, budgets) in TASKS.items():
        if task not in saved:
            continue
        body = []
        for arm in saved[task]["scores"]:
            none, full = (rows_of(saved[task], arm, cell, 1) for cell in ("none", "full"))
            for cell in ("full", *sorted([KVZAP, *budgets], reverse=True), "RAG", "none"):
                score, nll, size = (rows_of(saved[task], arm, cell, column) for column in range(3))
                if not nll:
                    continue
                cost = sum(value for _, value in size.values()) / len(size) / 1e6
                changes = ["-", "-"] if cell == "full" else [added(nll, full), share(nll, full, none)]
                body.append(
                    [f"`{arm}`, {cell}", str(len(nll)), f"{cost:.1f}", interval(score, 100), interval(nll), *changes]
                )
        head = ["arm, context", "n", "KV MB", f"{saved[task]['metric']} %", "gold_nll", "added", "share of the way %"]
        parts += [f"## {name} (`{task}`)", table(head, body)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *arms] if {*arms} <= {*ARMS}:
            run(arms or list(ARMS))
        case ["keep"]:
            keep()
        case ["table"]:
            TABLES.write_text(TITLE + tables())
        case _:
            raise SystemExit(__doc__)
