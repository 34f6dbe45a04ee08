"""The interfaces of KV methods. A policy is a value (a frozen dataclass) on one of three axes.

An `Evictor` selects the slots of a prefilled context that are kept, a `Quantizer` sets their precision, and
`SparseAttention` selects the slots that a decoding step attends to. Policies take and return tensors; the cache
applies them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from lceval.kernels import window as scoring
from lceval.kernels.paged import KV
from lceval.kernels.select import top
from lceval.kernels.softmax import Softmax

# First tokens, which receive attention whatever their content (attention sinks); query statistics exclude them.
SINKS = 4


@dataclass(frozen=True)
class Amount:
    """A budget: a share of the context's tokens, or a number of tokens.

    Attributes:
        down: whether a share is rounded down, as in kvpress, instead of to the nearest number of tokens.
    """

    value: float | int
    down: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.value <= 1 if self.is_share else self.value >= 1):
            raise ValueError("a share must be above 0.0 and at most 1.0, a token count at least 1")
        if self.down and not self.is_share:
            raise ValueError("round=down rounds a share, such as 0.25")

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Parse `0.25` (a share, marked by its decimal point) or `2048` (tokens)."""
        if not re.fullmatch(r"[0-9]{0,18}\.?[0-9]*", text):
            raise ValueError("an amount has digits and at most one decimal point")
        return cls(float(text) if "." in text else int(text))

    @property
    def is_share(self) -> bool:
        """Whether it is a share of the context's tokens."""
        return isinstance(self.value, float)

    def tokens(self, context_tokens: int) -> int:
        """The budget in tokens for a context of `context_tokens` tokens; at least 1 unless the context is empty."""
        if not isinstance(self.value, float):
            return min(context_tokens, self.value)
        # kvpress's expression: its compression ratio is 1 - value.
        tokens = int(context_tokens * (1 - (1 - self.value))) if self.down else round(self.value * context_tokens)
        return min(context_tokens, max(1, tokens))

    def __str__(self) -> str:
        # Never 1e-05: the decimal point marks a share.
        return format(Decimal(repr(self.value)), "f")


@dataclass(frozen=True)
class Threshold:
    """Instead of a budget: the slots whose score is at least `value` are kept, so their share follows the text."""

    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError("threshold must be a finite number")


def shortest(value: float) -> str:
    """The shortest decimal of a float, without exponent: `0.5`, `-4`."""
    return format(Decimal(repr(value + 0.0)).normalize(), "f")


@dataclass(frozen=True)
class Chunks:
    """The chunks of `StatsSpec.chunk_attention`: `size` tokens each, between the `first` and the `last` tokens."""

    first: int
    size: int
    last: int


@dataclass(frozen=True)
class StatsSpec:
    """The prefill statistics that a policy requires, beyond keys and values. `a | b` covers both.

    Attributes:
        queries: number of last queries to keep.
        column_sums: attention that every token receives, summed over all queries.
        query_moments: mean and covariance of the queries before RoPE.
        reconstruction: attention of a second pass in which the model repeats the context (KVzip).
        scorers: digests of the scorers whose scores of every token are required (KVzap).
        reconstruction_plus: the same, normalized (KVzip+); implies `reconstruction`.
        output_norms: norm of what each value adds to the hidden state (CriticalKV).
        chunk_attention: attention within chunks, future tokens included (Compactor).
        question: under `query_aware=true`, the queries of all question tokens (FINCH).
    """

    queries: int = 0
    column_sums: bool = False
    query_moments: bool = False
    reconstruction: bool = False
    scorers: frozenset[str] = frozenset()
    reconstruction_plus: bool = False
    output_norms: bool = False
    chunk_attention: frozenset[Chunks] = frozenset()
    question: bool = False

    def __or__(self, other: StatsSpec) -> StatsSpec:
        return StatsSpec(
            max(self.queries, other.queries),
            self.column_sums or other.column_sums,
            self.query_moments or other.query_moments,
            self.reconstruction or other.reconstruction,
            self.scorers | other.scorers,
            self.reconstruction_plus or other.reconstruction_plus,
            self.output_norms or other.output_norms,
            self.chunk_attention | other.chunk_attention,
            self.question or other.question,
        )


