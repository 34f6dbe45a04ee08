"""From rows to packed contexts: the same prompt, tokens and boundary that `lcft` sees, and the answer to be learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lceval.models.prefix import find_boundary
from lceval.tasks import prompts
from lceval.tasks.rows import Row
from lceval.training.data import TrainingRow
from lceval.training.packing import QAPair


@dataclass(frozen=True)
class Packed:
    """A context with its questions and answers: tokens.

    Attributes:
        ids: per turn, the id of its row.
        twin: whether training reads every turn a second time, over the whole context (`packing.pack`).
    """

    context: tuple[int, ...]
    pairs: tuple[QAPair, ...]
    ids: tuple[str, ...]
    self_distillation: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that training reads."""
        blocks = sum(len(pair.question) + len(pair.answer) - 1 for pair in self.pairs)
        return len(self.context) + blocks * (2 if self.self_distillation else 1)

    @property
    def predicted(self) -> int:
        """Tokens of answers that training predicts."""
        return sum(len(pair.answer) for pair in self.pairs) * (2 if self.self_distillation else 1)


class Encoder:
    """Encodes rows for a model.

    Args:
        lm: lm-eval's model (HFLM or a subclass of it), whose template and tokenizer are used.
        chat_template: whether a row's prompt goes through the template.
    """

    def __init__(self, lm: Any, *, chat_template: bool) -> None:
        self._lm = lm
        self._template = chat_template

    def encode(self, rows: Iterable[TrainingRow], *, self_distillation: bool = False) -> list[Packed]:
        """The rows, those on one context together, in order of first appearance."""
        groups: dict[tuple[int, ...], list[tuple[QAPair, str]]] = {}
        for row in rows:
            context, pair = self.pair(row, row["target"])
            groups.setdefault(context, []).append((pair, row["id"]))
        return [
            Packed(context, tuple(pair for pair, _ in found), tuple(name for _, name in found), self_distillation)
            for context, found in groups.items()
        ]

    def pair(self, row: Row, target: str) -> tuple[tuple[int, ...], QAPair]:
        """The tokens of a row's context, and of its question and answer; an answer ends as the model's replies do."""
        text = prompts.prompt(row)
        if self._template:
            text = self._lm.apply_chat_template([{"role": "user", "content": text}])
        ids = self._lm.tok_batch_encode([text])[0][0].tolist()
        boundary = find_boundary(text, ids, row["context"], self._lm.tok_encode)
        boundary = len(ids) - 1 if boundary is None else boundary
        answer = [*self._after(text, ids, target), self._lm.eot_token_id]
        return tuple(ids[:boundary]), QAPair(tuple(ids[boundary:]), tuple(answer))

    def _after(self, text: str, ids: Sequence[int], target: str) -> list[int]:
        whole = self._lm.tok_encode(text + ("" if text[-1:].isspace() else "\n") + target)
        if list(whole[: len(ids)]) == list(ids):
            return list(whole[len(ids) :])
        return list(self._lm.tok_encode(target, add_special_tokens=False))
