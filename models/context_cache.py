"""LRU cache of compressed contexts, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from lceval.models.compressed import CompressedContext


class ContextCache:
    """Contexts by key, at most `limit_bytes` in total; a context above the limit is not cached."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._contexts: OrderedDict[Hashable, CompressedContext] = OrderedDict()

    @property
    def cached_bytes(self) -> int:
        """Bytes of all cached contexts."""
        return sum(context.allocated_bytes for context in self._contexts.values())

    def get(self, key: Hashable) -> CompressedContext | None:
        """The context of that key, marked as most recently used; None if it is not cached."""
        if key in self._contexts:
            self._contexts.move_to_end(key)
        return self._contexts.get(key)

    def put(self, key: Hashable, context: CompressedContext) -> None:
        """Cache a context; the least recently used are removed to make room."""
        if context.allocated_bytes > self.limit_bytes:
            return
        self._contexts[key] = context
        self._contexts.move_to_end(key)
        while self.cached_bytes > self.limit_bytes:
            self._contexts.popitem(last=False)

    def clear(self) -> None:
        """Remove all contexts."""
        self._contexts.clear()
