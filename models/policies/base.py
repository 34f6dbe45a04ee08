"""What every policy is: a value that turns one layer's view of a prefilled context into scores per slot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def tokens(self, context_tokens: int) -> int:
        """The budget in tokens for a context of that length; at least one where there is one."""
        if isinstance(self.value, float):
            return min(context_tokens, max(1, round(self.value * context_tokens)))
        return min(context_tokens, self.value)

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class LayerView:
    """What a policy may look at, for one layer of one prefilled context.

    Attributes:
        keys, values: [B, Hkv, S, D], keys after RoPE.
        queries: [B, H, W, D], the queries of the last W tokens, after RoPE; W as large as any policy asked for.
        scaling: factor of the attention logits, usually 1 / sqrt(D).
        layer: index of the layer; `layers`, how many there are.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scaling: float
    layer: int
    layers: int

    def window_attention(self, window: int) -> Tensor:
        """Causal attention of the last `window` tokens over all S: [B, Hkv, G, w, S] float32, w <= window."""
        batch, kv_heads, length, dim = self.keys.shape
        q = self.queries[:, :, -window:]
        w = q.shape[2]
        q = q.reshape(batch, kv_heads, -1, w, dim).float()
        logits = torch.matmul(q, self.keys[:, :, None].transpose(3, 4).float()) * self.scaling
        future = torch.ones(w, length, dtype=torch.bool, device=q.device).triu_(length - w + 1)
        return logits.masked_fill_(future, -math.inf).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class Evictor:
    """Decides at the end of prefill which slots stay. Subclasses give `scores`; the cache does the rest."""

    amount: Amount
    # How many of the last queries the prefill must remember for `scores`. Not a field: it is no parameter.
    queries_needed = 0

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32; higher stays. Ties keep the earlier token."""
        raise NotImplementedError

    def keep(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] bool: the budget's highest scores of every head."""
        length = layer.keys.shape[2]
        budget = self.amount.tokens(length)
        order = self.scores(layer).argsort(dim=-1, descending=True, stable=True)
        keep = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
        return keep.scatter_(-1, order[..., :budget], True)
