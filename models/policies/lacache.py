"""LaCache: neighbouring layers keep neighbouring tokens, so that all layers together span the whole context."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lceval.models.policies.base import LayerView, StepEvictor, StepView


class Ladder:
    """The tokens that one layer keeps, token by token.

    A full cache is compacted from its oldest slots on: of each rung of `rung` slots, `stay` consecutive slots from
    `phase` on are kept and the rest is evicted. When a pass reaches the `recent` newest slots, the next pass restarts
    at the sinks and thins out the remaining slots. The slots of a rung are evicted one by one, oldest first, one for
    each new token, so a full cache stays full.
    """

    def __init__(self, budget: int, sinks: int, rung: int, stay: int, phase: int, recent: int) -> None:
        self.budget = budget
        self.seen = 0
        # Tokens kept at the start of the current pass and all later ones, including those evicted since.
        self.line = torch.empty(0, dtype=torch.int64)
        room = budget - sinks - rung
        if room < 0:
            # No rung fits after the sinks: the oldest token there is evicted, as in a sliding window.
            self.evicting = torch.tensor([min(sinks, budget)])
            return
        rungs = (room - min(recent, room)) // stay + 1
        slots = torch.arange(rungs * rung).view(rungs, rung)
        offsets = torch.arange(rung)
        self.evicting = sinks + slots[:, (offsets < phase) | (offsets >= phase + stay)].flatten()

    def advance(self, seen: int) -> None:
        """Process tokens until `seen` are processed."""
        full = self.budget + len(self.evicting)
        while self.seen < seen:
            until = min(seen, self.seen + full - len(self.line))
            self.line = torch.cat([self.line, torch.arange(self.seen, until, device=self.line.device)])
            self.seen = until
            if len(self.line) == full:
                self.line = self.kept

    @property
    def kept(self) -> Tensor:
        """[min(seen, budget)] int64, the kept positions, ascending."""
        evicting = self.evicting[: max(0, len(self.line) - self.budget)]
        staying = torch.ones(len(self.line), dtype=torch.bool, device=self.line.device)
        staying.index_fill_(0, evicting, value=False)
        # The size is known: counting the mask would wait for the device.
        return self.line[torch.nonzero_static(staying, size=len(self.line) - len(evicting))[:, 0]]

    def to(self, device: torch.device) -> Ladder:
        """An independent copy on a device."""
        other = copy.copy(self)
        other.line, other.evicting = self.line.to(device), self.evicting.to(device)
        return other


@lru_cache(maxsize=32)
def _ladder(seen: int, *shape: int) -> Ladder:
    """A ladder after `seen` tokens, shared by all layers of the same phase: copy it before advancing."""
    ladder = Ladder(*shape)
    ladder.advance(seen)
    return ladder


@dataclass(frozen=True, kw_only=True)
class LaCache(StepEvictor):
    """Keep a ladder pattern over layers and tokens, compacted iteratively (Shi et al. 2025, arXiv 2507.14204).

    A step of the ladder spans `span` layers, of which `overlap` are shared with the next step. With L layers, a rung is
    B = 1 + ceil((L - span) / (span - overlap)) tokens long, of which A = ceil(span / (span - overlap)) are kept: in
    layer i, those from i mod (B - A + 1) on. The defaults are the paper's for a budget of 25% on LongBench; for 50% it
    uses span=16, overlap=0.

    Differs from the paper: the budget is exact, so it is not enlarged at the first overflow and a rung is evicted slot
    by slot; a long context is compacted token by token, not in one step with a stride; kept tokens stay at their
    original positions, while the paper rotates keys by cache slot; with too few layers for a rung to lose a token, it
    loses one; the newest L slots, which compaction skips, are fewer where the budget would otherwise hold no rung.
    """

    evicts_while_reading: ClassVar[bool] = True
    evicts_while_writing: ClassVar[bool] = True

    sinks: int = 4
    span: int = 9
    overlap: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError("sinks must be at least 0")
        if not 0 <= self.overlap < self.span:
            raise ValueError("overlap must be at least 0 and less than span")

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32, equal for all heads: the position; the ladder's tokens score highest."""
        batch, heads, length, _ = layer.keys.shape
        ladder = self._ladder(length, self.budgeted.tokens(length), layer.layer, layer.layers)
        positions = torch.arange(length, device=layer.keys.device)
        return _with_ladder_first(positions, ladder).expand(batch, heads, length)

    def step_scores(self, view: StepView) -> Tensor:
        """[B, Hkv, N] float32: as `scores`."""
        ladder = view.memory.get("ladder")
        if ladder is None or ladder.budget != view.budget or ladder.seen > view.seen:
            # Copied once, not in every step.
            ladder = self._ladder(view.seen, view.budget, view.layer, view.layers).to(view.positions.device)
            view.memory["ladder"] = ladder
        ladder.advance(view.seen)
        return _with_ladder_first(view.positions, ladder)

    def _ladder(self, seen: int, budget: int, layer: int, layers: int) -> Ladder:
        step = self.span - self.overlap
        stay = -(-self.span // step)
        rung = max(1 - (self.span - layers) // step, stay + 1)
        phase = layer % (rung - stay + 1)
        return _ladder(seen, budget, self.sinks, rung, stay, phase, layers)


def _with_ladder_first(positions: Tensor, ladder: Ladder) -> Tensor:
    """The positions as float32 scores, those on the ladder above all others."""
    kept = ladder.kept.to(positions.device)
    # Both are ascending. `torch.isin` would sort, and wait for the device.
    place = torch.searchsorted(kept, positions.contiguous()).clamp_(max=len(kept) - 1)
    return (positions + (kept[place] == positions) * ladder.seen).float()
