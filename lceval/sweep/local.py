"""Cells in this process: one model for those that use it, one reading of each context for all recipes.

A group's cells differ only in their recipe. Context by context its questions are answered under every recipe over one
prefill, each answer filed in its own cell's `responses.sqlite`; then each cell is finished as `lceval run` does, which
finds all of them there. A killed sweep goes on at the sample, and so would `lceval run` in any of its folders.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lceval.errors import LcevalError
from lceval.responses import Responses
from lceval.run import Opened, begin, evaluate, load_model, opened, tasks_of
from lceval.sweep.plan import Cell, Plan

STATUS = "sweep.json"


@dataclass
class Outcome:
    """What a sweep did: folders of finished cells, in the plan's order; errors of failed ones; contexts read."""

    folders: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    contexts: int = 0


def sweep(plan: Plan, root: Path) -> Outcome:
    """Run what is not finished; a cell that fails is recorded and the rest go on."""
    outcome = Outcome()
    root.mkdir(parents=True, exist_ok=True)
    model: Any = None
    owner: object = None
    groups = plan.groups()
    for number, group in enumerate(groups, 1):
        cells = [cell for cell in group if cell not in plan.finished(root)]
        if not cells:
            continue
        print(f"[{number}/{len(groups)}] {cells[0].name}: {len(cells)} of {len(group)} recipes", file=sys.stderr)
        if owner != cells[0].owner:
            model = None
            gc.collect()
        with ExitStack() as folders:
            begun = _begin(cells, root, folders, outcome)
            try:
                if begun and model is None:
                    model, owner = load_model(begun[0][1].config), cells[0].owner
                counts = _answer(model, [found for _, found in begun]) if begun else []
                outcome.contexts += sum(count["contexts"] for count in counts)
            except Exception as error:
                for cell, _ in begun:
                    _fail(outcome, cell, error)
                model, owner = None, None
                continue
            for (cell, found), count in zip(begun, counts, strict=True):
                try:
                    evaluate(found, partial(_under, model, counts=count))
                except Exception as error:
                    _fail(outcome, cell, error)
        _write(root, plan, outcome)
    outcome.folders = [root / cell.name for cell in plan.finished(root)]
    _write(root, plan, outcome)
    return outcome


def _begin(cells: Sequence[Cell], root: Path, folders: ExitStack, outcome: Outcome) -> list[tuple[Cell, Opened]]:
    """The cells whose folders could be opened, locked until the group is done."""
    begun = []
    for cell in cells:
        try:
            begun.append((cell, folders.enter_context(opened(cell.argv(root / cell.name)))))
        except Exception as error:
            _fail(outcome, cell, error)
    return begun


def _answer(model: Any, runs: Sequence[Opened]) -> list[Counter[str]]:
    """Answer all questions of a group, context by context; returns what the model counted for each run."""
    from lceval.models.recipe import parse

    recipes = [parse(run.config.model_args["kv"]) for run in runs]
    needs = recipes[0].needs
    for recipe in recipes[1:]:
        needs |= recipe.needs
    counts: list[Counter[str]] = [Counter() for _ in runs]
    stores = []
    try:
        for run in runs:
            begin(run)
            stores.append(Responses(run.folder / "responses.sqlite"))
        model.server.kept_for = needs
        for method, requests in _requests(runs[0].config, model):
            for run, store, count in zip(runs, stores, counts, strict=True):
                _under(model, run.config, counts=Counter())
                model.set_cache_hook(store)
                store.serve(method, getattr(model, method), requests)
                count.update(model.totals)
        return counts
    finally:
        model.server.kept_for = None
        for store in stores:
            store.close()


def _requests(config: Any, model: Any) -> list[tuple[str, list[Any]]]:
    """The requests of a configuration as lm-eval will make them, those on one context together."""
    _, loaded = tasks_of(config)
    groups: dict[tuple[str, str], list[Any]] = {}
    for task in loaded["tasks"].values():
        task.build_all_requests(
            limit=None if config.limit is None else int(config.limit),
            apply_chat_template=bool(config.apply_chat_template),
            fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
            chat_template=model.apply_chat_template if config.apply_chat_template else None,
            tokenizer_name=model.tokenizer_name,
        )
        for request in task.instances:
            context = str(request.doc.get(model.context_field, request.doc_id))
            groups.setdefault((request.request_type, context), []).append(request)
    return [(method, requests) for (method, _), requests in groups.items()]


def _under(model: Any, config: Any, *, counts: Counter[str]) -> Any:
    """The loaded model under the recipe of a configuration, as if it had counted only that run's."""
    from lceval.models.recipe import parse

    model.totals.clear()
    model.totals.update(counts)
    model.recipe = parse(config.model_args["kv"])
    return model


def _fail(outcome: Outcome, cell: Cell, error: Exception) -> None:
    if os.environ.get("LCEVAL_DEBUG"):
        raise error
    text = (str(error).strip() or "no message").splitlines()[0]
    said = text if isinstance(error, LcevalError) else f"{type(error).__name__}: {text}"
    outcome.failed[cell.name] = said
    print(f"failed: {cell.name}: {said}", file=sys.stderr)


def _write(root: Path, plan: Plan, outcome: Outcome) -> None:
    """What became of every cell, at once or not at all."""
    done = {cell.name for cell in plan.finished(root)}
    status = {
        cell.name: "finished" if cell.name in done else outcome.failed.get(cell.name, "not run") for cell in plan.cells
    }
    partial = root / f".{STATUS}"
    partial.write_text(json.dumps({"cells": status, "na": dict(plan.na)}, indent=1) + "\n")
    os.replace(partial, root / STATUS)
