"""lm-eval's configuration of a run, its tasks, and their requests by context."""

from __future__ import annotations

import argparse
import logging
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import lceval
from lceval.core import yaml_config
from lceval.core.credentials import refuse_secrets
from lceval.core.errors import UserError
from lceval.core.io import read_text
from lceval.core.paths import plain_name
from lceval.runs import foreign_code

# Options of lm-eval's `run` that a run folder has no use for, with the reason. Ignoring them would mislead.
UNSUPPORTED = {
    "use_cache": "the run folder already stores every response",
    "cache_requests": "its key lacks what changes prompts, such as --metadata, --gen_kwargs and --samples",
    "check_integrity": "lceval's own tests check its tasks; use lm_eval for others",
    "show_config": "run.json in the run folder has the configuration",
    "wandb_args": "use lm_eval to log to it",
    "wandb_config_args": "use lm_eval to log to it",
    "trackio_args": "use lm_eval to log to it",
    "hf_hub_log_args": "use lm_eval to log to it",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see lceval run --help)")


def configure(argv: Sequence[str]) -> Any:
    """lm-eval's configuration from its flags and its `--config` file, with lceval's defaults and checks.

    As in lm-eval, a flag has precedence over the file, and the file over the default. `--allow-code` is
    left to the caller: no file can set it.

    Raises:
        UserError: a bad flag, a bad file, or an option that run folders do not support.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lm_eval.models  # noqa: F401  # fills the registry
    from lm_eval._cli.run import Run
    from lm_eval.api.registry import model_registry
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    parser = _Parser(prog="lceval")
    Run(parser.add_subparsers())
    lm_eval_flags = [flag for flag in argv if flag not in foreign_code.FLAGS]
    try:
        parsed = vars(parser.parse_args(["run", *lm_eval_flags]))
    except (TypeError, ValueError, RecursionError, MemoryError) as error:  # of values that lm-eval evaluates as Python
        raise UserError(f"bad value of an option ({error!r}); see lceval run --help") from None
    flags = {k: v for k, v in parsed.items() if k not in ("command", "func")}
    given = {**_config_file(flags.get("config")), **{k: v for k, v in flags.items() if v is not None}}
    template = given.get("apply_chat_template")
    if template in ("false", "none"):
        given["apply_chat_template"] = False
    if not given.get("output_path"):
        raise UserError("--output_path is required: the run folder, e.g. --output_path runs/NAME")
    for option, reason in UNSUPPORTED.items():
        if given.get(option):
            raise UserError(f"--{option} is not supported by lceval run: {reason}")
    if not given.get("tasks"):
        raise UserError("--tasks is required: NAME[,NAME...]; `lceval tasks` and `lm_eval ls tasks` list the names")
    try:
        with _without_warnings():
            config = EvaluatorConfig(**{**asdict(EvaluatorConfig()), **given, "log_samples": True})
            config._configure()
    except (ArithmeticError, ValueError, TypeError, OSError, RecursionError) as error:
        raise UserError(error) from None
    _check_values(config)
    for option in ("model_args", "gen_kwargs", "metadata"):
        refuse_secrets(option, getattr(config, option))
    if isinstance(config.tasks, str):
        config.tasks = config.tasks.split(",")
    if config.model not in model_registry:
        raise UserError(f"unknown model {config.model!r}; {_nearest(config.model, list(model_registry))}")
    if config.verbosity:
        if str(config.verbosity).upper() not in logging.getLevelNamesMapping():
            raise UserError(f"bad --verbosity {config.verbosity}: DEBUG, INFO, WARNING, ERROR or CRITICAL")
        setup_logging(config.verbosity.upper())
    if config.model == "lcft":
        _check_lcft(config, given)
    if template is None and _has_template(config.model_args):
        config.apply_chat_template = True
        config.fewshot_as_multiturn = given.get("fewshot_as_multiturn", True)
    return config


def _check_lcft(config: Any, given: Mapping[str, Any]) -> None:
    """Check lcft's model arguments and write the recipe in its canonical form, before data or models are loaded."""
    from lceval import packaged
    from lceval.models import arguments, recipe

    kv = recipe.parse(str(config.model_args.get("kv", recipe.FULL)))
    config.model_args["kv"] = str(kv)
    if "pretrained" not in config.model_args:
        raise UserError("pretrained is required: --model_args pretrained=NAME (smollm2-135m is the packaged model)")
    arguments.check_flags(config.model_args, ("batch_size", "device"))
    pretrained = packaged.resolve(str(config.model_args["pretrained"]))
    # lm-eval's default device is not checked: without CUDA it is the CPU.
    arguments.check_arguments(
        {**config.model_args, "pretrained": pretrained, "batch_size": config.batch_size, "device": given.get("device")}
    )
    query_aware, budget = config.model_args.get("query_aware", False), config.model_args.get("budget", "context")
    arguments.check_mode(kv, bool(query_aware), budget, config.model_args.get("heads"))


