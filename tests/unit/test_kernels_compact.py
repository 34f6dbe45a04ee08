"""Compaction: the kernels against `PagedKV.gather` and `QuantKV.quantize`, bit for bit.

The cases run in a child process under Triton's interpreter (tests/interpreter.py) and return the fields that differ.
On a CUDA device they run compiled.
"""

from __future__ import annotations

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

from lceval.kernels import launch
from lceval.kernels.compact import gather, quantize, reference
from lceval.kernels.paged import PagedKV
from lceval.kernels.quant import BITS, QuantKV

LENGTHS = [0, 1, 15, 17, 63, 64, 65, 260]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def tensors(
    batch: int, lens: list[int], length: int, dim: int, dtype: str, value_dim: int = 0
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """k, v, keep and counts; k is a slice of a longer buffer, as in a prefill, and some groups are hard to quantize."""
    rng = torch.Generator().manual_seed(len(lens) + dim)
    shape = batch, len(lens), length + 7
    k, v = (torch.randn(*shape, width, generator=rng) for width in (dim, value_dim or dim))
    k[:, 0, :, 1] *= 1000  # an outlier channel
    v[:, 0, ::3] = 0.1  # constant groups, not exact in 16 bits
    v[:, 0, 1::3] = 0
    k[:, -1, :, 3] = v[:, -1, :, 5] = 1e5 if dtype == "fp32" else 6e4
    k[:, -1, ::2, 3] = -1e-7
    keep = torch.zeros(batch, len(lens), length, dtype=torch.bool)
    for (b, h), n in zip(product(range(batch), range(len(lens))), lens * batch, strict=True):
        keep[b, h, torch.randperm(length, generator=rng)[:n]] = True
    k, v = (x.to(DTYPES[dtype])[:, :, :length] for x in (k, v))
    return k, v, keep, lens * batch


def differing(got: Any, want: Any, name: str = "") -> list[str]:
    """The fields whose bits differ, NaN and the sign of zero included."""
    if isinstance(want, Tensor):
        if not isinstance(got, Tensor) or got.dtype != want.dtype or got.shape != want.shape:
            return [f"{name}: {got!r} for {want!r}"]
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[want.element_size()]
        wrong = int((got.cpu().contiguous().view(bits) != want.contiguous().view(bits)).sum())
        return [f"{name}: {wrong} of {want.numel()}"] if wrong else []
    if hasattr(want, "__dataclass_fields__"):
        return [
            x for f in want.__dataclass_fields__ for x in differing(getattr(got, f), getattr(want, f), f"{name}.{f}")
        ]
    return [] if got == want else [f"{name}: {got} for {want}"]


def gather_case(dtype: str, dim: int, value_dim: int = 0, device: str = "cpu") -> list[str]:
    k, v, keep, counts = tensors(2, LENGTHS, 270, dim, dtype, value_dim)
    got = gather(k.to(device), v.to(device), keep.to(device), counts)
    return differing(got, PagedKV.gather(k, v, keep))


def quantize_case(
    dtype: str, dim: int, k_bits: int, v_bits: int, residual: int, value_dim: int = 0, device: str = "cpu"
) -> list[str]:
    k, v, keep, counts = tensors(1, [*LENGTHS[:-1], 130, 300], 310, dim, dtype, value_dim)
    got = quantize(k.to(device), v.to(device), keep.to(device), counts, k_bits, v_bits, residual)
    return differing(got, QuantKV.quantize(PagedKV.gather(k, v, keep), k_bits, v_bits, residual))


def all_kept_case(device: str = "cpu") -> list[str]:
    """No token is evicted: no positions."""
    k, v, _, _ = tensors(2, [1, 1, 1], 200, 64, "fp16")
    got = quantize(k.to(device), v.to(device), None, [200] * 6, 4, 2, 64)
    return differing(got, QuantKV.quantize(reference(k, v, None), 4, 2, 64))


def none_kept_case(device: str = "cpu") -> list[str]:
    k, v, keep, counts = tensors(2, [0, 0], 30, 64, "fp16")
    got = quantize(k.to(device), v.to(device), keep.to(device), counts, 4, 4, 0)
    want = QuantKV.quantize(PagedKV.gather(k, v, keep), 4, 4, 0)
    return differing(got, want) + differing(gather(k, v, keep, counts), PagedKV.gather(k, v, keep))


def long_case(device: str = "cpu") -> list[str]:
    """The mask spans several tiles, and counts continue from one to the next."""
    k, v, keep, counts = tensors(1, [9000, 5], 9001, 16, "fp16")
    got = gather(k.to(device), v.to(device), keep.to(device), counts)
    return differing(got, PagedKV.gather(k, v, keep))


def hypothesis_case() -> list[str]:
    """Shapes, counts and bits drawn by hypothesis."""
    different: list[str] = []

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(
        lens=st.lists(st.integers(0, 150), min_size=1, max_size=3),
        dim=st.sampled_from([16, 48, 80]),
        bits=st.tuples(st.sampled_from(BITS), st.sampled_from(BITS)),
        residual=st.integers(0, 130),
    )
    def run(lens: list[int], dim: int, bits: tuple[int, int], residual: int) -> None:
        k, v, keep, counts = tensors(1, lens, 160, dim, "fp32")
        got = quantize(k, v, keep, counts, *bits, residual)
        different.extend(differing(got, QuantKV.quantize(PagedKV.gather(k, v, keep), *bits, residual)))

    run()
    return different


GATHER = {f"gather-{dtype}-D{dim}": (dtype, dim) for dtype, dim in product(DTYPES, (64, 96, 128, 256))}
# Gathering copies bfloat16 as it is; quantizing computes, in the interpreter in float32.
QUANTIZE = {
    f"{interpreter.LABELS[dtype]}-D{dim}-K{k}-V{v}-R{residual}": (dtype, dim, k, v, residual)
    for dtype, (dim, k, v, residual) in product(
        DTYPES, [(64, 8, 4, 128), (128, 2, 8, 0), (96, 4, 2, 64), (256, 4, 4, 17), (80, 16, 2, 0), (64, 8, 16, 0)]
    )
}
CASES: dict[str, Callable[..., list[str]]] = {
    **{name: partial(gather_case, *case) for name, case in GATHER.items()},
    **{name: partial(quantize_case, *case) for name, case in QUANTIZE.items()},
    "gather-D192-E128": partial(gather_case, "bf16", 192, 128),
    "D48-E32-K4-V2": partial(quantize_case, "fp16", 48, 4, 2, 20, 32),
    "D80-E144-K16-V4": partial(quantize_case, "fp32", 80, 16, 4, 20, 144),
    "all kept": all_kept_case,
    "none kept": none_kept_case,
    "long": long_case,
    "hypothesis": hypothesis_case,
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_store_the_bits_of_the_reference(case: str, interpreted: Callable[[str], list[str]]) -> None:
    assert interpreted(case) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [name for name in CASES if name != "hypothesis"])
def test_compiled_kernels_store_the_bits_of_the_reference(case: str) -> None:
    assert CASES[case](device="cuda") == []


@pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET=1: CPU tensors run the kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_tensors_take_the_reference(dtype: str) -> None:
    assert gather_case(dtype, 64) == []
    assert quantize_case(dtype, 64, 4, 2, 64) == []
    assert all_kept_case() == []


BAD: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "k axes": ({"k": lambda k: k[0]}, r"D a multiple of 16 up to 256, \(2, 50, 64\)"),
    "v shape": ({"v": lambda v: v[:, :1]}, r"v must be k's .* \(1, 1, 50, 64\)"),
    "head dim": ({"k": lambda k: k[..., :60]}, r"\(1, 2, 50, 60\)"),
    "dtype": ({"v": Tensor.half}, "v must be on cpu in one of .* got cpu, torch.float16"),
    "keep shape": (
        {"keep": lambda keep: keep[..., :9]},
        r"keep must be \(1, 2, 50\) torch.bool on cpu, got \(\(1, 2, 9\)",
    ),
    "keep dtype": ({"keep": Tensor.int}, r"got \(\(1, 2, 50\), torch.int32"),
    "counts": ({"counts": lambda n: n[:1]}, r"counts must be one for each of \(1, 2\) heads, at most 50, got \[20\]"),
    "too many": ({"counts": lambda n: [51, 3]}, r"at most 50, got \[51, 3\]"),
    "layout": ({"k": lambda k: k.repeat(1, 1, 1, 2)[..., ::2]}, "last axis of k must be contiguous"),
    "bits": ({"k_bits": lambda _: 3}, "bits are one of .* got 3, 4, 128"),
    "residual": ({"residual": lambda _: -1}, "residual at least 0, got 4, 4, -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_with_its_value(case: str) -> None:
    changes, message = BAD[case]
    k, v, keep, counts = tensors(1, [20, 3], 50, 64, "fp32")
    args: dict[str, Any] = {"k": k, "v": v, "keep": keep, "counts": counts, "k_bits": 4, "v_bits": 4, "residual": 128}
    args |= {name: change(args[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        quantize(**args)


if __name__ == "__main__":
    interpreter.main(CASES)
