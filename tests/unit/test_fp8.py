"""8-bit floats: the codec, and attention over a context in them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lceval.kernels import dispatch, fp8
from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.paged import PagedKV

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def ragged(counts: list[list[int]], dim: int, dtype: torch.dtype = torch.float32) -> PagedKV:
    length = max(max(row) for row in counts) + 9
    shape = (len(counts), len(counts[0]), length, dim)
    k, v = torch.randn(shape) + 4 * torch.randn(*shape[:2], 1, dim), 0.1 * torch.randn(shape)
    order = torch.rand(shape[:3]).argsort(-1).argsort(-1)
    return PagedKV.gather(k.to(dtype), v.to(dtype), order < torch.tensor(counts)[..., None])


def value_of(code: int) -> float:
    """The definition of e4m3: sign, exponent with bias 7, mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def test_codes_are_decoded_by_the_definition() -> None:
    decoded = fp8.decode(torch.arange(256, dtype=torch.uint8)).tolist()
    for code, value in enumerate(decoded):
        assert value == value_of(code) or (math.isnan(value) and math.isnan(value_of(code)))


def test_a_number_becomes_the_nearest_code_and_saturates() -> None:
    finite = sorted({value_of(code) for code in range(256) if not math.isnan(value_of(code))})
    numbers = [*torch.linspace(-460, 460, 3001).tolist(), *torch.linspace(-0.05, 0.05, 301).tolist(), 1e6, -1e30]
    for number, value in zip(numbers, fp8.decode(fp8.encode(torch.tensor(numbers))).tolist(), strict=True):
        clamped = min(448.0, max(-448.0, number))
        assert abs(value - clamped) == pytest.approx(min(abs(x - clamped) for x in finite), abs=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_are_within_a_sixteenth_and_scales_are_powers_of_two(dtype: str) -> None:
    kv = ragged([[200, 65, 0], [1, 64, 130]], 48, DTYPES[dtype])
    kv.k[-1, -1] = math.nan  # after the last slot of the last head
    stored = Fp8KV.quantize(kv)
    for scale in (stored.k_scale, stored.v_scale):
        assert scale.shape == (2, 3)
        assert torch.equal(scale.log2(), scale.log2().round())
        assert scale.min() >= fp8.SMALLEST_SCALE
    for row in range(6):
        scales = (scale.flatten()[row] for scale in (stored.k_scale, stored.v_scale))
        for exact, got, scale in zip(kv.head(row), stored.head(row), scales, strict=True):
            assert got.dtype == DTYPES[dtype]
            assert (got - exact).abs().le(exact.abs() / 16 + scale * 2.0**-10).all()
        positions = divmod(row, 3)
        assert torch.equal(stored.kept_positions(*positions), kv.kept_positions(*positions))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_attention_is_that_over_the_decoded_slots(dtype: str, tokens: int) -> None:
    stored = Fp8KV.quantize(ragged([[200, 65], [0, 130]], 64, DTYPES[dtype]))
    q = torch.randn(4, 6, tokens, 64).to(DTYPES[dtype])  # two rows for each sequence
    o, lse = stored.attend(q, 0.125)
    assert o.dtype == DTYPES[dtype]
    for row in range(4):
        for head in range(6):
            k, v = (x.double() for x in stored.head(row // 2 * 2 + head // 3))
            logits = q[row, head].double() @ k.T * 0.125
            expected: Tensor = logits.softmax(-1) @ v if len(k) else torch.zeros(tokens, 64).double()
            tolerance = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}[dtype] * max(1e-3, float(expected.abs().max()))
            torch.testing.assert_close(o[row, head].double(), expected, rtol=0, atol=tolerance)
            torch.testing.assert_close(lse[row, head].double(), logits.logsumexp(-1), rtol=1e-2, atol=1e-3)


def test_the_path_of_the_kernels_gives_the_same_on_a_cpu() -> None:
    stored = Fp8KV.quantize(ragged([[200, 65]], 64))
    q = torch.randn(3, 6, 1, 64)
    for a, b in zip(dispatch.attend(q, stored, 0.125), stored.attend(q, 0.125), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_the_tensors() -> None:
    kv = ragged([[200, 65]], 48)
    stored = Fp8KV.quantize(kv)
    assert stored.kept_bytes == 265 * (2 * 48 + 4) + 2 * 2 * 4
    assert stored.read_bytes == 265 * 2 * 48 + 2 * 2 * 4
    tensors = [stored.kv.k, stored.kv.v, kv.table, kv.lens, kv.positions, stored.k_scale, stored.v_scale]
    assert stored.allocated_bytes == sum(x.nbytes for x in tensors if x is not None)
    slots = torch.tensor([0, 63, 64, 199])
    assert all(torch.equal(a, b[slots]) for a, b in zip(stored.take(0, slots), stored.head(0), strict=True))