def _check_values(config: Any) -> None:
    """Check what lm-eval does not, and would fail on while it runs."""
    from pydantic import NonNegativeInt, TypeAdapter, ValidationError

    if config.limit is not None and not 0 < config.limit < math.inf:
        raise UserError(f"--limit {config.limit}: expected a number of samples, or a share of them below 1")
    if any(seed is not None and not 0 <= seed < 2**32 for seed in config.seed or ()):
        raise UserError(f"--seed {config.seed}: expected numbers from 0 to 2**32 - 1, or None")
    try:
        TypeAdapter(dict[str, list[NonNegativeInt]] | None).validate_python(config.samples, strict=True)
    except ValidationError:
        raise UserError(
            f'--samples {reprlib.repr(config.samples)}: expected {{"TASK": [INDEX, ...], ...}} in JSON, or its file'
        ) from None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without lm-eval's warning that --limit is for testing: it precedes every error of such a run."""
    logger = logging.getLogger("lm_eval.config.evaluate_config")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _config_file(name: str | None) -> dict[str, Any]:
    """The values of lm-eval's `--config` file; empty without one."""
    if not name:
        return {}
    from lm_eval.config.evaluate_config import DICT_KEYS, EvaluatorConfig
    from pydantic import TypeAdapter, ValidationError

    if not os.path.isfile(name):
        raise UserError(f"--config {name}: no such file")
    values = yaml_config.load(read_text(Path(name)), name)
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected keys such as model and tasks, got {type(values).__name__}")
    types = get_type_hints(EvaluatorConfig)
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{name}: unknown key {key!r}; {_nearest(key, list(types))}")
        if key in UNSUPPORTED:
            continue  # refused, whatever its value
        expected = types[key] | str if key in (*DICT_KEYS, "batch_size") else types[key]
        try:
            TypeAdapter(expected | None).validate_python(value, strict=True)
        except ValidationError:
            kind = getattr(expected, "__name__", str(expected)).replace("None", "null")
            raise UserError(f"{name}: bad {key}={reprlib.repr(value)}: expected {kind}") from None
    return values


def _has_template(model_args: dict[str, Any]) -> bool:
    """Whether the tokenizer in the model arguments has a chat template."""
    from transformers import AutoTokenizer

    from lceval import packaged
    from lceval.models.loading import loading_tokenizer

    name = model_args.get("tokenizer") or model_args.get("pretrained")
    if not name:
        return False
    with loading_tokenizer(model_args.get("pretrained"), model_args.get("tokenizer")):
        tokenizer = AutoTokenizer.from_pretrained(
            packaged.resolve(str(name)), trust_remote_code=bool(model_args.get("trust_remote_code"))
        )
    return tokenizer.chat_template is not None


def tasks_of(config: Any, *, allow_code: bool) -> tuple[Any, dict[str, Any]]:
    """lm-eval's task manager and the loaded tasks; loaded before any model, so that missing data is reported first.

    Args:
        allow_code: task files from elsewhere may run code.

    Raises:
        UserError: one contains code that is not allowed, or a task's name is a path.
    """
    with foreign_code.refused(unless=allow_code):
        manager = _task_manager(config)
        loaded = manager.load(config.tasks)
    for name in loaded["tasks"]:
        plain_name(name, "task")
    return manager, loaded


@dataclass(frozen=True)
class Context:
    """The requests on one context.

    Attributes:
        name: the row's `cluster`, else its index.
        method: method of the model that answers them.
        requests: lm-eval instances.
    """

    name: str
    method: str
    requests: list[Any]


def contexts_of(
    tasks: Iterable[Any],
    model: Any,
    *,
    template: bool | str,
    multiturn: bool = False,
    limit: float | None = None,
    samples: Mapping[str, Sequence[int]] | None = None,
    system_instruction: str | None = None,
) -> list[Context]:
    """The requests that lm-eval makes for loaded tasks, by context, in order of first appearance.

    Args:
        model: an lm-eval model with lcft's `context_end`.
        template: apply the model's chat template, or the one of this name.
        multiturn: few-shot examples as turns.
        limit: maximum number of documents of each task; below 1 their share, as in lm-eval.
        samples: indices of the documents of each task, instead of a limit.
        system_instruction: text of the system turn.
    """
    from lm_eval.evaluator_utils import get_sample_size

    contexts: dict[tuple[str, str, str], Context] = {}
    for task in tasks:
        task.build_all_requests(
            limit=get_sample_size(task, limit),
            samples=None if samples is None else samples.get(task.config.task),
            system_instruction=system_instruction,
            apply_chat_template=bool(template),
            fewshot_as_multiturn=multiturn,
            chat_template=model.apply_chat_template if template else None,
            tokenizer_name=model.tokenizer_name,
        )
        for request in task.instances:
            name = str(request.doc.get("cluster", request.doc_id))
            prompt = request.args[0]
            end = model.context_end.find(str(request.task_name), prompt, request.doc)
            context = str(request.doc_id) if end is None else sha256(prompt[:end].encode()).hexdigest()
            key = name, request.request_type, context
            contexts.setdefault(key, Context(name, request.request_type, [])).requests.append(request)
    return list(contexts.values())


def own_tasks(metadata: dict[str, Any] | None) -> Any:
    """lm-eval's task manager with lceval's tasks only: indexing lm-eval's own tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    folder = str(Path(lceval.__file__).parent / "tasks")
    return TaskManager(include_path=folder, include_defaults=False, metadata=metadata)


def _task_manager(config: Any) -> Any:
    """lm-eval's task manager, with the names in `config.tasks` resolved."""
    from lm_eval.tasks import TaskManager

    names = [name for text in config.tasks for name in text.split(",")]
    own = own_tasks(config.metadata)
    if not config.include_path and all(own.match_tasks([name]) for name in names):
        config.tasks = own.match_tasks(names)
        return own
    try:
        return config.process_tasks(config.metadata)
    except ValueError as error:
        known = TaskManager(include_path=config.include_path).all_tasks
        unknown = str(error).partition(": ")[2].split(", ")
        raise UserError("; ".join(f"unknown task {name!r}; {_nearest(name, known)}" for name in unknown)) from None


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    return (
        f"did you mean {' or '.join(near)}?"
        if near
        else "see `lceval tasks`, `lm_eval ls tasks` and `lceval run --help`"
    )
