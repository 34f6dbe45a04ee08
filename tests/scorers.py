"""Scorers with random weights."""

from __future__ import annotations

import torch

from lceval.models.scorer import Scorer


def random_scorer(input_dim: int, output_dim: int, n_modules: int, hidden_dim: int | None = None) -> Scorer:
    """The same one for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Scorer(input_dim, output_dim, n_modules, hidden_dim).requires_grad_(False)
