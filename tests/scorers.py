"""Scorers and patterns of retrieval heads with random numbers."""

from __future__ import annotations

import torch

from lceval.models.policies.duo import HeadPattern
from lceval.models.scorer import Scorer


def random_scorer(input_dim: int, output_dim: int, n_modules: int, hidden_dim: int | None = None) -> Scorer:
    """The same one for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Scorer(input_dim, output_dim, n_modules, hidden_dim).requires_grad_(False)


def random_pattern(layers: int, kv_heads: int) -> HeadPattern:
    """The same one for the same arguments."""
    scores = torch.rand(layers, kv_heads, generator=torch.Generator().manual_seed(0)).tolist()
    return HeadPattern(tuple(tuple(row) for row in scores), sinks=3, recent=8)
