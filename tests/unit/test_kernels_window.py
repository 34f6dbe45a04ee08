"""Window scores and column sums: the reference against the policies' own code, the kernels against the reference.

The cases run in a child process under Triton's interpreter (tests/interpreter.py) and return the errors that they
measure. On a CUDA device they run compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lceval.kernels import launch
from lceval.kernels.softmax import Softmax
from lceval.kernels.window import received, reference, window_scores

PLAIN = Softmax(0.125)

LENGTHS = [0, 1, 15, 17, 63, 64, 65, 260]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest error measured over all cases, relative to the head's largest score. The products are the reference's own, so
# only the order of their sums differs, in 16 bits too: fp32 8.4e-7, fp16 9.4e-7, bf16 (computed in float32 by the
# interpreter) 4.8e-7.
TOLERANCE = 1e-5


def tensors(
    batch: int, kv_heads: int, group: int, tokens: int, length: int, dim: int, dtype: str
) -> tuple[Tensor, ...]:
    """q and k, slices of buffers whose other elements are NaN."""
    rng = torch.Generator().manual_seed(length)
    q = torch.full((batch, kv_heads * group, tokens + 3, dim), math.nan)
    k = torch.full((batch, kv_heads, length + 5, dim), math.nan)
    q[:, :, 3:] = torch.randn(batch, kv_heads * group, tokens, dim, generator=rng)
    k[:, :, :length] = torch.randn(batch, kv_heads, length, dim, generator=rng)
    return q.to(DTYPES[dtype])[:, :, 3:], k.to(DTYPES[dtype])[:, :, :length]


def error(got: Tensor, want: Tensor) -> float:
    """The largest error relative to the largest score of the same head; NaN where the shapes differ."""
    if got.shape != want.shape or got.dtype != torch.float32:
        return math.nan
    if not want.numel():
        return 0.0
    most = want.amax(-1).masked_fill(want.amax(-1) == 0, 1.0)
    return float(((got.cpu() - want).abs().amax(-1) / most).max())


def softmax_of(dim: int, heads: int, cap: float | None, sinks: bool) -> Softmax:
    sink = torch.linspace(-2, 5, heads) if sinks else None
    return Softmax(dim**-0.5, cap, sink)


def grid_case(
    dtype: str, group: int, dim: int, tokens: int, cap: float | None = None, sinks: bool = False, device: str = "cpu"
) -> float:
    """Every length, `tokens` queries or as many as there are, mean and sum in turn."""
    worst = 0.0
    for i, length in enumerate(LENGTHS):
        q, k = tensors(2 - i % 2, 2, group, min(tokens, length), length, dim, dtype)
        softmax = softmax_of(dim, q.shape[1], cap, sinks)
        want = reference(q, k, softmax)
        if length % 4 == 0:
            got = received(q.to(device), k.to(device), softmax, splits=(None, 3)[i % 2])
        else:
            got = window_scores(q.to(device), k.to(device), softmax) * q.shape[2]
        worst = max(worst, error(got, want))
    return worst


def splits_case(splits: int) -> float:
    q, k = tensors(1, 2, 3, 64, 300, 64, "fp16")
    return error(received(q, k, PLAIN, splits=splits), received(q, k, PLAIN, splits=1))


def chunked_case() -> float:
    """A prefill in chunks sums to the prefill in one piece."""
    q, k = tensors(1, 2, 3, 300, 300, 64, "fp16")
    total = torch.zeros(1, 2, 300)
    for start, end in ((0, 7), (7, 130), (130, 300)):
        total[..., :end] += received(q[:, :, start:end], k[:, :, :end], PLAIN)
    return error(total, received(q, k, PLAIN))


def sharp_case() -> float:
    """Logits of up to 40, whose rounding is most of the error: most weights are zeros or ones."""
    q, k = tensors(1, 2, 2, 40, 200, 64, "fp32")
    return error(received(q * 3, k * 3, PLAIN), reference(q * 3, k * 3, PLAIN))


def hypothesis_case() -> float:
    """The largest error over shapes drawn by hypothesis; each query's weights sum to one."""
    worst = [0.0]

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(
        length=st.integers(1, 150),
        tokens=st.integers(1, 60),
        group=st.integers(1, 9),
        dim=st.sampled_from([16, 48, 64]),
        splits=st.one_of(st.none(), st.integers(1, 7)),
    )
    def run(length: int, tokens: int, group: int, dim: int, splits: int | None) -> None:
        q, k = tensors(1, 2, group, min(length, tokens), length, dim, "fp32")
        got = received(q, k, Softmax(0.2), splits=splits)
        worst.append(error(got, reference(q, k, Softmax(0.2))))
        torch.testing.assert_close(got.sum(-1), torch.full((1, 2), float(q.shape[2])), rtol=1e-5, atol=0)

    run()
    return max(worst)


