"""The interface of the row builders: a request for the rows of a task, and the plan that builds them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lceval.tasks import catalogue, prompts
from lceval.tasks.catalogue import Dataset
from lceval.tasks.contexts import ContextSetting
from lceval.tasks.rows import Document, Row
from lceval.tasks.tokens import TokenMeter


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
    setting: ContextSetting = field(default_factory=ContextSetting)

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
