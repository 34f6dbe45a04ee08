"""Cached contexts stay within the byte limit."""

from __future__ import annotations

import torch

from lceval.kernels.paged import PagedKV
from lceval.models.compressed import CompressedContext
from lceval.models.context_cache import ContextCache


def context(tokens: int) -> CompressedContext:
    k = torch.zeros(1, 1, 64 * -(-tokens // 64), 8)
    return CompressedContext((PagedKV.full(k, k.clone(), tokens),), tokens, torch.float32, 0, 0, 0.0)


def test_the_least_recently_used_context_is_removed() -> None:
    one = context(64).allocated_bytes
    context_cache = ContextCache(2 * one)
    first, second = context(64), context(60)
    context_cache.put("a", first)
    context_cache.put("b", second)
    assert context_cache.get("a") is first
    context_cache.put("c", context(64))
    assert context_cache.get("b") is None
    assert context_cache.get("a") is first
    assert context_cache.cached_bytes == 2 * one


def test_a_context_larger_than_the_limit_is_not_cached_and_removes_nothing() -> None:
    context_cache = ContextCache(context(64).allocated_bytes)
    context_cache.put("a", small := context(64))
    context_cache.put("b", context(1000))
    assert context_cache.get("b") is None
    assert context_cache.get("a") is small
