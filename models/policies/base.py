"""What every policy is: a value (a frozen dataclass) on one of three axes.

An `Evictor` decides which slots of a prefilled context stay, a `Quantizer` in what precision they are kept,
`SparseAttention` which of them a decoding step attends to. Policies take tensors and return tensors; the cache does
the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

import torch
from torch import Tensor

from lceval.kernels import window as scoring
from lceval.kernels.paged import KV
from lceval.kernels.select import top

# Tokens at the beginning that attract attention whatever they say; statistics of queries leave them out.
SINKS = 4


@dataclass(frozen=True)
class Amount:
    """A budget: a share of the context's tokens, or a number of tokens."""

    value: float | int

    def __post_init__(self) -> None:
        share = isinstance(self.value, float)
        if not (0 < self.value <= 1 if share else self.value >= 1):
            raise ValueError("a share lies above 0.0 and at most 1.0; a token count is at least 1")

    @classmethod
    def parse(cls, text: str) -> Amount:
        """`0.25` (a share, by its decimal point) or `2048` (tokens)."""
        return cls(float(text) if "." in text else int(text))

    @property
    def is_share(self) -> bool:
        """Whether it depends on the context's length."""
        return isinstance(self.value, float)

    def tokens(self, context_tokens: int) -> int:
        """The budget in tokens for a context of that length; at least one where there is one."""
        if isinstance(self.value, float):
            return min(context_tokens, max(1, round(self.value * context_tokens)))
        return min(context_tokens, self.value)

    def __str__(self) -> str:
        # Never 1e-05: the decimal point is what makes it a share.
        return format(Decimal(repr(self.value)), "f")


@dataclass(frozen=True)
class StatsSpec:
    """The prefill statistics that a policy requires, beyond keys and values. `a | b` covers both.

    Attributes:
        queries: number of last queries to keep.
        column_sums: the attention that every token received from all queries.
        query_moments: mean and covariance of the queries before RoPE.
        reconstruction: the attention of a second pass, in which the model repeats the context (KVzip).
    """

    queries: int = 0
    column_sums: bool = False
    query_moments: bool = False
    reconstruction: bool = False

    def __or__(self, other: StatsSpec) -> StatsSpec:
        return StatsSpec(
            max(self.queries, other.queries),
            self.column_sums or other.column_sums,
            self.query_moments or other.query_moments,
            self.reconstruction or other.reconstruction,
        )


@dataclass(frozen=True)
class LayerView:
    """What a policy may look at, for one layer of one prefilled context.

    Under `query_aware=true` the question's tokens stand at the end of keys, values, queries and sums; the scores that
    a policy gives them are left unused.

    Attributes:
        keys, values: [B, Hkv, S, D], keys after RoPE.
        queries: [B, H, W, D], the queries of the last W tokens, after RoPE; W is the largest window required.
        scaling: factor of the attention logits, usually 1 / sqrt(D).
        layer: index of the layer; `layers`, how many there are.
        column_sums: [B, Hkv, S] float32, causal attention received from all queries, the mean over the G query heads.
        query_mean, query_cov: [B, H, D] and [B, H, D, D] float32 of the queries before RoPE, without the first SINKS.
        rotary: cos and sin [n, R], R <= D, of RoPE at integer positions [n].
        reconstruction: [B, Hkv, S] float32, the most attention a token received while the model repeated the context.
        kernels: whether `window_scores` goes through the Triton kernels.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scaling: float
    layer: int
    layers: int
    column_sums: Tensor | None = None
    query_mean: Tensor | None = None
    query_cov: Tensor | None = None
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    reconstruction: Tensor | None = None
    kernels: bool = False

    def window_attention(self, window: int) -> Tensor:
        """Causal attention of the last `window` tokens over all S: [B, Hkv, G, w, S] float32, w <= window."""
        batch, kv_heads, length, dim = self.keys.shape
        q = self.queries[:, :, -window:]
        w = q.shape[2]
        q = q.reshape(batch, kv_heads, -1, w, dim).float()
        logits = torch.matmul(q, self.keys[:, :, None].transpose(3, 4).float()) * self.scaling
        future = torch.ones(w, length, dtype=torch.bool, device=q.device).triu_(length - w + 1)
        return logits.masked_fill_(future, -math.inf).softmax(-1)

    def window_scores(self, window: int) -> Tensor:
        """`window_attention`, averaged over the last `window` tokens and the G query heads: [B, Hkv, S] float32."""
        score = scoring.window_scores if self.kernels else scoring.reference_scores
        return score(self.queries[:, :, -window:], self.keys, self.scaling)


@dataclass(frozen=True, kw_only=True)
class Evictor:
    """Decides at the end of prefill which slots stay. Most subclasses give `scores` alone."""

    amount: Amount

    @property
    def stats_spec(self) -> StatsSpec:
        """The prefill statistics that `scores` requires."""
        return StatsSpec()

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32; higher stays. Ties keep the earlier token."""
        raise NotImplementedError

    def budget(self, layer: int, layers: int, tokens: int) -> int:
        """Slots per KV head that a layer keeps of a context of `tokens` tokens."""
        return self.amount.tokens(tokens)

    def keep(self, scores: Tensor, layer: int, layers: int) -> Tensor:
        """The mask [B, Hkv, S] of what stays of one layer: each head its `budget` best."""
        return top(scores, self.budget(layer, layers, scores.shape[-1]))

    def select(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Masks [B, Hkv, S] of what stays, from the scores of all layers."""
        return [self.keep(s, layer, len(scores)) for layer, s in enumerate(scores)]

    @classmethod
    def is_even(cls) -> bool:
        """Whether every head of a layer keeps the same number of tokens."""
        return cls.keep is Evictor.keep and cls.select is Evictor.select


@dataclass(frozen=True)
class StepView:
    """What a policy may look at while decoding, after T new tokens joined the N slots that one layer holds.

    Attributes:
        positions: [B, Hkv, N] int64, ascending; the new tokens come last.
        attention: [B, Hkv, G, T, N] float32, causal attention of the new tokens over all slots.
        column_sums: [B, Hkv, N] float32, attention received so far (as in LayerView), the new tokens' included.
        seen: tokens read so far, kept or not.
        layer: index of the layer; `layers`, how many there are.
        budget: slots that may stay.
        memory: a policy's own, per layer and question; copied when a question's rows are multiplied.
    """

    positions: Tensor
    attention: Tensor
    column_sums: Tensor
    seen: int
    layer: int
    layers: int
    budget: int
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepEvictor(Evictor):
    """An evictor that with `when=always` also holds its budget while the question is read and answered."""

    when: str = "prefill"

    def __post_init__(self) -> None:
        if self.when not in ("prefill", "always"):
            raise ValueError("when is prefill or always")

    def step_scores(self, view: StepView) -> Tensor:
        """[B, Hkv, N] float32; the `view.budget` highest stay."""
        raise NotImplementedError


class SparseAttention(Protocol):
    """Attention of a decoding step to a selection of the stored slots."""

    def wrap(self, kv: KV, layer: int, context_tokens: int) -> KV:
        """One layer's slots, attended to sparsely."""
        ...
