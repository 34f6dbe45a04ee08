"""From a task's name to its rows: what lm-eval calls, and what every builder is given and gives back."""

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
    """What a builder is asked for.

    Attributes:
        task: the name, for messages.
        meter: of the run's tokenizer; None where none is named and the source fixes the length.
        limit: tokens of prompt plus reply that no row exceeds and every row nearly reaches; None: as the source is.
        metadata: model_args and metadata of the run.
        choice: what the questions are shown, and what their context is drawn from.
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
        """How many questions a context is to have, where that is not the source's to say."""
        return self.setting.questions or self.dataset.per_context

    @property
    def fitted(self) -> tuple[TokenMeter, int]:
        """The meter and the limit of a task that has a length."""
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
        """A row with its prompt. `more` holds fields of the dataset's own that its scorer or a reader wants."""
        output_format, layout = self.output_format, self.dataset.layout
        made: dict[str, Any] = {
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
            made["choices"] = list(choices)
        return made  # type: ignore[return-value]

    def totals(self, docs: Sequence[Document], questions: Sequence[str]) -> list[int]:
        """Tokens of each question's rendered prompt on one context, plus the room for the reply.

        The longest is rendered and counted; the others differ from it only after the context, so the difference of
        their ends is added instead of counting the context again.
        """
        meter, _ = self.fitted
        layout, output_format = self.dataset.layout, self.output_format
        ends = meter.pieces([prompts.render(layout, output_format, "", question) for question in questions])
        longest = max(range(len(questions)), key=ends.__getitem__)
        context = prompts.block(layout, [document["text"] for document in docs])
        (total,) = meter.prompts([prompts.render(layout, output_format, context, questions[longest])])
        return [total + catalogue.new_tokens(output_format) + end - ends[longest] for end in ends]


@dataclass(frozen=True)
class Plan:
    """Rows to come.

    Attributes:
        inputs: what they depend on besides the request and the code: the identity of the sources, JSON values.
        build: makes them.
    """

    inputs: Mapping[str, Any]
    build: Callable[[], list[Row]]


def dataset(*, lc_task: str, **metadata: Any) -> "dict[str, datasets.Dataset]":
    """lm-eval's `custom_dataset` of every task.

    Args:
        lc_task: The task's name.
        **metadata: model_args and metadata of the run: the tokenizer, `data_seed`, and what lceval.tasks.contexts
            reads.

    Raises:
        UserError: No tokenizer where lengths are measured, no data, damaged data, a length that nothing fits, or a
            context that the task does not have.
    """
    return as_dataset(rows_of(catalogue.find(lc_task), metadata))


def rows_of(task: Task, metadata: Mapping[str, Any], *, limit_tokens: int | None = None) -> list[Row]:
    """The rows of a task, built or from the cache.

    Args:
        task: What to build.
        metadata: As for `dataset`.
        limit_tokens: In place of the length of a task that has one, for rows that no task is made of (training).
    """
    setting = contexts.setting(task, metadata)
    needs_meter = task.length_k is not None or setting.needs_meter
    meter = meter_for(task.name, metadata) if needs_meter or names_tokenizer(metadata) else None
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


def _build(request: Request, plan: Plan, setting: "contexts.ContextSetting") -> list[Row]:
    rows = plan.build()
    if not rows:
        raise UserError(f"{request.task} has no rows: its source ({plan.inputs}) holds none that can be asked.")
    rows = contexts.apply(rows, request, setting)
    if request.meter is not None:
        _measure(rows, request.meter, request.output_format)
    return rows


def _measure(rows: list[Row], meter: TokenMeter, output_format: str) -> None:
    """Set `length_tokens` where it is not known yet: the rendered prompt and the room for the reply."""
    config = catalogue.output_format_config(output_format)
    begin = config.get("gen_prefix", "")
    unknown = [row for row in rows if row["length_tokens"] is None]
    prompts_of = (prompts.prompt(row) for row in unknown)
    for row, text in zip(unknown, prompts_of, strict=True):
        (total,) = meter.prompts([text], begin)
        choices = row.get("choices") if config["output_type"] == "multiple_choice" else None
        reply = (
            max(meter.pieces([f" {setting}" for setting in choices]))
            if choices
            else catalogue.new_tokens(output_format)
        )
        row["length_tokens"] = total + reply
