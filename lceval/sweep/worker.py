"""Run groups of cells in one process, with one loaded model and one prefill per context for all recipes.

A group's cells differ only in their recipe. Context by context, all recipes answer the questions from one prefill, and
each answer is stored in the `responses.sqlite` of its cell. Then each cell is finished as by `lceval run`, from stored
responses only. A killed sweep resumes at the sample, and so does `lceval run` in any of its folders.
"""

from __future__ import annotations

import gc
import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lceval.errors import LcevalError
from lceval.responses import Responses
from lceval.run import OpenRun, begin, evaluate, load_model, opened, tasks_of
from lceval.sweep.plan import Cell

# Secrets: values of environment variables with such names, and texts that look like keys.
NAMED = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
LOOKS = re.compile(r"\b(?:hf_|sk-)[A-Za-z0-9_-]{8,}|(?<=Bearer )\S+|(?<=://)[^/\s@]+(?=@)")


@dataclass(frozen=True)
class CellResult:
    """The result of a cell: finished, or failed with a one-line error and a traceback.

    contexts: number of contexts prefilled for this cell, without those that another recipe had prefilled.
    """

    cell: str
    error: str = ""
    trace: str = ""
    contexts: int = 0


@dataclass
class ActiveCell:
    """A cell whose requests are being answered, with the model's counts and the seconds charged to this cell."""

    cell: Cell
    run: OpenRun
    store: Responses
    counts: Counter[str] = field(default_factory=Counter)
    spent_s: float = 0.0


class Worker:
    """Runs groups one after another and keeps the model while their owner stays the same."""

    def __init__(self) -> None:
        self._model: Any = None
        self._owner: object = None

    def run(self, group: Sequence[Cell], root: Path) -> list[CellResult]:
        """The results of a group; a failing cell does not stop the others."""
        results: dict[str, CellResult] = {}
        with ExitStack() as folders:
            unfinished = self._open_unfinished(group, root, folders, results)
            if unfinished:
                try:
                    answered = self._answer(self._load(*unfinished[0]), unfinished, results)
                except Exception as error:
                    results |= {cell.name: failed(cell, error) for cell, _ in unfinished}
                    self._model, self._owner = None, None
                    answered = []
                for active in answered:
                    results[active.cell.name] = self._finish(active)
        return [results[cell.name] for cell in group]

    @staticmethod
    def _open_unfinished(
        group: Sequence[Cell], root: Path, folders: ExitStack, results: dict[str, CellResult]
    ) -> list[tuple[Cell, OpenRun]]:
        """The unfinished cells, with their folders locked until the group is done.

        Finished folders are opened too: they count only if their identity (weights, adapter, versions) is this run's.
        """
        unfinished = []
        for cell in group:
            try:
                open_run = folders.enter_context(opened(cell.argv(root / cell.name)))
            except Exception as error:
                results[cell.name] = failed(cell, error)
                continue
            results[cell.name] = CellResult(cell.name)
            if open_run.finished is None:
                unfinished.append((cell, open_run))
        return unfinished

    def _load(self, cell: Cell, open_run: OpenRun) -> Any:
        """The model of the cell's owner, loaded if it is not already."""
        if self._owner != cell.owner:
            self._model = None
            gc.collect()
        if self._model is None:
            self._model, self._owner = load_model(open_run.config), cell.owner
        return self._model

    @staticmethod
    def _answer(
        model: Any, unfinished: Sequence[tuple[Cell, OpenRun]], results: dict[str, CellResult]
    ) -> list[ActiveCell]:
        """Answer all questions of a group, context by context; returns the cells without an error.

        If a recipe fails, the others continue. The time of a prefill is charged to all cells in equal parts.
        """
        from lceval.models.recipe import parse

        recipes = [parse(open_run.config.model_args["kv"]) for _, open_run in unfinished]
        stats_spec = recipes[0].stats_spec
        for recipe in recipes[1:]:
            stats_spec |= recipe.stats_spec
        cells: list[ActiveCell] = []
        with ExitStack() as stores:
            stores.callback(setattr, model.scheduler, "keep_for", None)
            for cell, open_run in unfinished:
                begin(open_run)
                cells.append(ActiveCell(cell, open_run, Responses(open_run.folder / "responses.sqlite")))
                stores.callback(cells[-1].store.close)
            model.scheduler.keep_for = stats_spec
            for method, requests in _requests(unfinished[0][1].config, model):
                prefill_s = model.scheduler.prefill_s
                for active in list(cells):
                    _switch(model, active.run.config, counts=Counter())
                    model.set_cache_hook(active.store)
                    _seed(active.run.config)
                    start, before_s = time.monotonic(), model.scheduler.prefill_s
                    try:
                        active.store.serve(method, getattr(model, method), requests)
                    except Exception as error:
                        results[active.cell.name] = failed(active.cell, error)
                        cells.remove(active)
                    active.spent_s += time.monotonic() - start - (model.scheduler.prefill_s - before_s)
                    active.counts.update(model.totals)
                for active in cells:
                    active.spent_s += (model.scheduler.prefill_s - prefill_s) / len(cells)
        return cells

    def _finish(self, active: ActiveCell) -> CellResult:
        contexts = active.counts["contexts"]
        try:
            evaluate(active.run, partial(_switch, self._model, counts=active.counts), spent_s=active.spent_s)
        except Exception as error:
            return failed(active.cell, error, contexts)
        return CellResult(active.cell.name, contexts=contexts)


def failed(cell: Cell, error: BaseException, contexts: int = 0) -> CellResult:
    """The result of a failed cell, with secrets removed from error and traceback."""
    text = (str(error).strip() or "no message").splitlines()[0]
    message = text if isinstance(error, LcevalError) else f"{type(error).__name__}: {text}"
    return CellResult(
        cell.name, without_secrets(message), without_secrets("".join(traceback.format_exception(error))), contexts
    )


def without_secrets(text: str) -> str:
    """A text without values of variables such as HF_TOKEN and without anything that looks like a key."""
    for name, value in os.environ.items():
        if NAMED.search(name) and len(value) >= 8:
            text = text.replace(value, f"[{name}]")
    return LOOKS.sub("[secret]", text)


def _requests(config: Any, model: Any) -> list[tuple[str, list[Any]]]:
    """The requests that lm-eval will make for a configuration, grouped by context."""
    _, loaded = tasks_of(config)
    groups: dict[tuple[str, str], list[Any]] = {}
    for task in loaded["tasks"].values():
        # As lm-eval's evaluator does: the configuration overrides the task.
        if config.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=config.gen_kwargs, update=True)
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


def _seed(config: Any) -> None:
    """Seed sampling per context, so that answers do not depend on other cells or on the number of workers."""
    import torch

    torch.manual_seed(config.seed[2] if config.seed else 0)


def _switch(model: Any, config: Any, *, counts: Counter[str]) -> Any:
    """Switch the loaded model to a configuration's recipe, and set its counts to that run's."""
    from lceval.models.recipe import parse

    model.totals.clear()
    model.totals.update(counts)
    model.recipe = parse(config.model_args["kv"])
    return model
