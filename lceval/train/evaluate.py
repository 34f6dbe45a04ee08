"""`lceval train eval ADAPTER`: what an adapter is worth, against its base, on data that it has not seen.

Both answer the same questions over the whole context, over what retrieval finds (RAG), and under KV recipes: a sweep,
whose cells are run folders. Differences are paired by question, their intervals by context.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lceval.errors import InfrastructureError, UserError
from lceval.table.intervals import Estimate, difference, mean
from lceval.table.pairs import Result, diagnosis_stratum, results, score_stratum

RECIPES = ("full", "snapkv:0.5", "snapkv:0.25", "streaming:0.25")


def run(
    adapter: Path,
    kv: Sequence[str],
    tasks: Sequence[str],
    output_path: Path | None,
    limit: int | None,
    *,
    as_json: bool,
) -> tuple[str, int]:
    """The text for stdout, and the exit code: 4 if a cell failed.

    Args:
        adapter: what `lceval train` wrote.
        kv: recipes; none: RECIPES.
        tasks: none: those that it was trained on, on the other side of the split.
        output_path: of the sweep; default ADAPTER/eval.

    Raises:
        UserError: not a finished training run. InfrastructureError: no cell could be finished.
    """
    from lceval.results import read_runs
    from lceval.sweep import command
    from lceval.sweep.engine import sweep
    from lceval.sweep.grid import Grid
    from lceval.sweep.plan import plan

    record = _record(adapter)
    grid = Grid.model_validate(_grid(adapter, record, kv or RECIPES, tasks, limit))
    planned = plan(grid)
    root = output_path or adapter / "eval"
    print(command.render(planned, root), file=sys.stderr)
    with redirect_stdout(sys.stderr):
        outcome = sweep(planned, root)
    if not outcome.folders:
        raise InfrastructureError(f"no cell was finished; the first: {next(iter(outcome.failed.values()))}")
    rows = compare(results(read_runs(outcome.folders)))
    return json.dumps(rows, indent=2) if as_json else render(rows), 4 if outcome.failed else 0


def _record(adapter: Path) -> dict[str, Any]:
    from lceval.training.run import RECORD

    file = adapter / RECORD
    if not file.is_file():
        raise UserError(f"{adapter} is no training run (it has no {RECORD}): name the output of lceval train")
    record: dict[str, Any] = json.loads(file.read_text())
    if record["status"] != "finished":
        raise UserError(f"{adapter} is not finished: the same `lceval train` line goes on with it")
    return record


def _grid(
    adapter: Path, record: dict[str, Any], kv: Sequence[str], tasks: Sequence[str], limit: int | None
) -> dict[str, Any]:
    from lceval.tasks import catalogue

    recipe, data = record["recipe"], record["recipe"]["data"]
    names = list(tasks)
    for dataset in [] if tasks else data["datasets"]:
        length = f"_{data['length_k']:g}k" if catalogue.datasets()[dataset].lengths else ""
        names += [f"lc_{dataset}_{mode}{length}" for mode in data["modes"]]
    found = [catalogue.find(name).dataset for name in names]
    # The side that was not trained on, where there are sides.
    side = {"split": "test"} if all(d.splits for d in found) and data["split"] == "train" else {}
    contexts: list[dict[str, Any]] = [{"context": "full", **side}]
    if all("rag" in d.contexts for d in found):
        quarter = round(data["length_k"] * 1024) // 4
        contexts.append({"context": "rag", "retriever": "bm25", "chunk": quarter // 2, "budget": quarter, **side})
    adapted = [None, str(adapter)] if recipe["lora"] else [None]
    models = [recipe["model"]["pretrained"], *([] if recipe["lora"] else [str(adapter)])]
    return {
        "models": models,
        "adapters": adapted,
        "recipes": list(kv),
        "contexts": contexts,
        "tasks": names,
        "limit": limit,
        "batch_size": 4,
        "model_args": {"diagnose": "gold"},
    }


def compare(found: Sequence[Result]) -> list[dict[str, Any]]:
    """A row a task, context and recipe: the base, what was tuned, and the paired difference of both measures.

    The first model of a cell is the base.
    """
    cells: dict[tuple[str, str, str], list[Result]] = {}
    for result in found:
        cells.setdefault((result.task.task, str(result.task.context), str(result.run.recipe)), []).append(result)
    rows = []
    for (task, context, recipe), (base, *tuned) in cells.items():
        row: dict[str, Any] = {"task": task, "context": context, "recipe": recipe, "n": len(base.task.samples)}
        row["base"] = _plain(_of(mean, score_stratum(base.task, None)))
        row["base_gold_nll"] = _plain(_of(mean, diagnosis_stratum(base.task, base.task, "gold_nll")))
        for other in tuned[:1]:
            row["tuned"] = _plain(_of(mean, score_stratum(other.task, None)))
            row["difference"] = _plain(_of(difference, score_stratum(other.task, base.task)))
            nll = diagnosis_stratum(other.task, base.task, "gold_nll")
            row["tuned_gold_nll"] = _plain(_of(mean, nll))
            row["gold_nll_difference"] = _plain(_of(difference, nll))
        rows.append(row)
    return rows


def _of(estimate: Any, stratum: Any) -> Estimate:
    return Estimate(None) if stratum is None else estimate([stratum])


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {"value": estimate.value, "low": estimate.lo, "high": estimate.hi}


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as markdown; scores in percent."""
    columns = [
        ("base", "base", 100.0),
        ("tuned", "tuned", 100.0),
        ("difference", "tuned - base", 100.0),
        ("base_gold_nll", "gold_nll base", 1.0),
        ("tuned_gold_nll", "gold_nll tuned", 1.0),
        ("gold_nll_difference", "gold_nll tuned - base", 1.0),
    ]
    lines = ["| " + " | ".join(["task", "context", "recipe", "n", *(title for _, title, _ in columns)]) + " |"]
    lines.append("| --- | --- | --- |" + " ---: |" * (1 + len(columns)))
    for row in rows:
        cells = [_cell(row.get(key), scale, "difference" in key) for key, _, scale in columns]
        lines.append("| " + " | ".join([row["task"], row["context"], row["recipe"], str(row["n"]), *cells]) + " |")
    return "\n".join(lines)


def _cell(found: dict[str, float | None] | None, scale: float, signed: bool) -> str:
    if found is None or found["value"] is None:
        return "-"
    sign = "+" if signed else ""
    value = f"{scale * found['value']:{sign}.3g}"
    low, high = found["low"], found["high"]
    return value if low is None or high is None else f"{value} [{scale * low:{sign}.3g}, {scale * high:{sign}.3g}]"
