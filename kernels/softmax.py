"""How the products of queries and keys become attention weights: scaling, cap and sink, in PyTorch and in kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lceval.kernels.launch import jit, tl


@dataclass(frozen=True)
class Softmax:
    """How the products of a layer's queries and keys become attention weights.

    Attributes:
        scaling: factor on q k^T, usually 1 / sqrt(D).
        cap: logits are cap * tanh(scaling q k^T / cap), as in Gemma 2 (arXiv 2408.00118); None: not capped.
        sink: [H], for each query head a logit that takes part in the softmax and has no value, as in gpt-oss
            (arXiv 2508.10925); None without.
    """

    scaling: float
    cap: float | None = None
    sink: Tensor | None = None

    @property
    def is_special(self) -> bool:
        """Whether it is more than a softmax of scaled products."""
        return self.cap is not None or self.sink is not None

    def with_sink(self, o: Tensor, lse: Tensor) -> Tensor:
        """The output of attention with the sink, of that without: o [B, H, T, D], lse [B, H, T] float32."""
        if self.sink is None:
            return o
        share = torch.sigmoid(lse - self.sink.to(lse.device, torch.float32)[:, None])
        return o * share[..., None].to(o.dtype)

    def of_heads(self, heads: slice) -> Softmax:
        """The softmax of some query heads."""
        return self if self.sink is None else replace(self, sink=self.sink[heads])

    def weights(self, logits: Tensor) -> Tensor:
        """The weights of products q k^T [..., Hkv, G, T, S] float32, overwritten; -inf where a key is hidden."""
        logits = capped(logits.mul_(self.scaling), self.cap)
        if self.sink is None:
            return logits.softmax(-1)
        return softmax_beside(logits, self.sink.view(*logits.shape[-4:-2], 1))


def softmax_beside(logits: Tensor, sink: Tensor) -> Tensor:
    """The softmax of logits [..., S] float32 beside one more logit, sink [...] (broadcast), whose weight is dropped."""
    column = sink.to(logits.device, torch.float32).expand(logits.shape[:-1])[..., None]
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), in place; -inf stays."""
    if cap is None:
        return logits
    hidden = logits == -torch.inf
    return logits.div_(cap).tanh_().mul_(cap).masked_fill_(hidden, -torch.inf)


@jit()
def log2_logits(products, scaling, CAP: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Logits times log2(e), whose exponentials kernels compute by exp2, of products q k^T float32; CAP: 0.0 without."""
    LOG2E: tl.constexpr = 1.4426950408889634  # noqa: N806
    if CAP > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        exponential = tl.exp2(products * (scaling * (2.0 * LOG2E / CAP)))
        return (1.0 - 2.0 / (exponential + 1.0)) * (CAP * LOG2E)
    else:
        return products * (scaling * LOG2E)
