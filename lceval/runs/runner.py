"""The one loop over contexts and KV recipes: `run`, `demo`, `sweep` and `bench eval` call it.

Context by context, all recipes answer the questions from one prefill. A run folder's answers are stored as they arrive,
and it is finished by lm-eval from stored answers only, so a killed run resumes at the sample.
"""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Generic, Protocol, TypeVar

from lceval.core.errors import UserError
from lceval.core.interrupt import finishing_samples
from lceval.records.responses import Responses
from lceval.runs.configuration import Context, contexts_of, tasks_of
from lceval.runs.folder import OpenRun, RunOutcome, begin, finish, opened

# Model arguments that may differ between runs of one loaded model.
RECIPE_ARGUMENTS = ("kv", "scorer")
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


class Side(Protocol):
    """One of those that answer the same contexts: a recipe, or another model."""

    def answer(self, context: Context) -> list[Any]:
        """One response per request."""
        ...


S = TypeVar("S", bound=Side)


@dataclass(frozen=True)
class Answers(Generic[S]):
    """A side's answers on one context.

    Attributes:
        seconds: of these answers, without prefills of contexts.
        prefill_s: seconds of the prefills during these answers, which later sides may share.
    """

    side: S
    context: Context
    responses: list[Any]
    seconds: float
    prefill_s: float


def answers(
    model: Any,
    sides: Sequence[S],
    contexts: Sequence[Context],
    *,
    is_open: Callable[[S, Context], bool] = lambda *_: True,
    on_error: Callable[[S, Exception], None] | None = None,
) -> Iterator[Answers[S]]:
    """Every context answered by every side in turn, so that recipes share its prefill (`LCFT.sharing_prefills`).

    Args:
        is_open: whether a side still has to answer a context.
        on_error: receives the error of a side, which then answers no more; None raises it.
    """
    from tqdm import tqdm

    remaining = list(sides)
    todo = sum(is_open(side, context) for context in contexts for side in sides)
    with tqdm(total=todo, desc="contexts x recipes", disable=not todo) as bar:
        for context in contexts:
            for side in list(remaining):
                if not is_open(side, context):
                    continue
                start, before_s = time.perf_counter(), model.prefill_s
                try:
                    responses = side.answer(context)
                except Exception as error:
                    if on_error is None:
                        raise
                    on_error(side, error)
                    remaining.remove(side)
                    continue
                prefill_s = model.prefill_s - before_s
                bar.update()
                yield Answers(side, context, responses, time.perf_counter() - start - prefill_s, prefill_s)


def run(argv: Sequence[str]) -> RunOutcome:
    """Run or resume the evaluation that lm-eval's `run` flags describe.

    Raises:
        UserError: bad flags, or a folder that contains another run.
        InfrastructureError: lm-eval did not write its results.
    """
    with opened(argv) as open_run:
        (outcome,) = Runner().evaluate([open_run])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@dataclass
class RecipeSide:
    """A run folder whose requests are being answered: its counts of the model, and the seconds charged to it."""

    model: Any
    open_run: OpenRun
    store: Responses
    totals: Counter[str] = field(default_factory=Counter)
    spent_s: float = 0.0

    def answer(self, context: Context) -> list[Any]:
        """Answers from the folder where stored, else from the model under the run's recipe."""
        import torch

        config = self.open_run.config
        self.model.use(config.model_args["kv"], scorer=config.model_args.get("scorer") or "")
        self.model.set_cache_hook(self.store)
        # Seeded per context, so that answers do not depend on other runs or on the number of workers.
        torch.manual_seed(config.seed[2] if config.seed else 0)
        method = partial(getattr(self.model, context.method), disable_tqdm=True)
        try:
            return self.store.serve(context.method, method, context.requests)
        finally:
            self.totals.update(self.model.totals)


