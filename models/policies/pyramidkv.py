"""PyramidKV: SnapKV with larger budgets in the first layers than in the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lceval.models.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with layer budgets that decrease linearly with depth (Cai et al. 2024, arXiv 2406.02069).

    With m the mean budget, the last layer gets m / `beta` and the first 2m - m / `beta`. If the first would exceed the
    number of tokens outside the window, it gets that number, and the last layer's budget rises to keep the mean at m.

    Differs from the paper: as in kvpress 0.5.5, the window is part of the budget, and all layers get m if the last
    would get less than the window. `form=paper` computes budgets as the authors' code does: of m - `window` tokens the
    last layer gets the share 1 / `beta`, in whole steps from layer to layer, and every layer its window on top.
    """

    # Budgets of layers are shares of the whole context.
    evicts_while_reading: ClassVar[bool] = False
    evicts_while_writing: ClassVar[bool] = False

    beta: int = 20
    form: str = "kvpress"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("kvpress", "paper"):
            raise ValueError("form must be kvpress or paper")
        if self.beta < 1:
            raise ValueError("beta must be at least 1")

    def budget(self, layer: int, layers: int, tokens: int) -> int:
        """Slots per KV head of layer `layer`: round(first - layer * (first - last) / (layers - 1))."""
        if self.form == "paper":
            return self._paper(layer, layers, tokens)
        value = self.budgeted.value
        mean = value * tokens if isinstance(value, float) else min(value, tokens)
        last = mean / self.beta
        first = 2 * mean - last
        if first >= tokens - self.window:
            first = tokens - self.window
            last = 2 * mean - first
        if not tokens >= first >= last >= self.window:
            return self.budgeted.tokens(tokens)
        step = (first - last) / (layers - 1) if layers > 1 else 0.0
        return round(first - layer * step)

    def _paper(self, layer: int, layers: int, tokens: int) -> int:
        mean = self.budgeted.tokens(tokens)
        outside = mean - self.window
        if outside <= 0 or tokens < 2 * outside:
            return mean
        last = outside // self.beta
        first = 2 * outside - last
        if first >= tokens - self.window:
            first = tokens - self.window
            last = 2 * outside - first
        step = (first - last) // (layers - 1) if layers > 1 else 0
        return first - layer * step + self.window
