"""Groups of cells in one process: one model for those that use it, one reading of each context for all recipes.

A group's cells differ only in their recipe. Context by context its questions are answered under every recipe over one
prefill, each answer filed in its own cell's `responses.sqlite`; then each cell is finished as `lceval run` does, which
finds all of them there. A killed sweep goes on at the sample, and so would `lceval run` in any of its folders.
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
from lceval.run import Opened, begin, evaluate, load_model, opened, tasks_of
from lceval.sweep.plan import Cell

# What is a secret by the name of the environment variable that holds it, or by its looks.
NAMED = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
LOOKS = re.compile(r"\b(?:hf_|sk-)[A-Za-z0-9_-]{8,}|(?<=Bearer )\S+|(?<=://)[^/\s@]+(?=@)")


@dataclass(frozen=True)
class CellResult:
    """What became of a cell: it is finished, unless there is an error, one line of it and its traceback.

    contexts: how many were read for it, and not for another recipe before.
    """

    cell: str
    error: str = ""
    trace: str = ""
    contexts: int = 0


@dataclass
class ActiveCell:
    """A cell that is being answered: with what the model counted, and seconds that were this cell's alone."""

    cell: Cell
    found: Opened
    store: Responses
    counts: Counter[str] = field(default_factory=Counter)
    spent_s: float = 0.0


class Worker:
    """Runs groups one by one and keeps the model while their owner stays the same."""

    def __init__(self) -> None:
        self._model: Any = None
        self._owner: object = None

    def run(self, group: Sequence[Cell], root: Path) -> list[CellResult]:
        """What became of each cell; one that fails stops no other."""
        results: dict[str, CellResult] = {}
        with ExitStack() as folders:
            begun = self._begin(group, root, folders, results)
            if begun:
                try:
                    answered = self._answer(self._load(begun[0]), begun, results)
                except Exception as error:
                    results |= {cell.name: failed(cell, error) for cell, _ in begun}
                    self._model, self._owner = None, None
                    answered = []
                for one in answered:
                    results[one.cell.name] = self._finish(one)
        return [results[cell.name] for cell in group]

    @staticmethod
    def _begin(
        group: Sequence[Cell], root: Path, folders: ExitStack, results: dict[str, CellResult]
    ) -> list[tuple[Cell, Opened]]:
        """The cells with something left to do, their folders locked until the group is done.

        A finished folder is opened too: it counts only if it is this run's, weights, adapter and versions included.
        """
        begun = []
        for cell in group:
            try:
                found = folders.enter_context(opened(cell.argv(root / cell.name)))
            except Exception as error:
                results[cell.name] = failed(cell, error)
                continue
            results[cell.name] = CellResult(cell.name)
            if found.finished is None:
                begun.append((cell, found))
        return begun

    def _load(self, one: tuple[Cell, Opened]) -> Any:
        cell, found = one
        if self._owner != cell.owner:
            self._model = None
            gc.collect()
        if self._model is None:
            self._model, self._owner = load_model(found.config), cell.owner
        return self._model

    @staticmethod
    def _answer(model: Any, begun: Sequence[tuple[Cell, Opened]], results: dict[str, CellResult]) -> list[ActiveCell]:
        """Answer all questions of a group, context by context; the cells that went through.

        A recipe that fails is out; the others go on. Reading a context is charged to all of them in equal parts.
        """
        from lceval.models.recipe import parse

        recipes = [parse(found.config.model_args["kv"]) for _, found in begun]
        stats_spec = recipes[0].stats_spec
        for recipe in recipes[1:]:
            stats_spec |= recipe.stats_spec
        active: list[ActiveCell] = []
        with ExitStack() as stores:
            stores.callback(setattr, model.scheduler, "keep_for", None)
            for cell, found in begun:
                begin(found)
                active.append(ActiveCell(cell, found, Responses(found.folder / "responses.sqlite")))
                stores.callback(active[-1].store.close)
            model.scheduler.keep_for = stats_spec
            for method, requests in _requests(begun[0][1].config, model):
                prefill_s = model.scheduler.prefill_s
                for one in list(active):
                    _under(model, one.found.config, counts=Counter())
                    model.set_cache_hook(one.store)
                    _seed(one.found.config)
                    start, before_s = time.monotonic(), model.scheduler.prefill_s
                    try:
                        one.store.serve(method, getattr(model, method), requests)
                    except Exception as error:
                        results[one.cell.name] = failed(one.cell, error)
                        active.remove(one)
                    one.spent_s += time.monotonic() - start - (model.scheduler.prefill_s - before_s)
                    one.counts.update(model.totals)
                for one in active:
                    one.spent_s += (model.scheduler.prefill_s - prefill_s) / len(active)
        return active

    def _finish(self, one: ActiveCell) -> CellResult:
        contexts = one.counts["contexts"]
        try:
            evaluate(one.found, partial(_under, self._model, counts=one.counts), spent_s=one.spent_s)
        except Exception as error:
            return failed(one.cell, error, contexts)
        return CellResult(one.cell.name, contexts=contexts)


def failed(cell: Cell, error: BaseException, contexts: int = 0) -> CellResult:
    """A cell with its error, in which nothing that is secret here is left."""
    text = (str(error).strip() or "no message").splitlines()[0]
    said = text if isinstance(error, LcevalError) else f"{type(error).__name__}: {text}"
    return CellResult(
        cell.name, without_secrets(said), without_secrets("".join(traceback.format_exception(error))), contexts
    )


def without_secrets(text: str) -> str:
    """A text without the values of variables such as HF_TOKEN, and without what looks like a key."""
    for name, value in os.environ.items():
        if NAMED.search(name) and len(value) >= 8:
            text = text.replace(value, f"[{name}]")
    return LOOKS.sub("[secret]", text)


def _requests(config: Any, model: Any) -> list[tuple[str, list[Any]]]:
    """The requests of a configuration as lm-eval will make them, those on one context together."""
    _, loaded = tasks_of(config)
    groups: dict[tuple[str, str], list[Any]] = {}
    for task in loaded["tasks"].values():
        # As lm-eval's evaluator does it: over what the task says.
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
    """Sampled answers on a context depend on no other cell and on no worker."""
    import torch

    torch.manual_seed(config.seed[2] if config.seed else 0)


def _under(model: Any, config: Any, *, counts: Counter[str]) -> Any:
    """The loaded model under the recipe of a configuration, as if it had counted only that run's."""
    from lceval.models.recipe import parse

    model.totals.clear()
    model.totals.update(counts)
    model.recipe = parse(config.model_args["kv"])
    return model
