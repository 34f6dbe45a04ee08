"""Encode rows as packed contexts, with the prompt, tokens and context boundary of `lcft` and the target answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lceval.models.boundary import CONTEXT, ContextEnd, boundary_of
from lceval.tasks import prompts
from lceval.tasks.rows import Row
from lceval.training.data import TrainingRow
from lceval.training.packing import QAPair


@dataclass(frozen=True)
class Packed:
    """Token ids of a context and of its questions and answers.

    Attributes:
        ids: per question, the id of its row.
        self_distillation: whether every question is repeated with the full context (`packing.pack`).
    """

    context: tuple[int, ...]
    pairs: tuple[QAPair, ...]
    ids: tuple[str, ...]
    self_distillation: bool = False

    @property
    def tokens(self) -> int:
        """Input tokens."""
        blocks = sum(len(pair.question) + len(pair.answer) - 1 for pair in self.pairs)
        return len(self.context) + blocks * (2 if self.self_distillation else 1)

    @property
    def predicted(self) -> int:
        """Tokens with a label."""
        return sum(len(pair.answer) for pair in self.pairs) * (2 if self.self_distillation else 1)


class Encoder:
    """Encodes rows for a model.

    Args:
        lm: lm-eval's model (HFLM or a subclass), for its chat template and tokenizer.
        chat_template: whether to apply the chat template.
    """

    def __init__(self, lm: Any, *, chat_template: bool) -> None:
        self._lm = lm
        self._template = chat_template

    def encode(self, rows: Iterable[TrainingRow], *, self_distillation: bool = False) -> list[Packed]:
        """The rows grouped by context, in order of first appearance."""
        groups: dict[tuple[int, ...], list[tuple[QAPair, str]]] = {}
        for row in rows:
            context, pair = self.pair(row, row["target"])
            groups.setdefault(context, []).append((pair, row["id"]))
        return [
            Packed(context, tuple(pair for pair, _ in pairs), tuple(name for _, name in pairs), self_distillation)
            for context, pairs in groups.items()
        ]

    def pair(self, row: Row, target: str) -> tuple[tuple[int, ...], QAPair]:
        """Token ids of a row's context, and of its question and answer; the answer ends with the end-of-turn token."""
        text = prompts.prompt(row)
        if self._template:
            text = self._lm.apply_chat_template([{"role": "user", "content": text}])
        ids = self._lm.tok_batch_encode([text])[0][0].tolist()
        end = ContextEnd(CONTEXT).find("", text, row)
        boundary = len(ids) - 1 if end is None else boundary_of(text[:end], ids, self._lm.tok_encode)
        answer = [*self._after(text, ids, target), self._lm.eot_token_id]
        return tuple(ids[:boundary]), QAPair(tuple(ids[boundary:]), tuple(answer))

    def _after(self, text: str, ids: Sequence[int], target: str) -> list[int]:
        combined = self._lm.tok_encode(text + ("" if text[-1:].isspace() else "\n") + target)
        if list(combined[: len(ids)]) == list(ids):
            return list(combined[len(ids) :])
        return list(self._lm.tok_encode(target, add_special_tokens=False))
