"""Full against shifted attention in training: forward and backward of one layer, alternating within one run.

Full attention is SDPA's causal attention. A side's time is the median over the rounds; the speedup is the median of the
rounds' ratios, because a temporary load slows down both sides of a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.bench.machine import device, machine
from lceval.core.errors import UserError
from lceval.training.shifted_attention import attend, even_group

LENGTHS = (2048, 4096, 8192)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEED = 0


def bench(
    lengths: Sequence[int] | None, *, heads: int, kv_heads: int, dim: int, share: float, dtype: str, rounds: int
) -> dict[str, Any]:
    """Milliseconds of each side and length.

    Args:
        lengths: sequence lengths in tokens; None is 2k, 4k and 8k.
        share: group size as a share of the sequence length.
        dtype: fp32 or bf16.

    Raises:
        UserError: invalid sizes.
    """
    if min(heads, kv_heads, dim, rounds, *(lengths or LENGTHS)) < 1 or heads % kv_heads or not 0 < share <= 1:
        raise UserError("bench shifted requires positive numbers, heads a multiple of KV heads and a share up to 1")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    rows = [_row(tokens, heads, kv_heads, dim, share, DTYPES[dtype], rounds) for tokens in lengths or LENGTHS]
    return {
        "bench": "shifted",
        "heads": heads,
        "kv_heads": kv_heads,
        "dim": dim,
        "group_share": share,
        "dtype": dtype,
        "rounds": rounds,
        "rows": rows,
        "machine": machine(),
    }


def _row(
    tokens: int, heads: int, kv_heads: int, dim: int, share: float, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    rng = torch.Generator(device()).manual_seed(SEED)
    # Strided like the output of a projection: [B, T, heads, D] transposed to [B, heads, T, D].
    tensors = [
        torch.randn(1, tokens, n, dim, generator=rng, device=device(), dtype=dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    (q, k, v), do = (x.requires_grad_() for x in tensors[:3]), tensors[3]
    group, scaling = even_group(tokens, share), dim**-0.5
    sides: dict[str, Callable[[], Tensor]] = {
        "full": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True),
        "shifted": lambda: attend(q, k, v, None, group, scaling),
    }
    times_s: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            seconds = _timed(side, (q, k, v), do)
            if number:  # the first round is a warm-up
                times_s[name].append(seconds)
    return {
        "tokens": tokens,
        "group": group,
        **{f"{name}_ms": 1000 * statistics.median(times) for name, times in times_s.items()},
        "speedup": statistics.median(a / b for a, b in zip(times_s["full"], times_s["shifted"], strict=True)),
    }


def _timed(side: Callable[[], Tensor], qkv: Sequence[Tensor], do: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    _wait()
    start = time.perf_counter()
    torch.autograd.grad(side(), qkv, do)
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
