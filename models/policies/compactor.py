"""Compactor: outliers among the keys, and attention within chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.models.policies.base import Amount, Chunks, Evictor, LayerView, StatsSpec
from lceval.models.rotation import unrotate

# Added to the diagonal of the Gram matrix; ten times as much where it is still singular.
JITTER, TRIES = 1e-2, 5


@dataclass(frozen=True, kw_only=True)
class Compactor(Evictor):
    """Keep the tokens with the highest leverage and the highest attention within their chunk (Chari and Van Durme 2025,
    arXiv 2507.08143).

    score = `blend` * z(leverage) + z(attention), with z the z-score over the tokens and KV heads of a layer. The
    leverage of a key before RoPE is x' (X'X)^-1 x of its centred projection x to `sketch` random channels. The
    attention is what a token receives from all tokens of its chunk of `chunk` tokens, later ones included, by logits
    without scaling, times ||v||, averaged with its two neighbours. Without `blend` it is the evicted share of the
    context, as in kvpress. The first `sinks` tokens and the last `recent` are always kept.

    Differs from the paper: as in kvpress, the leverage is of the whole context and computed by a Cholesky
    decomposition.

    Cost: attention within chunks for all queries, during the prefill.
    """

    sinks: int = 8
    recent: int = 4
    chunk: int = 256
    sketch: int = 48
    blend: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise ValueError("sinks and recent must be at least 0")
        if self.chunk < 1 or not 1 <= self.sketch <= 1 << 16:
            raise ValueError("chunk must be at least 1, sketch between 1 and 65536")
        if self.blend is not None and self.blend < 0:
            raise ValueError("blend must be at least 0")
        if not 0 <= self.seed < 1 << 16:
            raise ValueError("seed must be between 0 and 65535")

    @property
    def chunks(self) -> Chunks:
        """The chunks of its attention."""
        return Chunks(self.sinks, self.chunk, self.recent)

    @property
    def stats_spec(self) -> StatsSpec:
        return StatsSpec(chunk_attention=frozenset({self.chunks}))

    def scores(self, layer: LayerView) -> Tensor:
        """[B, Hkv, S] float32; protected tokens score highest."""
        scores = torch.full(layer.keys.shape[:3], torch.inf, device=layer.keys.device)
        middle = slice(self.sinks, layer.keys.shape[2] - self.recent)
        if middle.stop - middle.start < 2:
            return scores
        attention = layer.chunk_attention[self.chunks]
        attention = attention * layer.values[:, :, middle].float().norm(dim=-1)
        attention = F.avg_pool1d(attention, 3, stride=1, padding=1)
        scores[:, :, middle] = self._blend(layer) * _standard(self._leverage(layer, middle)) + _standard(attention)
        return scores

    def _blend(self, layer: LayerView) -> float:
        if self.blend is not None:
            return self.blend
        amount = self.amount
        assert isinstance(amount, Amount)
        return 1 - (amount.value if amount.is_share else amount.tokens(layer.tokens) / layer.tokens)

    def _leverage(self, layer: LayerView, middle: slice) -> Tensor:
        """Leverage [B, Hkv, n] of the keys of the tokens `middle`."""
        assert layer.rotary is not None
        keys = layer.keys[:, :, middle].float()
        keys = unrotate(keys, *layer.rotary(torch.arange(middle.start, middle.stop, device=keys.device)))
        generator = torch.Generator().manual_seed((self.seed << 16) + layer.layer)
        sketch = torch.randn(*keys.shape[:2], keys.shape[3], self.sketch, generator=generator) / math.sqrt(self.sketch)
        x = (keys - keys.mean(2, keepdim=True)) @ sketch.to(keys.device)
        gram = x.transpose(2, 3) @ x
        jitter = JITTER
        for _ in range(TRIES):
            lower, failed = torch.linalg.cholesky_ex(gram + jitter * torch.eye(self.sketch, device=gram.device))
            if not failed.any():
                break
            jitter *= 10
        solved = torch.cholesky_solve(x.transpose(2, 3), lower).transpose(2, 3)
        return (x * solved).sum(-1).clamp_min(0)


def _standard(x: Tensor) -> Tensor:
    """z-scores over the last two dimensions of [B, Hkv, n]."""
    return (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True).clamp_min(1e-6)