# Every dtype with every G, and with every D. The interpreter takes a millisecond a tile, and float32's tiles are small.
GRID: dict[str, tuple[Any, ...]] = {
    f"{dtype}-G{group}-D{dim}-T{tokens}": (dtype, group, dim, tokens)
    for dtype, *counts in (("fp32", 12, 1, 17, 5), ("fp16", 64, 1, 17, 40))
    for group, dim, tokens in zip((1, 3, 4, 8), (64, 128, 64, 128), counts, strict=True)
} | {
    f"{interpreter.LABELS[c[0]]}-G{c[1]}-D{c[2]}": c
    for c in (("fp16", 4, 96, 64), ("fp16", 2, 256, 64), ("bf16", 4, 128, 9))
}
# Capped logits, learned sinks, both.
GRID |= {
    "cap-D64": ("fp16", 3, 64, 20, 0.5),
    "sinks-D64": ("fp32", 4, 64, 17, None, True),
    "cap-sinks-D80": ("fp32", 3, 80, 9, 0.5, True),
}
PROPERTIES: dict[str, Callable[[], float]] = {
    **{f"splits={n}": partial(splits_case, n) for n in (2, 5, 16)},
    "chunked": chunked_case,
    "sharp": sharp_case,
    "hypothesis": hypothesis_case,
}


CASES: dict[str, Callable[[], float]] = {n: partial(grid_case, *case) for n, case in GRID.items()} | PROPERTIES


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_reference(case: str, interpreted: Callable[[str], float]) -> None:
    assert interpreted(case) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "dim", "tokens"), [(1, 64, 1), (3, 96, 64), (4, 128, 64), (8, 128, 1000), (2, 256, 64)]
)
def test_compiled_kernels_agree_with_the_reference(dtype: str, group: int, dim: int, tokens: int) -> None:
    assert grid_case(dtype, group, dim, tokens, "cuda") <= TOLERANCE


@given(length=st.integers(1, 120), tokens=st.integers(1, 120), group=st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=25)
def test_reference_equals_what_the_policies_compute(length: int, tokens: int, group: int) -> None:
    from lceval.models.policies.base import LayerView

    q, k = tensors(2, 2, group, min(length, tokens), length, 32, "fp32")
    want = LayerView(k, k, q, Softmax(0.2), 0, 1).window_attention(tokens).mean((2, 3))
    got = reference(q, k, Softmax(0.2))
    # The same products; torch sums the columns in another order.
    torch.testing.assert_close(got / q.shape[2], want, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET=1: CPU tensors run the kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_tensors_take_the_reference(dtype: str) -> None:
    q, k = tensors(1, 2, 3, 10, 100, 64, dtype)
    assert torch.equal(received(q, k, PLAIN), reference(q, k, PLAIN))
    assert torch.equal(window_scores(q, k, PLAIN), reference(q, k, PLAIN) / 10)


def test_no_queries_give_zeros() -> None:
    q, k = tensors(2, 2, 3, 0, 70, 64, "fp32")
    assert torch.equal(window_scores(q, k, PLAIN), torch.zeros(2, 2, 70))


BAD: dict[str, tuple[dict[str, Callable[[Tensor], Tensor]], str]] = {
    "axes": ({"q": lambda q: q[0]}, r"q must have 4 axes, got shape \(4, 10, 64\)"),
    "head dim": ({"q": lambda q: q[..., :60]}, r"multiple of 16 up to 256, got \(1, 4, 10, 60\)"),
    "dtypes": ({"q": Tensor.half}, r"q and k must share .* got torch.float16 and torch.float32"),
    "group": ({"q": lambda q: q[:, :3]}, r"Hkv a divisor of 3 and S >= 10, got \(1, 2, 100, 64\)"),
    "short": ({"k": lambda k: k[:, :, :9]}, r"S >= 10, got \(1, 2, 9, 64\)"),
    "batch": ({"k": lambda k: k.expand(3, -1, -1, -1)}, r"k must be \[1, Hkv, S, 64\].*got \(3, 2, 100, 64\)"),
    "layout": ({"k": lambda k: k.repeat(1, 1, 1, 2)[..., ::2]}, "last axis of k must be contiguous"),
    "device": ({"k": lambda k: k.to("meta")}, "k must be on q's device, cpu, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_with_its_shape(case: str) -> None:
    changes, message = BAD[case]
    args = dict(zip("qk", tensors(1, 2, 2, 10, 100, 64, "fp32"), strict=True))
    args |= {name: change(args[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        received(args["q"], args["k"], PLAIN)


if __name__ == "__main__":
    interpreter.main(CASES)
