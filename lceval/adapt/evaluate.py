"""`lceval train eval ADAPTER`: compare an adapter with its base model on held-out questions.

Both answer the same questions over the full context, over retrieved chunks (RAG) and under KV recipes. This is a sweep
whose cells are run folders. Differences are paired by question; intervals are clustered by context.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lceval.analysis.pairs import Result, diagnosis_stratum, results, score_stratum
from lceval.core.errors import InfrastructureError, UserError
from lceval.core.io import read_object
from lceval.core.safe_text import echo
from lceval.core.text_tables import pipe
from lceval.records.results import read_runs
from lceval.stats.estimates import Estimate, Stratum, difference, mean
from lceval.tasks import catalogue

if TYPE_CHECKING:
    from lceval.runs.sweep.plan import SweepPlan

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
    """The text for stdout and the exit code: 4 if a cell failed.

    Args:
        adapter: output folder of `lceval train`.
        kv: KV recipes.
        tasks: task names; empty: the tasks trained on, with the split that was not trained on.
        output_path: folder of the sweep; None: ADAPTER/eval.

    Raises:
        UserError: not a finished training run.
        InfrastructureError: all cells failed.
    """
    from lceval.runs.sweep import command
    from lceval.runs.sweep.execution import sweep
    from lceval.runs.sweep.grid import Grid
    from lceval.runs.sweep.plan import plan

    record = _record(adapter)
    grid = Grid.model_validate(_grid(adapter, record, kv or RECIPES, tasks, limit))
    planned = _own_scorers(plan(grid), adapter)
    root = output_path or adapter / "eval"
    echo(command.render(planned, root), err=True)
    with redirect_stdout(sys.stderr):
        outcome = sweep(planned, root)
    if not outcome.folders:
        raise InfrastructureError(f"all cells failed; the first: {next(iter(outcome.failed.values()))}")
    rows = compare(results(read_runs(outcome.folders)))
    return json.dumps(rows, indent=2) if as_json else render(rows), 4 if outcome.failed else 0


def _record(adapter: Path) -> dict[str, Any]:
    from lceval.training.run_record import RECORD

    file = adapter / RECORD
    if not file.is_file():
        raise UserError(
            f"{adapter} is not a training run (it has no {RECORD}): expected the output folder of lceval train"
        )
    record = read_object(file, "pass the output folder of lceval train")
    if record["status"] != "finished":
        raise UserError(f"{adapter} is not finished: rerun the same `lceval train` command to resume it")
    if "lora" not in record["recipe"]:
        raise UserError(f"{adapter} is a scorer, not an adapter: pass it to lcft as scorer={adapter}")
    return record


def _grid(
    adapter: Path, record: dict[str, Any], kv: Sequence[str], tasks: Sequence[str], limit: int | None
) -> dict[str, Any]:
    from lceval.training.run_record import SCORER

    recipe, data = record["recipe"], record["recipe"]["data"]
    names = list(tasks)
    for dataset in [] if tasks else data["datasets"]:
        length = f"_{data['length_k']:g}k" if catalogue.datasets()[dataset].lengths else ""
        names += [f"lc_{dataset}_{mode}{length}" for mode in data["modes"]]
    datasets = [catalogue.find(name).dataset for name in names]
    # Where the datasets have splits, the one that was not trained on.
    split = {"split": "test"} if all(d.splits for d in datasets) and data["split"] == "train" else {}
    contexts: list[dict[str, Any]] = [{"context": "full", **split}]
    if all("rag" in d.contexts for d in datasets):
        quarter = round(data["length_k"] * 1024) // 4
        contexts.append({"context": "rag", "retriever": "bm25", "chunk": quarter // 2, "budget": quarter, **split})
    adapters = [None, str(adapter)] if recipe["lora"] else [None]
    models = [recipe["model"]["pretrained"], *([] if recipe["lora"] else [str(adapter)])]
    return {
        "models": models,
        "adapters": adapters,
        "recipes": list(kv),
        "scorers": [None, str(adapter / SCORER)] if "scorer" in record else [None],
        "contexts": contexts,
        "tasks": names,
        "limit": limit,
        "batch_size": 4,
        "model_args": {"diagnose": "gold"},
    }


def _own_scorers(planned: SweepPlan, adapter: Path) -> SweepPlan:
    """The cells in which the base evicts by the scorer of the model, and an adapter by the one trained with it."""
    from lceval.training.run_record import SCORER

    own = str(adapter / SCORER)
    learned = {cell.recipe for cell in planned.cells if cell.scorer == own}
    cells = (c for c in planned.cells if c.recipe not in learned or (c.scorer == own) == (c.adapter is not None))
    return replace(planned, cells=tuple(cells))


def compare(cell_results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per task, context and recipe: base, tuned and paired difference, of the score and of gold_nll.

    The first result of each row is the base.
    """
    cells: dict[tuple[str, str, str], list[Result]] = {}
    for result in cell_results:
        cells.setdefault((result.task.task, str(result.task.context), str(result.run.recipe)), []).append(result)
    rows = []
    for (task, context, recipe), (base, *tuned) in cells.items():
        row: dict[str, Any] = {"task": task, "context": context, "recipe": recipe, "n": len(base.task.samples)}
        row["base"] = _estimate(mean, score_stratum(base.task, None))
        row["base_gold_nll"] = _estimate(mean, diagnosis_stratum(base.task, base.task, "gold_nll"))
        for other in tuned[:1]:
            row["tuned"] = _estimate(mean, score_stratum(other.task, None))
            row["difference"] = _estimate(difference, score_stratum(other.task, base.task))
            nll = diagnosis_stratum(other.task, base.task, "gold_nll")
            row["tuned_gold_nll"] = _estimate(mean, nll)
            row["gold_nll_difference"] = _estimate(difference, nll)
        rows.append(row)
    return rows


def _estimate(estimator: Callable[[Sequence[Stratum]], Estimate], stratum: Stratum | None) -> dict[str, float | None]:
    estimate = Estimate(None) if stratum is None else estimator([stratum])
    return {"value": estimate.value, "low": estimate.lo, "high": estimate.hi}


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a markdown table; scores in percent."""
    columns = [
        ("base", "base", 100.0),
        ("tuned", "tuned", 100.0),
        ("difference", "tuned - base", 100.0),
        ("base_gold_nll", "gold_nll base", 1.0),
        ("tuned_gold_nll", "gold_nll tuned", 1.0),
        ("gold_nll_difference", "gold_nll tuned - base", 1.0),
    ]
    header = ["task", "context", "recipe", "n", *(title for _, title, _ in columns)]
    lines = []
    for row in rows:
        cells = [_cell(row.get(key), scale, "difference" in key) for key, _, scale in columns]
        lines.append([row["task"], row["context"], row["recipe"], str(row["n"]), *cells])
    return pipe(header, lines, left=range(3))


def _cell(estimate: dict[str, float | None] | None, scale: float, signed: bool) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    sign = "+" if signed else ""
    value = f"{scale * estimate['value']:{sign}.3g}"
    low, high = estimate["low"], estimate["high"]
    return value if low is None or high is None else f"{value} [{scale * low:{sign}.3g}, {scale * high:{sign}.3g}]"
