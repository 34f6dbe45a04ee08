"""How far a scorer agrees with its target on held-out contexts: correlation, and overlap of what both keep."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lceval.kernels.select import top
from lceval.models.scorer import Scorer
from lceval.training.scorers.scored_contexts import ScoredSlots

BUDGETS = (0.5, 0.25, 0.1)
ROUNDING = 1e-12
"""A variance below this share of the mean square is that of a constant."""


class Agreement:
    """The sums and shares of the contexts so far."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._moments: list[Tensor] = []
        self._shares: dict[float, list[float]] = {budget: [] for budget in BUDGETS}

    def add(self, slots: ScoredSlots) -> None:
        """Add a held-out context."""
        predicted = torch.cat(
            [self._scorer.score(place, inputs[None])[0].cpu() for place, inputs in enumerate(slots.inputs)]
        )
        targets = torch.cat([part.T.cpu() for part in slots.targets])
        self._moments.append(_moments(predicted.double(), targets.double()))
        for budget, shares in self._shares.items():
            slots_kept = max(1, round(budget * targets.numel()))
            kept, chosen = (top(scores.flatten(), slots_kept) for scores in (targets, predicted))
            shares.append(float((kept & chosen).sum()) / slots_kept)

    @property
    def figures(self) -> dict[str, Any]:
        """`correlation`: Pearson's over the tokens of all contexts, mean over layers and KV heads (0 where the target
        is constant); `overlap` by budget: the share of the slots that the target keeps, of all layers and heads
        together, that the scorer keeps too, mean over contexts. By chance an overlap is its budget.
        """
        n, x, y, xx, yy, xy = torch.stack(self._moments).sum(0)
        variance_x, variance_y, covariance = xx - x * x / n, yy - y * y / n, xy - x * y / n
        varies = (variance_x > ROUNDING * xx) & (variance_y > ROUNDING * yy)
        correlation = torch.where(varies, covariance / (variance_x * variance_y).sqrt(), 0.0)
        return {
            "correlation": float(correlation.mean()),
            "overlap": {f"{budget:g}": fmean(shares) for budget, shares in self._shares.items()},
        }


def _moments(x: Tensor, y: Tensor) -> Tensor:
    """[6, heads]: number, sums and products of each row of x and y [heads, T]."""
    count = torch.full_like(x[:, 0], x.shape[1])
    return torch.stack([count, x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)])
