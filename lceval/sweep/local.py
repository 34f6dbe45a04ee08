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
        with ExitStack() as folders:
            begun = _begin(group, root, folders, outcome)
            if not begun:
                continue
            print(f"[{number}/{len(groups)}] {begun[0][0].name}: {len(begun)} of {len(group)} recipes", file=sys.stderr)
            if owner != group[0].owner:
                model = None
                gc.collect()
            try:
                if model is None:
                    model, owner = load_model(begun[0][1].config), group[0].owner
                answered = _answer(model, begun, outcome)
            except Exception as error:
                for cell, _ in begun:
                    _fail(outcome, cell, error)
                model, owner = None, None
                continue
            for cell, found, counts in answered:
                outcome.contexts += counts["contexts"]
                try:
                    evaluate(found, partial(_under, model, counts=counts))
                except Exception as error:
                    _fail(outcome, cell, error)
        _write(root, plan, outcome)
    outcome.folders = [root / cell.name for cell in plan.finished(root) if cell.name not in outcome.failed]
    _write(root, plan, outcome)
    return outcome


def _begin(cells: Sequence[Cell], root: Path, folders: ExitStack, outcome: Outcome) -> list[tuple[Cell, Opened]]:
    """The cells with something left to do, their folders locked until the group is done.

    A finished folder is opened too: it counts only if it is this run's, weights, adapter and versions included.
    """
    begun = []
    for cell in cells:
        try:
            found = folders.enter_context(opened(cell.argv(root / cell.name)))
        except Exception as error:
            _fail(outcome, cell, error)
            continue
        if found.finished is None:
            begun.append((cell, found))
    return begun


def _answer(
    model: Any, begun: Sequence[tuple[Cell, Opened]], outcome: Outcome
) -> list[tuple[Cell, Opened, Counter[str]]]:
    """Answer all questions of a group, context by context; the cells that went through, with what the model counted.

    A recipe that fails is out; the others go on.
    """
    from lceval.models.recipe import parse

    recipes = [parse(found.config.model_args["kv"]) for _, found in begun]
    needs = recipes[0].needs
    for recipe in recipes[1:]:
        needs |= recipe.needs
    stores: list[Responses] = []
    try:
        going = []
        for cell, found in begun:
            begin(found)
            stores.append(Responses(found.folder / "responses.sqlite"))
            going.append((cell, found, Counter[str](), stores[-1]))
        model.server.kept_for = needs
        for method, requests in _requests(begun[0][1].config, model):
            for one in list(going):
                cell, found, counts, store = one
                _under(model, found.config, counts=Counter())
                model.set_cache_hook(store)
                try:
                    store.serve(method, getattr(model, method), requests)
                except Exception as error:
                    _fail(outcome, cell, error)
                    going.remove(one)
                counts.update(model.totals)
        return [(cell, found, counts) for cell, found, counts, _ in going]
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
        cell.name: outcome.failed.get(cell.name, "finished" if cell.name in done else "not run") for cell in plan.cells
    }
    partial = root / f".{STATUS}"
    partial.write_text(json.dumps({"cells": status, "na": dict(plan.na)}, indent=1) + "\n")
    os.replace(partial, root / STATUS)
