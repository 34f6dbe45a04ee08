"""Choosing the best units: the kernels must equal `select.top` exactly, ties and all.

The cases run in a child process under Triton's interpreter (tests/interpreter.py); each asserts that both are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lceval.kernels import topk as module
from lceval.kernels.select import top
from lceval.kernels.topk import reference, top_indices

LENGTHS = [0, 1, 15, 17, 63, 64, 65, 1000]
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 3e38, 1.0000001]


def random_scores(kind: str, rows: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    if kind == "softmax":
        return (4 * x).softmax(-1)
    if kind == "ties":
        return (2 * x).round()
    if kind == "equal":
        return torch.full((rows, width), 0.25)
    if kind == "special":
        return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (rows, width), generator=generator)]
    assert kind == "normal"
    return x


KINDS = ["softmax", "ties", "equal", "special", "normal"]


def agrees(scores: Tensor, sizes: list[int], count: int, device: str = "cpu") -> None:
    lens = torch.tensor(sizes, dtype=torch.int32)
    # Elements past a row's size must not be read.
    padded = scores.masked_fill(torch.arange(scores.shape[1]) >= lens[:, None], math.nan)
    got = top_indices(padded.to(device), lens.to(device), count).cpu()
    assert torch.equal(got, reference(scores, lens, count)), (sizes, count)


def lengths_case(kind: str, count: int, device: str = "cpu") -> None:
    agrees(random_scores(kind, len(LENGTHS), 1000), LENGTHS, count, device)


def long_case(kind: str, device: str = "cpu") -> None:
    """Rows of several blocks: one full, one that ends inside a block, one of less than a block, one empty."""
    width = 2 * module.BLOCK + module.SMALL
    for count in (1, 700, module.BLOCK + 1, width - 1, width):
        agrees(random_scores(kind, 4, width), [width, 2 * module.BLOCK + 5, 100, 0], count, device)


def many_blocks_case() -> None:
    """More blocks than one step of the prefix sum over blocks."""
    module.SMALL, module.BLOCK, before = 0, 64, (module.SMALL, module.BLOCK)
    try:
        agrees(random_scores("ties", 1, 64 * 70), [64 * 70 - 3], 1234)
    finally:
        module.SMALL, module.BLOCK = before


def hypothesis_case(small: int) -> None:
    """Rows drawn by hypothesis, through the kernel for short rows or those for long ones."""
    before = module.SMALL, module.BLOCK
    module.SMALL, module.BLOCK = small, 256

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(
        kind=st.sampled_from(KINDS),
        sizes=st.lists(st.integers(0, 900), min_size=1, max_size=3),
        count=st.integers(1, 900),
        seed=st.integers(0, 1000),
    )
    def run(kind: str, sizes: list[int], count: int, seed: int) -> None:
        agrees(random_scores(kind, len(sizes), max(*sizes, 1), seed), sizes, count)

    try:
        run()
    finally:
        module.SMALL, module.BLOCK = before


CASES: dict[str, Callable[[], None]] = {
    **{f"lengths {kind} {count}": partial(lengths_case, kind, count) for kind in KINDS for count in (1, 16, 100, 999)},
    **{f"long {kind}": partial(long_case, kind) for kind in KINDS},
    "many blocks": many_blocks_case,
    "hypothesis short": partial(hypothesis_case, 8192),
    "hypothesis long": partial(hypothesis_case, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(case: str, interpreted: Callable[[str], None]) -> None:
    interpreted(case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_equal_the_reference_on_a_gpu(kind: str) -> None:
    for count in (1, 16, 100, 999):
        lengths_case(kind, count, "cuda")
    long_case(kind, "cuda")


@given(kind=st.sampled_from(KINDS), size=st.integers(1, 200), count=st.integers(1, 220), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_reference_is_a_stable_sort(kind: str, size: int, count: int, seed: int) -> None:
    scores = random_scores(kind, 1, size, seed)
    order = scores[0].sort(descending=True, stable=True).indices[:count].sort().values.tolist()
    sizes = torch.tensor([size], dtype=torch.int32)
    assert reference(scores, sizes, count).tolist() == [order + [-1] * (count - len(order))]
    assert top(scores[0], count).nonzero().flatten().tolist() == order


BAD: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]], str]] = {
    "axes": (lambda x, n: (x[0], n, 1), r"scores must be \[R, U\] torch.float32, rows contiguous, got \(8,\)"),
    "dtype": (lambda x, n: (x.half(), n, 1), r"got \(2, 8\) torch.float16"),
    "layout": (lambda x, n: (x.T.contiguous().T, n, 1), "rows contiguous"),
    "sizes": (lambda x, n: (x, n[:1], 1), r"sizes must be \[2\] torch.int32, got \(1,\)"),
    "sizes dtype": (lambda x, n: (x, n.long(), 1), r"sizes must be \[2\] torch.int32, got \(2,\) torch.int64"),
    "device": (lambda x, n: (x, n.to("meta"), 1), "sizes must be on scores' device, cpu, got meta"),
    "count": (lambda x, n: (x, n, 0), "count must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_with_its_shape(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        top_indices(*change(torch.zeros(2, 8), torch.full((2,), 8, dtype=torch.int32)))


if __name__ == "__main__":
    interpreter.main(CASES)
