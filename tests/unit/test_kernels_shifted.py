"""Shifted sparse attention: the reference against a mask built from its definition, the kernels against the reference.

The cases run in a child process under Triton's interpreter (tests/interpreter.py) and return the errors that they
measure. On a CUDA device they run compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lceval.kernels import launch
from lceval.kernels.shifted import reference, shifted

LENGTHS = [0, 1, 15, 17, 63, 64, 65, 1000]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest error measured over all cases, of the output and of each gradient, relative to the largest element of its
# head or to 1, the size of the inputs: a token that attends only to itself has no gradient. fp32
# 1.5e-6 (sums in another order), fp16 8.0e-4 (p and ds rounded to 11 bits), bf16 3.4e-3 in the interpreter, which
# computes in float32 (results rounded to 8 bits).
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}


def tensors(heads: int, kv_heads: int, lens: list[int], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient as views of [B, T, heads, D], the layout of a projection; zeros at padding."""
    rng = torch.Generator().manual_seed(sum(lens))
    shapes = [(len(lens), max(lens), n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    inputs = [torch.randn(shape, generator=rng).to(dtype).transpose(1, 2) for shape in shapes]
    for x in inputs:
        for row, n in zip(x, lens, strict=True):
            row[:, n:] = 0
    return inputs


def errors(args: list[Tensor], lens: list[int], group: int, device: str = "cpu") -> dict[str, float]:
    """The errors of o, dq, dk, dv. Padding is NaN for the kernels: they must not read it, and return zeros there."""
    scaling, counts = args[0].shape[-1] ** -0.5, torch.tensor(lens, dtype=torch.int32)
    padding = (torch.arange(args[0].shape[2]) >= counts[:, None])[:, None, :, None]
    want_in = [x.float().clone().requires_grad_() for x in args[:3]]
    want = reference(*want_in, counts, group, scaling)[0]
    want.backward(args[3].float())
    got_in = [x.masked_fill(padding, math.nan).to(device).requires_grad_() for x in args[:3]]
    got = shifted(*got_in, counts.to(device), group, scaling)
    got.backward(args[3].masked_fill(padding, math.nan).to(device))
    pairs = {"o": (got, want)} | {
        f"d{name}": (x.grad, y.grad) for name, x, y in zip("qkv", got_in, want_in, strict=True)
    }
    largest = {}
    for name, (x, y) in pairs.items():
        assert x is not None
        assert y is not None
        assert x.dtype == args[0].dtype
        largest[name] = 0.0
        if y.numel():
            most = y.detach().abs().amax((2, 3)).clamp(min=1.0)
            largest[name] = float(((x.detach().cpu().float() - y.detach()).abs().amax((2, 3)) / most).max())
    return largest


def worst(measured: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(torch.tensor([error[name] for error in measured]).max()) for name in measured[0]}


def grid_case(dtype: str, group_size: int, dim: int, group: int, device: str = "cpu") -> dict[str, float]:
    """Sequences of every length, two KV heads: half of the query heads are shifted."""
    batches = [[1, 0], [17, 15], [65, 63, 64] if group_size == 1 else [65]]
    return worst(
        [errors(tensors(2 * group_size, 2, lens, dim, DTYPES[dtype]), lens, group, device) for lens in batches]
    )


def long_case(dtype: str, device: str = "cpu") -> dict[str, float]:
    return errors(tensors(2, 1, [1000], 64, DTYPES[dtype]), [1000], 96, device)


def hypothesis_case() -> dict[str, float]:
    """Shapes drawn by hypothesis: groups that no tile divides, odd numbers of heads, one group for all."""
    measured: list[dict[str, float]] = []

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(
        lens=st.lists(st.integers(0, 90), min_size=1, max_size=2),
        heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (9, 3)]),
        group=st.integers(1, 60),
    )
    def run(lens: list[int], heads: tuple[int, int], group: int) -> None:
        measured.append(errors(tensors(*heads, lens, 64, torch.float32), lens, 2 * group))

    run()
    return worst(measured)


# Every dtype with every G; D and the group sizes alternate, so that every G meets every D.
GROUPS, HEAD_DIMS = (16, 26, 64), (64, 128)
GRID = {
    f"{dtype}-G{size}-D{dim}-group{group}": (dtype, size, dim, group)
    for (i, dtype), (j, size) in product(enumerate(["fp32", "fp16"]), enumerate([1, 3, 4, 8]))
    for dim, group in [(HEAD_DIMS[(i + j) % 2], GROUPS[(i + j) % 3])]
} | {f"{interpreter.LABELS['bf16']}-G2-D64": ("bf16", 2, 64, 32)}
CASES: dict[str, Callable[[], dict[str, float]]] = {
    **{name: partial(grid_case, *case) for name, case in GRID.items()},
    "long-fp16": partial(long_case, "fp16"),
    "hypothesis": hypothesis_case,
}
DTYPE_OF = {**{name: case[0] for name, case in GRID.items()}, "long-fp16": "fp16", "hypothesis": "fp32"}


