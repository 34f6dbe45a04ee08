"""Build the rows of a task from its name: the entry point for lm-eval, and the interface of the row builders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lceval.errors import UserError
from lceval.tasks import catalogue, contexts, prompts
from lceval.tasks.catalogue import Dataset, Task
from lceval.tasks.rows import DEFAULT_SEED, Document, Row, as_dataset, cached_rows, checked_seed
from lceval.tasks.tokens import TokenMeter, meter_for, names_tokenizer

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Request:
    """Input of a row builder.

    Attributes:
        task: task name, for messages.
        dataset: the task's dataset.
        output_format: template in `modes/`.
        meter: token counter of the run's tokenizer; None if no tokenizer is set and the source fixes the length.
        limit: maximum tokens of prompt plus reply, reached within 2%; None if the source fixes the length.
        seed: data seed.
        metadata: model_args and metadata of the run.
        setting: context setting.
    """

    task: str
    dataset: Dataset
    output_format: str
    meter: TokenMeter | None
    limit: int | None
    seed: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    setting: contexts.ContextSetting = field(default_factory=contexts.ContextSetting)

    @property
    def questions(self) -> int:
        """Questions per context, for datasets drawn from a pool."""
        return self.setting.questions or self.dataset.per_context

    @property
    def meter_and_limit(self) -> tuple[TokenMeter, int]:
        """Meter and token limit of a task with a fixed length."""
        assert self.meter is not None, self.task
        assert self.limit is not None, self.task
        return self.meter, self.limit

    def row(
        self,
        *,
        id: str,
        question: str,
        answers: Sequence[str],
        docs: Sequence[Document],
        gold_pids: Sequence[str],
        cluster: str,
        source: str,
        length_tokens: int | None = None,
        choices: Sequence[str] | None = None,
        **more: Any,
    ) -> Row:
        """Return a row with its prompt; `more` are dataset-specific fields, e.g. for its scorer."""
        output_format, layout = self.output_format, self.dataset.layout
        row: dict[str, Any] = {
            "id": id,
            "question": question,
            "answers": list(answers),
            "docs": list(docs),
            "gold_pids": list(gold_pids),
            "cluster": cluster,
            "context_setting": str(self.setting),
            "length_tokens": length_tokens,
            "source": source,
            "licence": self.dataset.licence,
            "instruction": prompts.instruction(layout, output_format),
            "context": prompts.block(layout, [document["text"] for document in docs]),
            "ask": prompts.ask(output_format, question, choices or ()),
            "reply_prefix": prompts.reply_prefix(output_format),
            **more,
        }
        if choices is not None:
            row["choices"] = list(choices)
        return row  # type: ignore[return-value]

    def totals(self, docs: Sequence[Document], questions: Sequence[str]) -> list[int]:
        """Tokens of each question's rendered prompt on a shared context, plus the tokens reserved for the reply.

        Only the prompt of the longest question is rendered and counted. The others differ from it only after the
        context, so they are derived from the token counts of the prompt endings.
        """
        meter, _ = self.meter_and_limit
        layout, output_format = self.dataset.layout, self.output_format
        ending_tokens = meter.pieces([prompts.render(layout, output_format, "", question) for question in questions])
        longest = max(range(len(questions)), key=ending_tokens.__getitem__)
        context = prompts.block(layout, [document["text"] for document in docs])
        (total,) = meter.prompts([prompts.render(layout, output_format, context, questions[longest])])
        return [total + catalogue.new_tokens(output_format) + end - ending_tokens[longest] for end in ending_tokens]


@dataclass(frozen=True)
class RowPlan:
    """A deferred row builder.

    Attributes:
        inputs: JSON values that the rows depend on besides the request and the code, e.g. the identity of the sources.
        build: returns the rows.
    """

    inputs: Mapping[str, Any]
    build: Callable[[], list[Row]]


def dataset(*, lc_task: str, **metadata: Any) -> "dict[str, datasets.Dataset]":
    """lm-eval's `custom_dataset` of every task.

    Args:
        lc_task: Task name.
        **metadata: model_args and metadata of the run: the tokenizer, `data_seed` and the context setting.

    Raises:
        UserError: No tokenizer for a task with a length, missing or invalid data, a length that no context fits, or a
            context setting that the task does not support.
    """
    return as_dataset(rows_of(catalogue.find(lc_task), metadata))


def rows_of(task: Task, metadata: Mapping[str, Any], *, limit_tokens: int | None = None) -> list[Row]:
    """Rows of a task, built or loaded from the cache.

    Args:
        task: Task to build.
        metadata: As for `dataset`.
        limit_tokens: Overrides the length of a task that has one (training rows).
    """
    setting = contexts.setting(task, metadata)
    requires_meter = task.length_k is not None or setting.requires_meter
    meter = meter_for(task.name, metadata) if requires_meter or names_tokenizer(metadata) else None
    request = Request(
        task=task.name,
        dataset=task.dataset,
        output_format=task.output_format,
        meter=meter,
        limit=(limit_tokens or task.length_k * 1024) if task.length_k else None,
        seed=checked_seed(task.name, metadata.get("data_seed", DEFAULT_SEED)),
        metadata=metadata,
        setting=setting,
    )
    plan = task.dataset.plan(request)
    inputs = {
        **plan.inputs,
        "tokenizer": meter.fingerprint if meter is not None else None,
        "limit_tokens": request.limit,
        "data_seed": request.seed,
        "context": str(setting),
    }
    return cached_rows(task.name, inputs, lambda: _build(request, plan, setting))


def _build(request: Request, plan: RowPlan, setting: "contexts.ContextSetting") -> list[Row]:
    rows = plan.build()
    if not rows:
        raise UserError(f"{request.task} has no rows: its source ({plan.inputs}) contains no usable question.")
    rows = contexts.apply(rows, request, setting)
    if request.meter is not None:
        _measure(rows, request.meter, request.output_format)
    return rows


def _measure(rows: list[Row], meter: TokenMeter, output_format: str) -> None:
    """Set missing `length_tokens`: tokens of the rendered prompt plus tokens reserved for the reply."""
    config = catalogue.output_format_config(output_format)
    gen_prefix = config.get("gen_prefix", "")
    unmeasured = [row for row in rows if row["length_tokens"] is None]
    prompts_of = (prompts.prompt(row) for row in unmeasured)
    for row, text in zip(unmeasured, prompts_of, strict=True):
        (total,) = meter.prompts([text], gen_prefix)
        choices = row.get("choices") if config["output_type"] == "multiple_choice" else None
        reply = (
            max(meter.pieces([f" {choice}" for choice in choices])) if choices else catalogue.new_tokens(output_format)
        )
        row["length_tokens"] = total + reply