@dataclass(frozen=True)
class LayerView:
    """The input of `Evictor.scores`: one layer of one prefilled context.

    Under `query_aware=true` the question's tokens follow those of the context in keys, values, queries and sums; their
    scores are ignored.

    Attributes:
        keys, values: [B, Hkv, S, D], keys after RoPE.
        queries: [B, H, W, D], the queries of the last W tokens, after RoPE; W is the largest window required.
        softmax: of the attention logits; its `scaling` is usually 1 / sqrt(D).
        layer, layers: index among the full-attention layers, and their number.
        column_sums: [B, Hkv, S] float32, causal attention received, summed over all queries, mean over G query heads.
        query_mean, query_cov: [B, H, D] and [B, H, D, D] float32 of the queries before RoPE, without the first SINKS.
        rotary: cos and sin [n, R], R <= D, of RoPE at integer positions [n].
        learned: digest of a scorer -> [B, Hkv, S] float32, its scores of the context's tokens.
        reconstruction: [B, Hkv, S] float32, maximum attention received while the model repeats the context; 0 for the
            `protected` tokens.
        reconstruction_plus: the same, with the attention divided by the norm of the query token's attention input and
            multiplied by the norm of W_O v, before the maximum over queries and query heads.
        output_norms: [B, Hkv, S] float32, 1-norm of W_O v, mean over the query heads of a KV head.
        chunk_attention: chunks -> [B, Hkv, S - first - last] float32, attention of the unscaled logits that every token
            receives from all tokens of its chunk, later ones included; summed over these, mean over G query heads.
        question_queries: [B, H, `question`, D], the queries of the question.
        question: number of last tokens that are the question's.
        protected: number of first tokens that a method may have to keep: those of the chat template before the user's
            message, system prompt included; 0 in a prompt without template.
        kernels: whether `window_scores` uses the Triton kernels.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    softmax: Softmax
    layer: int
    layers: int
    column_sums: Tensor | None = None
    query_mean: Tensor | None = None
    query_cov: Tensor | None = None
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    reconstruction: Tensor | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    reconstruction_plus: Tensor | None = None
    output_norms: Tensor | None = None
    chunk_attention: Mapping[Chunks, Tensor] = field(default_factory=dict)
    question_queries: Tensor | None = None
    question: int = 0
    protected: int = 0
    kernels: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens of the context, without the question's."""
        return self.keys.shape[2] - self.question

    def window_attention(self, window: int) -> Tensor:
        """Causal attention of the last `window` tokens over all S: [B, Hkv, G, w, S] float32, w <= window."""
        return self.attention_of(self.queries[:, :, -window:])

    def attention_of(self, q: Tensor) -> Tensor:
        """Causal attention of the last w tokens, whose queries are q [B, H, w, D]: [B, Hkv, G, w, S] float32."""
        batch, kv_heads, length, dim = self.keys.shape
        w = q.shape[2]
        q = q.reshape(batch, kv_heads, -1, w, dim).float()
        products = torch.matmul(q, self.keys[:, :, None].transpose(3, 4).float())
        future = torch.ones(w, length, dtype=torch.bool, device=q.device).triu_(length - w + 1)
        return self.softmax.weights(products.masked_fill_(future, -math.inf))

    def window_scores(self, window: int) -> Tensor:
        """`window_attention`, averaged over the last `window` tokens and the G query heads: [B, Hkv, S] float32."""
        queries = self.queries[:, :, -window:]
        scores = scoring.window_scores if self.kernels and scoring.fits(self.keys) else scoring.reference_scores
        return scores(queries, self.keys, self.softmax)


