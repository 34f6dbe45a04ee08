"""Scores from an index: the kernels against the indexes' own `scores` in float32.

The cases run in a child process under Triton's interpreter (tests/interpreter.py) and return the errors that they
measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lceval.kernels.bits import GROUP, Bits
from lceval.kernels.bounds import Bounds
from lceval.kernels.scan import reference, scan

LENGTHS = [0, 1, 15, 17, 63, 64, 65, 1000]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative to the highest score of a row: products of 16-bit numbers are exact in float32. Measured 2.8e-6 (fp32),
# 2.7e-6 (fp16), 7e-7 (bf16, computed in float32 by the interpreter): sums in another order.
TOLERANCE = 1e-5
# A GPU's tensor cores cut off what they add, and its exp2 is approximate; not measured on a GPU yet.
GPU_TOLERANCE = 5e-5


def make(
    lens: list[list[int]], budget: int, kind: str, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Bits | Bounds, Tensor]:
    """An index of random keys for the heads above the budget, and lens. kind: bits, or bounds and the unit."""
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(n if n > budget else 0, dim, generator=generator).to(dtype) for counts in lens for n in counts]
    index = Bits.build(keys) if kind == "bits" else Bounds.build(keys, int(kind.removeprefix("bounds")))
    return index, torch.tensor(lens, dtype=torch.int32)


def move(index: Bits | Bounds, device: str) -> Bits | Bounds:
    if isinstance(index, Bits):
        return Bits(index.words.to(device), index.zero.to(device), index.scale.to(device), index.starts)
    return Bounds(index.bounds.to(device), index.starts, index.unit)


def queries(rows: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, heads, dim, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(index: Bits | Bounds, lens: Tensor, q: Tensor, budget: int, scaling: float, device: str) -> float:
    """The largest error of a score, relative to the highest of its row; NaN where sizes differ."""
    args = move(index, device), lens.to(device), lens.flatten().tolist(), budget, scaling
    got, sizes = (x.cpu() for x in scan(q.to(device), *args))
    want, want_sizes = reference(q, index, lens, budget, scaling)
    if not torch.equal(sizes, want_sizes) or got.shape != want.shape:
        return math.nan
    exists = torch.arange(want.shape[-1]) < sizes[..., None]
    worst = (got - want).abs().masked_fill(~exists, 0.0).amax(-1) / want.amax(-1).clamp(min=1e-30)
    return worst.max().item()


def grid_case(dtype: str, kind: str, batch: int, shared: int, group: int, dim: int, device: str = "cpu") -> float:
    lens = torch.tensor(LENGTHS).view(batch, -1)
    index, counts = make(lens.tolist(), 16, kind, dim, DTYPES[dtype])
    q = queries(batch * shared, lens.shape[1] * group, dim, DTYPES[dtype])
    return error(index, counts, q, 16, dim**-0.5, device)


def blocks_case(kind: str, device: str = "cpu") -> float:
    """Heads of several blocks, the second ending inside one; large logits, so that the blocks' maxima matter."""
    index, counts = make([[3000, 2300]], 64, kind, 32, torch.float32)
    return error(index, counts, 4 * queries(1, 4, 32, torch.float32), 64, 0.5, device)


def strided_case() -> float:
    """q is a slice of a longer tensor."""
    index, counts = make([[130, 70]], 16, "bits", 64, torch.float32)
    return error(index, counts, queries(3, 8, 128, torch.float32)[:, ::2, :64], 16, 0.125, "cpu")


def many_heads_case() -> float:
    """More heads than one step of the prefix sum over the heads' index lengths."""
    index, counts = make([[33 if h % 3 else 20 for h in range(70)]], 20, "bits", 16, torch.float32)
    return error(index, counts, queries(1, 70, 16, torch.float32), 20, 0.25, "cpu")


def hypothesis_case() -> float:
    """The largest error over shapes drawn by hypothesis."""
    worst = [0.0]

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(
        lens=st.lists(st.lists(st.integers(0, 200), min_size=2, max_size=2), min_size=1, max_size=2),
        kind=st.sampled_from(["bits", "bounds1", "bounds5", "bounds16", "bounds300"]),
        group=st.integers(1, 18),
        shared=st.integers(1, 2),
        dim=st.sampled_from([16, 48, 64]),
        budget=st.integers(1, 100),
    )
    def run(lens: list[list[int]], kind: str, group: int, shared: int, dim: int, budget: int) -> None:
        lens[0][0] = max(lens[0][0], budget + 1)
        index, counts = make(lens, budget, kind, dim, torch.float32)
        q = queries(len(lens) * shared, 2 * group, dim, torch.float32)
        worst.append(error(index, counts, q, budget, 0.2, "cpu"))
        assert worst[-1] <= TOLERANCE

    run()
    return max(worst)


