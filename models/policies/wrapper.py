"""Evictors that change how the scores of another evictor select."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from lceval.models.policies.base import Amount, Evictor, LayerView, StatsSpec, StepEvictor


@dataclass(frozen=True, kw_only=True)
class Wrapper(Evictor):
    """An evictor that takes scores and layer budgets of an inner one: key `of`; its keys are keys of this one too.

    Attributes:
        inner: an evictor that gives every head of a layer the same budget, at the end of prefill.
    """

    inner: Evictor

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if self.inner.amount != self.amount:
            raise ValueError(f"{name} and its inner evictor must have the same amount")
        if not self.takes(type(self.inner)):
            raise ValueError(
                f"{name} requires an inner evictor with equal budgets per head and scores of its own, so not "
                f"{type(self.inner).__name__.lower()}"
            )
        if isinstance(self.inner, StepEvictor) and self.inner.when != "prefill":
            raise ValueError(f"{name} evicts only at the end of prefill, so its inner evictor cannot have when=always")
        if self.write_every and not self.inner.evicts_while_writing:
            raise ValueError(f"{type(self.inner).__name__.lower()} cannot evict while an answer is written")
        if getattr(self.inner, "block", 0):
            raise ValueError(f"{name} selects once, so its inner evictor cannot select block by block")

    @staticmethod
    def takes(cls: type[Evictor]) -> bool:
        """Whether an evictor can be the inner one."""
        return cls.is_even() and not issubclass(cls, Wrapper)

    @property
    def stats_spec(self) -> StatsSpec:
        return self.inner.stats_spec

    def with_amount(self, amount: Amount) -> Self:
        return replace(self, amount=amount, inner=self.inner.with_amount(amount))

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32: the scores of `inner`."""
        return self.inner.scores(layer)

    def budget(self, layer: int, layers: int, tokens: int) -> int:
        """Mean kept slots per KV head of a layer."""
        return self.inner.budget(layer, layers, tokens)
