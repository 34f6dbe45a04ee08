"""Answers of a model with telemetry.

lm-eval passes answers on as plain strings and pairs. These are strings and pairs with a `meta` dict for scoring:
`kv_bytes`, `kv_bytes_full` and the dict `kv`. Without one they are plain: lm-eval converts gold answers to the type of
an answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

DIAGNOSES = ("gold_kept", "gold_nll", "ndcg10")
"""What `diagnose=` measures; None for a sample to which one does not apply."""


class Text(str):
    """A generated answer."""

    meta: dict[str, Any]

    def __new__(cls, text: str = "", meta: dict[str, Any] | None = None) -> Text:
        self = super().__new__(cls, text)
        self.meta = meta or {}
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Text, (str(self), self.meta)


class Score(tuple[float, bool]):
    """A continuation's log-likelihood, and whether greedy decoding would produce it."""

    meta: dict[str, Any]

    def __new__(cls, pair: Iterable[Any] = (), meta: dict[str, Any] | None = None) -> Score:
        self = super().__new__(cls, pair)
        self.meta = meta or {}
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Score, (tuple(self), self.meta)
