"""lm-eval's configuration of a run, its tasks, and their requests by context."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lceval
from lceval.core.errors import UserError


def configure(argv: Sequence[str]) -> Any:
    """lm-eval's configuration from its flags, with lceval's defaults and checks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lm_eval.models  # noqa: F401  # fills the registry
    from lm_eval._cli.run import Run
    from lm_eval.api.registry import model_registry
    from lm_eval.config.evaluate_config import EvaluatorConfig

    parser = argparse.ArgumentParser(prog="lceval")
    Run(parser.add_subparsers())
    arguments = parser.parse_args(["run", *argv])
    template = getattr(arguments, "apply_chat_template", None)
    if template in ("false", "none"):
        del arguments.apply_chat_template
    arguments.log_samples = True
    if not arguments.output_path:
        raise UserError("--output_path is required: the run folder, e.g. --output_path runs/NAME")
    if arguments.use_cache:
        raise UserError("--use_cache is not supported: the run folder already stores every response")
    if not arguments.tasks and not arguments.config:
        raise UserError("--tasks is required: NAME[,NAME...]; `lceval tasks` and `lm_eval ls tasks` list the names")
    try:
        config = EvaluatorConfig.from_cli(arguments)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    if config.model not in model_registry:
        raise UserError(f"unknown model {config.model!r}; {_nearest(config.model, list(model_registry))}")
    if config.model == "lcft":
        from lceval.models import recipe

        config.model_args["kv"] = str(recipe.parse(str(config.model_args.get("kv", recipe.FULL))))
        if "pretrained" not in config.model_args:
            raise UserError("pretrained is required: --model_args pretrained=NAME (smollm2-135m is the packaged model)")
    if template is None and _has_template(config.model_args):
        config.apply_chat_template = True
        config.fewshot_as_multiturn = True
    return config


def _has_template(model_args: dict[str, Any]) -> bool:
    """Whether the tokenizer in the model arguments has a chat template."""
    from transformers import AutoTokenizer

    from lceval import packaged

    name = model_args.get("tokenizer") or model_args.get("pretrained")
    if not name:
        return False
    try:
        tokenizer = AutoTokenizer.from_pretrained(packaged.resolve(str(name)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the tokenizer of {name!r}: {reason}") from None
    return tokenizer.chat_template is not None


def tasks_of(config: Any) -> tuple[Any, dict[str, Any]]:
    """lm-eval's task manager and the loaded tasks; loaded before any model, so that missing data is reported first."""
    manager = _task_manager(config)
    return manager, manager.load(config.tasks)


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
    tasks: Iterable[Any], model: Any, *, template: bool, multiturn: bool = False, limit: int | None = None
) -> list[Context]:
    """The requests that lm-eval makes for loaded tasks, by context, in order of first appearance.

    Args:
        model: an lm-eval model with lcft's `context_field`.
        template: apply the model's chat template.
        multiturn: few-shot examples as turns.
        limit: maximum number of documents of each task.
    """
    contexts: dict[tuple[str, str, str], Context] = {}
    for task in tasks:
        task.build_all_requests(
            limit=limit,
            apply_chat_template=template,
            fewshot_as_multiturn=multiturn,
            chat_template=model.apply_chat_template if template else None,
            tokenizer_name=model.tokenizer_name,
        )
        for request in task.instances:
            name = str(request.doc.get("cluster", request.doc_id))
            key = name, request.request_type, str(request.doc.get(model.context_field, request.doc_id))
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
