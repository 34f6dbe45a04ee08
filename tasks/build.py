"""Build the rows of a task from its name: the entry point for lm-eval."""

import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lceval.core.errors import UserError
from lceval.tasks import catalogue, contexts, prompts, reduce, turns
from lceval.tasks.catalogue import Task
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import DEFAULT_SEED, Row, cached_rows
from lceval.tasks.tokens import TokenMeter, meter_for, names_tokenizer

if TYPE_CHECKING:
    import datasets


def dataset(*, lc_task: str, **metadata: Any) -> "dict[str, datasets.Dataset]":
    """lm-eval's `custom_dataset` of every task.

    Args:
        lc_task: Task name.
        **metadata: model_args and metadata of the run: the tokenizer, `system_instruction`, `data_seed` and the
            context setting.

    Raises:
        UserError: No tokenizer for a task with a length, missing or invalid data, a length that no context fits, or a
            context setting that the task does not support.
    """
    from datasets import Dataset  # heavy, and scoring must not need it

    return {"test": Dataset.from_list([dict(row) for row in rows_of(catalogue.find(lc_task), metadata)])}


def rows_of(task: Task, metadata: Mapping[str, Any], *, limit_tokens: int | None = None) -> list[Row]:
    """Rows of a task, built or loaded from the cache.

    Args:
        task: Task to build.
        metadata: As for `dataset`.
        limit_tokens: Overrides the length of a task that has one (training rows).

    Raises:
        UserError: As for `dataset`, or `data_seed` is not an integer.
    """
    setting = contexts.setting(task, metadata)
    requires_meter = task.length_k is not None or setting.requires_meter
    meter = meter_for(task.name, metadata) if requires_meter or names_tokenizer(metadata) else None
    seed = metadata.get("data_seed", DEFAULT_SEED)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"{task.name}: invalid data_seed={seed!r}: expected an integer, e.g. {DEFAULT_SEED}.")
    request = Request(
        task=task.name,
        dataset=task.dataset,
        output_format=task.output_format,
        meter=meter,
        limit=(limit_tokens or task.length_k * 1024) if task.length_k else None,
        seed=seed,
        metadata=metadata,
        setting=setting,
    )
    plan = row_builder(task.dataset)(request)
    inputs = {
        **plan.inputs,
        "tokenizer": meter.fingerprint if meter is not None else None,
        "limit_tokens": request.limit,
        "data_seed": request.seed,
        "context": str(setting),
    }
    return cached_rows(task.name, inputs, lambda: _build(request, plan, setting))


def row_builder(dataset: catalogue.Dataset) -> Callable[[Request], RowPlan]:
    """The function that plans a dataset's rows."""
    function: Callable[[Request], RowPlan] = pkgutil.resolve_name(dataset.rows)
    return function


def _build(request: Request, plan: RowPlan, setting: contexts.ContextSetting) -> list[Row]:
    rows = plan.build()
    if not rows:
        raise UserError(f"{request.task} has no rows: its source ({plan.inputs}) contains no usable question.")
    rows = reduce.apply(rows, request, setting)
    if catalogue.output_format_config(request.output_format)["metadata"].get("turns"):
        rows = [*turns.as_turns(rows)]
    if request.meter is not None:
        _measure(rows, request.meter, request.output_format)
    return rows


def _measure(rows: list[Row], meter: TokenMeter, output_format: str) -> None:
    """Set missing `length_tokens`: tokens of the rendered prompt plus tokens reserved for the reply."""
    config = catalogue.output_format_config(output_format)
    unmeasured = [row for row in rows if row["length_tokens"] is None]
    prompts_of = (row.get("messages") or prompts.prompt(row) for row in unmeasured)
    for row, text in zip(unmeasured, prompts_of, strict=True):
        (total,) = meter.prompts([text], row.get("answer_prefix", config.get("gen_prefix", "")))
        choices = row.get("choices") if config["output_type"] == "multiple_choice" else None
        reply = (
            max(meter.pieces([f" {choice}" for choice in choices])) if choices else catalogue.new_tokens(output_format)
        )
        row["length_tokens"] = total + reply
