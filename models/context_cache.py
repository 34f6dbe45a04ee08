"""Compressed contexts at hand: the least recently used leave when they grow over a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from lceval.models.cache import CompressedContext


class ContextCache:
    """Contexts by key, at most `limit_bytes` of them in all; one that is larger by itself is not kept."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._contexts: OrderedDict[Hashable, CompressedContext] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        """Bytes of all contexts at hand."""
        return sum(context.allocated_bytes for context in self._contexts.values())

    def get(self, key: Hashable) -> CompressedContext | None:
        """The context under that key, now the most recently used."""
        if key in self._contexts:
            self._contexts.move_to_end(key)
        return self._contexts.get(key)

    def put(self, key: Hashable, context: CompressedContext) -> None:
        """Keep a context; others make room."""
        if context.allocated_bytes > self.limit_bytes:
            return
        self._contexts[key] = context
        self._contexts.move_to_end(key)
        while self.held_bytes > self.limit_bytes:
            self._contexts.popitem(last=False)