# Every dtype, index, G and D; batch sizes and rows per sequence alternate.
GRID = {
    f"{interpreter.LABELS[case[0]]}-{case[1]}-B{case[2]}-shared{case[3]}-G{case[4]}-D{case[5]}": case
    for case in [
        (dtype, kind, 1 + (i + j + k) % 2, 1 + (j + k) % 2, group, dim)
        for (i, dtype), kind, (j, group), (k, dim) in product(
            enumerate(["fp32", "fp16"]), ["bits", "bounds16"], enumerate([1, 3, 4, 8]), enumerate([64, 128])
        )
    ]
    + [("bf16", "bits", 1, 2, 4, 64), ("bf16", "bounds16", 2, 1, 3, 128), ("fp16", "bits", 1, 1, 2, 256)]
    + [("fp32", "bits", 1, 1, 4, 96), ("fp16", "bounds5", 1, 3, 17, 96)]
}
PROPERTIES: dict[str, Callable[[], float]] = {
    "blocks bits": partial(blocks_case, "bits"),
    "blocks bounds": partial(blocks_case, "bounds4"),
    "strided": strided_case,
    "many heads": many_heads_case,
    "hypothesis": hypothesis_case,
}


CASES: dict[str, Callable[[], float]] = {n: partial(grid_case, *case) for n, case in GRID.items()} | PROPERTIES


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_reference(case: str, interpreted: Callable[[str], float]) -> None:
    assert interpreted(case) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRID)
def test_kernels_agree_with_the_reference_on_a_gpu(case: str, dtype: str) -> None:
    assert grid_case(dtype, *GRID[case][1:], device="cuda") <= GPU_TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["bits", "bounds4"])
def test_blocks_merge_on_a_gpu(kind: str) -> None:
    assert blocks_case(kind, "cuda") <= GPU_TOLERANCE


@pytest.mark.parametrize("kind", ["bits", "bounds16"])
def test_scores_of_a_head_sum_to_one_and_heads_within_the_budget_have_none(kind: str) -> None:
    index, lens = make([LENGTHS], 64, kind, 32, torch.float32)
    scores, sizes = reference(queries(3, 16, 32, torch.float32), index, lens, 64, 0.2)
    unit = 1 if kind == "bits" else 16
    assert sizes.tolist() == 3 * [[-(-n // unit) if n > 64 else 0 for n in LENGTHS]]
    # Softmaxes of 1000 in float32; measured 2e-7.
    torch.testing.assert_close(scores.sum(-1), (lens > 64).float().expand(3, -1), rtol=0, atol=1e-5)


def test_every_signed_word_reads_back_as_its_bits() -> None:
    """The two shifts of the kernel, bit i and bit i + 16 into the signs of two 16-bit numbers, in PyTorch."""
    words = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 0x12345678], dtype=torch.int32)
    for i in range(GROUP // 2):
        both = (~words << (GROUP // 2 - 1 - i)) & -2147450880
        low, high = (both & 0xFFFF) == 0x8000, (both >> 16) & 0xFFFF == 0x8000
        assert torch.equal(low, (words >> i) & 1 == 0)
        assert torch.equal(high, (words >> (i + GROUP // 2)) & 1 == 0)


BAD: dict[str, tuple[dict[str, Callable[..., object]], str]] = {
    "q axes": ({"q": lambda q: q[:, None]}, r"got \(1, 1, 4, 64\)"),
    "head dim": ({"q": lambda q: q[..., :60]}, r"multiple of 16 up to 256, got \(1, 4, 60\)"),
    "lens dtype": ({"lens": Tensor.long}, r"lens must be \[B, Hkv\] torch.int32, .* got \(1, 2\) torch.int64"),
    "group": ({"q": lambda q: q[:, :3]}, r"q \(1, 3, 64\) must hold whole groups of lens \(1, 2\)"),
    "counts": ({"counts": lambda c: c[:1]}, r"counts must be 2, one above the budget of 16, got \(100,\)"),
    "none above": ({"counts": lambda c: (16, 0)}, r"one above the budget of 16, got \(16, 0\)"),
    "starts": ({"counts": lambda c: (100, 17)}, r"index must be \(5, 64\), contiguous, got \[\(4, 64\)"),
    "dtype": ({"q": Tensor.bfloat16}, "an index for torch.bfloat16 queries must be .*bfloat16.* got .*float16"),
    "device": ({"lens": lambda x: x.to("meta")}, "index and lens must be on q's device, cpu, got cpu, meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_with_its_shape(case: str) -> None:
    changes, message = BAD[case]
    index, lens = make([[100, 0]], 16, "bits", 64, torch.float32)
    args = {"q": queries(1, 4, 64, torch.float32), "lens": lens, "counts": (100, 0)}
    args |= {name: change(args[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        scan(args["q"], index, args["lens"], args["counts"], 16, 0.125)  # type: ignore[arg-type]


if __name__ == "__main__":
    interpreter.main(CASES)
