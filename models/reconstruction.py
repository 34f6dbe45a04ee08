"""KVzip's second pass: the model repeats its context, and the attention that every slot receives is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lceval.kernels.dense import block_rows
from lceval.kernels.softmax import Softmax
from lceval.models.chat import ChatTokens
from lceval.models.policies.base import SINKS

# The requests of KVzip (arXiv 2505.23416, section 3.3), as in kvpress.
REPEAT = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with"
# Context tokens per pass.
CHUNK = 2048
# Tokens before a later chunk that end its request.
LEAD = 8


@dataclass(frozen=True)
class Repetition:
    """The input of the passes in which a model repeats its context.

    Attributes:
        first: tokens of the request to repeat the first chunk.
        later: tokens of the request for a later chunk; the last tokens of the chunk before it follow.
        chat: tokens around a user's message, in which the context lies.
    """

    first: tuple[int, ...]
    later: tuple[int, ...]
    chat: ChatTokens = field(default_factory=ChatTokens)

    @classmethod
    def of(cls, tokenizer: Any, encode: Callable[[str], Sequence[int]]) -> Repetition:
        """In the tokens of a tokenizer. encode: tokens of a text, without special tokens around it."""
        return cls(tuple(encode(REPEAT)), tuple(encode(REPEAT_FROM)), ChatTokens.of(tokenizer, encode))

    def passes(self, ids: Sequence[int], protected: int) -> Iterator[tuple[slice, list[int]]]:
        """Each chunk of a context after its `protected` first tokens, with the input tokens of its pass."""
        for start in range(protected, len(ids), CHUNK):
            chunk = slice(start, min(start + CHUNK, len(ids)))
            lead = ids[max(protected, start - LEAD) : start]
            request = [*self.later, *lead] if lead else self.first
            yield chunk, [*request, *self.chat.answer, *ids[chunk]]


class ReconstructionStats:
    """The maximum attention that each token of a chunk receives in one layer while the model repeats the chunk
    (KVzip, eq. 2).

    The softmax is over the first tokens, the chunk and the repetition only, as in KVzip's chunked scoring.

    Args:
        context_keys: [1, Hkv, S, D] of the whole context.
        chunk: the tokens of the chunk.
        protected: number of first tokens that are never evicted.

    Attributes:
        attention: [1, Hkv, C] float32, maximum over queries and query heads.
        hidden_norms: [1, T] float32, norms of the layer's attention input at the repetition's tokens; set before
            `update` for KVzip+.
        relative: [1, Hkv, G, C] float32, maximum over queries of attention / `hidden_norms`; None without them.
    """

    def __init__(self, context_keys: Tensor, chunk: slice, protected: int) -> None:
        self._sinks = min(max(protected, SINKS), chunk.start)
        self._keys = torch.cat([context_keys[:, :, : self._sinks], context_keys[:, :, chunk]], 2)
        self.attention = torch.zeros(*context_keys.shape[:2], chunk.stop - chunk.start, device=context_keys.device)
        self.hidden_norms: Tensor | None = None
        self.relative: Tensor | None = None

    def update(self, q: Tensor, k: Tensor, softmax: Softmax) -> None:
        """Add the whole repetition in one call. q: [1, H, T, D]; k: [1, Hkv, T, D]."""
        batch, heads, tokens, dim = q.shape
        kv_heads = k.shape[1]
        past = self._keys.shape[2]
        q = q.reshape(batch, kv_heads, -1, tokens, dim).float()
        keys = torch.cat([self._keys, k], 2)[:, :, None].transpose(3, 4).float()
        step = block_rows(heads * keys.shape[-1], keys.device)
        for start in range(0, tokens, step):
            block = q[..., start : start + step, :]
            rows = block.shape[3]
            weights = _causal_weights(block, keys[..., : past + start + rows], softmax)[..., self._sinks : past]
            self.attention = torch.maximum(self.attention, weights.amax((2, 3)))
            if self.hidden_norms is not None:
                relative = (weights / self.hidden_norms[:, None, None, start : start + rows, None]).amax(3)
                self.relative = relative if self.relative is None else torch.maximum(self.relative, relative)


def is_linear(projection: Any) -> bool:
    """Whether a module is a linear layer whose weight is a plain matrix; torchao puts quantized ones into `Linear`."""
    return type(projection) is nn.Linear and type(projection.weight) is nn.Parameter


def output_weight(projection: Any, like: Tensor) -> Tensor:
    """The matrix [H * D, d] float32 of an attention's output projection, with the update of an adapter.

    like: a tensor with the dtype and device of the projection's input.
    """
    if is_linear(projection):
        matrix: Tensor = projection.weight
        return matrix.T.to(like.device, torch.float32)
    # A layer of an adapter, quantized or transposed: what it does to unit vectors, without its bias.
    width = projection.nx if isinstance(projection, Conv1D) else projection.in_features
    unit = torch.eye(width, dtype=like.dtype, device=like.device)
    weight: Tensor = projection(unit).float() - projection(torch.zeros_like(unit[:1])).float()
    return weight


def output_norms(values: Tensor, weight: Tensor, order: int = 2) -> Tensor:
    """Norm of what each value adds to the hidden state through each query head: [B, Hkv, G, C] float32.

    values: [B, Hkv, C, D]; weight: [H * D, d] float32, which maps the heads' outputs to hidden states.
    """
    kv_heads, dim = values.shape[1], values.shape[3]
    # One query head at a time: all of them at once would be H times the hidden states of the chunk.
    return torch.stack(
        [
            torch.stack([(values[:, head].float() @ part).norm(order, dim=-1) for part in parts], 1)
            for head, parts in enumerate(weight.view(kv_heads, -1, dim, weight.shape[1]))
        ],
        1,
    )


def _causal_weights(q: Tensor, keys: Tensor, softmax: Softmax) -> Tensor:
    """Causal weights; the last query attends to the last key. q: [B, Hkv, G, R, D]; keys: [B, Hkv, 1, D, S]."""
    rows = q.shape[3]
    logits = torch.matmul(q, keys)
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
    logits[..., -rows:].masked_fill_(future, -math.inf)
    if softmax.is_special:
        return softmax.weights(logits)
    # In place: the weights of a long repetition fill the cache of a CPU.
    logits.mul_(softmax.scaling)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))