@dataclass(frozen=True, kw_only=True)
class Evictor:
    """Selects the kept slots at the end of prefill. Most subclasses define only `scores`.

    Attributes:
        amount: budget, or a threshold where `has_scale`.
        read_chunk: under `when=chunk` the tokens that are read between two evictions; 0 evicts once, after the prefill.
        write_every: under `when=decode` the tokens that are written between two evictions; 0 evicts no written token.
        keeps_prompt: under `when=decode` whether context and question are kept, and the budget is of what is written.
        has_scale: whether a score means the same in every context, so that a threshold makes sense.
        evicts_while_reading: whether its scores make sense over the slots that are left, so that it has `when=chunk`.
        evicts_while_writing: the same while an answer is written, for `when=decode`.
    """

    amount: Amount | Threshold
    # The keys of `when=chunk` and `when=decode` in a recipe.
    read_chunk: int = field(default=0, metadata={"key": False})
    write_every: int = field(default=0, metadata={"key": False})
    keeps_prompt: bool = field(default=True, metadata={"key": False})
    has_scale: ClassVar[bool] = False
    evicts_while_reading: ClassVar[bool] = False
    evicts_while_writing: ClassVar[bool] = False

    @property
    def stats_spec(self) -> StatsSpec:
        """The prefill statistics that `scores` requires."""
        return StatsSpec()

    @property
    def needs_question(self) -> bool:
        """Whether it selects by the question, so that it requires `query_aware=true`."""
        return self.stats_spec.question

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32; the highest are kept. Ties keep the earlier token."""
        raise NotImplementedError

    @property
    def budgeted(self) -> Amount:
        """The budget of an evictor that has one."""
        assert isinstance(self.amount, Amount), "a threshold has no budget"
        return self.amount

    def with_amount(self, amount: Amount) -> Self:
        """The same evictor with another budget."""
        return replace(self, amount=amount)

    def keeps_all(self, tokens: int) -> bool:
        """Whether nothing of a context of `tokens` tokens is evicted, whatever its scores."""
        return isinstance(self.amount, Amount) and self.amount.tokens(tokens) >= tokens

    def budget(self, layer: int, layers: int, tokens: int) -> int:
        """Kept slots per KV head of a layer for a context of `tokens` tokens."""
        return self.budgeted.tokens(tokens)

    def keep(self, scores: Tensor, layer: int, layers: int) -> Tensor:
        """The mask [B, Hkv, S] of kept slots of one layer: the `budget` highest scores of each head, or those at least
        as high as the threshold."""
        if isinstance(self.amount, Threshold):
            return scores >= self.amount.value
        return top(scores, self.budget(layer, layers, scores.shape[-1]))

    def select(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The masks [B, Hkv, S] of kept slots of all layers, from their scores."""
        return [self.keep(s, layer, len(scores)) for layer, s in enumerate(scores)]

    @classmethod
    def is_even(cls) -> bool:
        """Whether every head of a layer keeps the same number of tokens."""
        return cls.keep is Evictor.keep and cls.select is Evictor.select


@dataclass(frozen=True)
class StepView:
    """The input of `StepEvictor.step_scores`: the N slots of one layer after T new tokens were appended.

    Attributes:
        positions: [B, Hkv, N] int64, ascending; the new tokens come last.
        attention: [B, Hkv, G, T, N] float32, causal attention of the new tokens over all slots.
        column_sums: [B, Hkv, N] float32, attention received so far (as in LayerView), including the new tokens.
        seen: tokens processed so far, kept or not.
        layer, layers: index among the full-attention layers, and their number.
        budget: maximum number of kept slots.
        memory: state of the policy per layer and question; copied with the question's rows.
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
    """An evictor that under `when=always` also keeps its budget during the question and decoding."""

    when: str = "prefill"

    def __post_init__(self) -> None:
        if self.when not in ("prefill", "always"):
            raise ValueError("when must be prefill or always")

    def step_scores(self, view: StepView) -> Tensor:
        """[B, Hkv, N] float32; the `view.budget` highest are kept."""
        raise NotImplementedError


class SparseAttention(Protocol):
    """Selects the slots that a decoding step attends to; none are evicted."""

    def wrap(self, kv: KV, layer: int, context_tokens: int) -> KV:
        """One layer's slots with sparse attention over them."""
        ...