class Runner:
    """Evaluates run folders, and keeps the loaded model while the next ones need the same.

    Raises:
        UserError: one of several processes, which would share a run folder.
    """

    def __init__(self) -> None:
        if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise UserError(
                f"a run folder belongs to one process, and this is one of {processes}: use `accelerate launch -m "
                "lm_eval --model lcft`, or `lceval sweep --workers N`"
            )
        self._model: Any = None
        self._key: object = None

    def evaluate(self, runs: Sequence[OpenRun]) -> list[RunOutcome | Exception]:
        """The outcome of each run; runs that differ only in KV recipe and scorer share every prefill.

        A failed run does not stop the others.
        """
        # Other models answer all requests in one call; there a signal stops at once.
        ours = all(run.config.model == "lcft" for run in runs)
        with finishing_samples() if ours else nullcontext():
            return self._evaluate(runs)

    def _evaluate(self, runs: Sequence[OpenRun]) -> list[RunOutcome | Exception]:
        outcomes: dict[int, RunOutcome | Exception] = {
            place: finished for place, run in enumerate(runs) if (finished := run.finished) is not None
        }
        todo = {place: run for place, run in enumerate(runs) if place not in outcomes}
        try:
            # Before the model, so that missing data is reported first.
            first = next(iter(todo.values()), None)
            loaded = tasks_of(first.config, allow_code=first.allow_code)[1] if first else {}
            model = self._load(first.config) if first else None
            sides = self._answer(model, loaded, todo, outcomes) if len(todo) > 1 else {}
        except Exception as error:
            self._model, self._key = None, None
            return [outcomes.get(place, error) for place in range(len(runs))]
        for place, open_run in todo.items():
            if place not in outcomes:
                try:
                    outcomes[place] = _finished(open_run, model, sides.get(place))
                except Exception as error:
                    outcomes[place] = error
        return [outcomes[place] for place in range(len(runs))]

    def _load(self, config: Any) -> Any:
        """The model of a configuration, whatever its recipe; loaded if it is not already."""
        arguments = {key: value for key, value in config.model_args.items() if key not in RECIPE_ARGUMENTS}
        key = (config.model, arguments, config.batch_size, config.max_batch_size, config.device)
        if self._key != key:
            self._model = None
            gc.collect()
            self._model, self._key = load_model(config), key
        return self._model

    @staticmethod
    def _answer(
        model: Any, loaded: Mapping[str, Any], runs: Mapping[int, OpenRun], outcomes: dict[int, RunOutcome | Exception]
    ) -> dict[int, RecipeSide]:
        """Answer all questions, context by context, and charge the prefills to all recipes in equal parts."""
        config = next(iter(runs.values())).config
        for task in loaded["tasks"].values():
            # As lm-eval's evaluator does: the configuration overrides the task.
            if config.gen_kwargs and task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value=config.gen_kwargs, update=True)
            default = task.get_config("num_fewshot")
            if default is None or (default and config.num_fewshot is not None):
                task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
            task.set_fewshot_seed(seed=config.seed[3] if config.seed else 1234)
        contexts = contexts_of(
            loaded["tasks"].values(),
            model,
            template=config.apply_chat_template,
            multiturn=bool(config.fewshot_as_multiturn),
            limit=config.limit,
            samples=config.samples,
            system_instruction=config.system_instruction,
        )
        with ExitStack() as stores:
            sides = {}
            for place, open_run in runs.items():
                begin(open_run)
                store = stores.enter_context(closing(Responses(open_run.folder / "responses.sqlite")))
                sides[place] = RecipeSide(model, open_run, store)
            args = [run.config.model_args for run in runs.values()]
            scorers = {arguments.get("scorer") or "" for arguments in args}
            stores.enter_context(model.sharing_prefills([arguments["kv"] for arguments in args], scorers))

            def failed(side: RecipeSide, error: Exception) -> None:
                (place,) = (place for place, other in sides.items() if other is side)
                outcomes[place] = error
                del sides[place]

            prefill_s = 0.0
            for one in answers(model, [*sides.values()], contexts, on_error=failed):
                one.side.spent_s += one.seconds
                prefill_s += one.prefill_s
            for side in sides.values():
                side.spent_s += prefill_s / len(sides)
        return sides


def load_model(config: Any) -> Any:
    """Load the model of a configuration; lcft without recipe and scorer, since other runs may use others."""
    from lm_eval.api.registry import get_model

    ours = config.model == "lcft"
    arguments = {k: v for k, v in config.model_args.items() if not (ours and k in RECIPE_ARGUMENTS)}
    flags = {"batch_size": config.batch_size, "max_batch_size": config.max_batch_size, "device": config.device}
    return get_model(config.model).create_from_arg_obj(arguments, flags)


def _finished(open_run: OpenRun, lm: Any, side: RecipeSide | None) -> RunOutcome:
    """Answer the remaining requests, score all of them, and finish the run folder."""
    from lm_eval import simple_evaluate

    config, folder = open_run.config, open_run.folder
    manager, loaded = tasks_of(config, allow_code=open_run.allow_code)
    tasks = [loaded.get("groups", {}).get(name) or loaded["tasks"].get(name, name) for name in config.tasks]
    started = time.monotonic()
    begin(open_run)
    if config.model == "lcft":
        lm.use(config.model_args["kv"], side.totals if side else None, config.model_args.get("scorer") or "")
    store = Responses(folder / "responses.sqlite")
    _collect_environment_once()
    seeds = dict(zip(_SEEDS, config.seed, strict=True)) if config.seed else {}
    # Closed also on failure: the model is reused, and must not answer other runs from this folder.
    with closing(store):
        store.attach(lm)
        results = simple_evaluate(
            model=lm,
            tasks=tasks,
            num_fewshot=config.num_fewshot,
            batch_size=config.batch_size,
            device=config.device,
            limit=config.limit,
            samples=config.samples,
            write_out=config.write_out,
            log_samples=True,
            system_instruction=config.system_instruction,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            gen_kwargs=config.gen_kwargs,
            task_manager=manager,
            predict_only=config.predict_only,
            confirm_run_unsafe_code=config.confirm_run_unsafe_code,
            metadata=config.metadata,
            **seeds,
        )
    totals: Mapping[str, int] = getattr(lm, "totals", {})
    reused = side.store.reused if side else store.reused
    outcome = RunOutcome(folder, len(store.requested), len(reused), totals.get("contexts", 0))
    if results is not None:  # None in a distributed run's other processes
        finish(open_run, lm, results, outcome.samples, (side.spent_s if side else 0.0) + time.monotonic() - started)
    return outcome


def _collect_environment_once() -> None:
    """Let lm_eval reuse its description of the environment: it calls `pip list` in every run, which takes seconds."""
    from torch.utils import collect_env

    if not hasattr(collect_env.get_pretty_env_info, "cache_info"):
        collect_env.get_pretty_env_info = cache(collect_env.get_pretty_env_info)