def assert_close(error: dict[str, float], dtype: str) -> None:
    for name, value in error.items():
        assert value <= TOLERANCE[dtype], (name, value)


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_reference(case: str, interpreted: Callable[[str], dict[str, float]]) -> None:
    assert_close(interpreted(case), DTYPE_OF[case])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "dim", "group"), [(1, 64, 16), (3, 128, 26), (4, 128, 64), (8, 64, 64)])
def test_compiled_kernels_agree_with_the_reference(dtype: str, size: int, dim: int, group: int) -> None:
    assert_close(grid_case(dtype, size, dim, group, "cuda"), dtype)
    assert_close(long_case(dtype, "cuda"), dtype)


def definition(q: Tensor, k: Tensor, v: Tensor, lens: list[int], group: int) -> Tensor:
    """One head and one sequence at a time, through torch's own attention with a mask."""
    o = torch.zeros_like(q)
    heads, size = q.shape[1], q.shape[1] // k.shape[1]
    for b, h in product(range(len(lens)), range(heads)):
        n, shift = lens[b], group // 2 if h >= heads // 2 else 0
        t = torch.arange(n)
        seen = (t <= t[:, None]) & ((t + shift) // group == (t[:, None] + shift) // group)
        if n:
            o[b, h, :n] = sdpa(q[b, None, h, :n], k[b, None, h // size, :n], v[b, None, h // size, :n], seen)[0]
    return o


@given(
    lens=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    group=st.integers(1, 40),
)
@settings(deadline=None, max_examples=30)
def test_reference_is_attention_under_the_mask(lens: list[int], heads: tuple[int, int], group: int) -> None:
    q, k, v, _ = tensors(*heads, lens, 16, torch.float32)
    o, lse = reference(q, k, v, torch.tensor(lens), 2 * group, 0.25)
    # Two float32 orders of summation.
    torch.testing.assert_close(o, definition(q, k, v, lens, 2 * group), rtol=1e-5, atol=5e-6)
    assert torch.isneginf(lse).logical_not().sum() == heads[0] * sum(lens)


def test_reference_has_the_gradients_of_its_output() -> None:
    q, k, v, _ = (x.requires_grad_() for x in tensors(3, 1, [7, 4], 4, torch.float64))
    lens = torch.tensor([7, 4])
    assert torch.autograd.gradcheck(lambda *x: reference(*x, lens, 4, 0.5)[0], (q, k, v))


def test_no_token_attends_to_a_later_one_or_another_group() -> None:
    q, k, v, _ = tensors(2, 2, [32], 16, torch.float32)
    before = reference(q, k, v, None, 8, 0.25)[0]
    k[:, :, 29:], v[:, :, 29:] = 9.0, 9.0
    after = reference(q, k, v, None, 8, 0.25)[0]
    # The wrapped group of the original would change the first four tokens of the shifted head.
    assert torch.equal(before[:, :, :29], after[:, :, :29])
    v[:, :, 0] = 5.0
    changed = (reference(q, k, v, None, 8, 0.25)[0] != after).any(-1)[0]
    assert changed[0].nonzero().flatten().tolist() == list(range(8))
    assert changed[1].nonzero().flatten().tolist() == list(range(4))


@pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET=1: CPU tensors run the kernels")
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_cpu_tensors_take_the_reference_and_keep_their_dtype(dtype: torch.dtype) -> None:
    q, k, v, _ = tensors(4, 2, [20, 9], 48, dtype)
    lens = torch.tensor([20, 9], dtype=torch.int32)
    got = shifted(q, k, v, lens, 8, 0.25)
    assert got.dtype == dtype
    assert torch.equal(got, reference(q, k, v, lens, 8, 0.25)[0].to(dtype))


BAD: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "axes": ({"q": lambda q: q[0]}, r"q must have 4 axes, the last contiguous, got \(4, 10, 64\)"),
    "layout": ({"k": lambda k: k.repeat(1, 1, 1, 2)[..., ::2]}, "k must have 4 axes, the last contiguous"),
    "dtype": ({"v": Tensor.half}, "v must be on cpu in one of .* got cpu, torch.float16"),
    "heads": ({"q": lambda q: q[:, :3]}, r"Hkv a divisor of 3, got \(2, 2, 10, 64\)"),
    "tokens": ({"k": lambda k: k[:, :, :9]}, r"got \(2, 2, 9, 64\) and \(2, 2, 10, 64\)"),
    "lens": ({"lens": Tensor.long}, r"lens must be \[2\] int32 on cpu, got \(2,\) torch.int64"),
    "group": ({"group": lambda _: 5}, "group must be an even number of tokens, got 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_with_its_shape(case: str) -> None:
    changes, message = BAD[case]
    args: dict[str, Any] = dict(zip("qkv", tensors(4, 2, [10, 7], 64, torch.float32), strict=False))
    args |= {"lens": torch.tensor([10, 7], dtype=torch.int32), "group": 4}
    args |= {name: change(args[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        shifted(**args, scaling=0.125)


if __name__ == "__main__":
    interpreter.main(CASES)
