"""The quantized cache: its codec against the definition, its attention against attention over dequantized slots."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lceval.kernels import dense, quant
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.quant import GROUP, QuantKV, ceil16, pack, reference, unpack
from lceval.kernels.rotated import Rotated, rotate
from lceval.models.policies.quantizer import NAMES, Quantizer

LENGTHS = [0, 1, 15, 17, 63, 64, 65, 191, 192, 193, 1000]
BITS = [(8, 8), (4, 4), (2, 2), (8, 4), (4, 2), (16, 4), (4, 16)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STORED = {torch.float32: torch.float16, torch.float16: torch.float16, torch.bfloat16: torch.bfloat16}
# Largest error of attention measured over the cases below, relative to the largest output of its row: fp32 2.5e-6,
# fp16 7.9e-4 and bf16 8.0e-3 (dequantized slots, the residual's o and the result are rounded to q's dtype).
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}


def ragged(counts: list[list[int]], dim: int, dtype: torch.dtype = torch.float32) -> PagedKV:
    """A cache of random slots, evicted at random. Its keys have channels far from zero, as in real models."""
    length = max(max(row) for row in counts) + 9
    shape = (len(counts), len(counts[0]), length, dim)
    k, v = torch.randn(shape) + 4 * torch.randn(*shape[:2], 1, dim), torch.randn(shape)
    order = torch.rand(shape[:3]).argsort(-1).argsort(-1)
    return PagedKV.gather(k.to(dtype), v.to(dtype), order < torch.tensor(counts)[..., None])


def uniform(sequences: int, heads: int, n: int, dim: int, dtype: torch.dtype = torch.float32) -> PagedKV:
    """Every token kept; slots after the last one in its page are NaN."""
    k, v = (torch.randn(sequences, heads, -(-n // PAGE) * PAGE, dim).to(dtype) for _ in range(2))
    k[:, :, n:] = v[:, :, n:] = math.nan
    return PagedKV.full(k, v, n)


def dequantized(kv: PagedKV, row: int, k_bits: int, v_bits: int, residual: int) -> tuple[Tensor, Tensor]:
    """Head `row` quantized and dequantized by the reference."""
    k, v = kv.head(row)
    old, stored = max(0, len(k) - residual) // PAGE * PAGE, STORED[k.dtype]
    k, v = k.clone(), v.clone()
    if k_bits < 16:
        k[:old] = reference(k[:old].T.float(), k_bits, stored).T.to(k.dtype)
    if v_bits < 16:
        v[:old] = reference(v[:old].float(), v_bits, stored).to(v.dtype)
    return k, v


def reference_attention(q: Tensor, kv: QuantKV | Rotated, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention in float64 over the dequantized slots of `kv`, one query head at a time."""
    batch, heads = q.shape[:2]
    sequences, kv_heads = kv.lens.shape
    o, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b, h in product(range(batch), range(heads)):
        row = b * sequences // batch * kv_heads + h * kv_heads // heads
        if kv.counts[row]:
            k, v = (x.double() for x in kv.head(row))
            logits = q[b, h].double() @ k.T * scaling
            o[b, h], lse[b, h] = logits.softmax(-1) @ v, logits.logsumexp(-1)
    return o, lse


def check_attention(q: Tensor, kv: QuantKV, tolerance: float) -> None:
    o, lse = kv.attend(q, 0.3 * q.shape[-1] ** -0.5)
    expected_o, expected_lse = reference_attention(q, kv, 0.3 * q.shape[-1] ** -0.5)
    assert o.dtype == q.dtype
    assert lse.dtype == torch.float32
    empty = expected_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    assert not o[empty].any()
    error = (o.double() - expected_o).abs().amax(-1) / expected_o.abs().amax(-1).masked_fill(empty, 1.0)
    assert error.max() <= tolerance
    # Measured 1.1e-6 in fp32, 9.6e-5 in fp16, 2.6e-4 in bf16, where the residual's logits are rounded.
    assert torch.where(empty, 0.0, lse - expected_lse).abs().max() <= 4 * tolerance


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@given(
    st.sampled_from([8, 4, 2]).flatmap(
        lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), min_size=1, max_size=70))
    )
)
def test_packed_codes_round_trip(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    words = pack(torch.tensor([codes, codes[::-1]]), bits)
    assert words.dtype == torch.int32
    assert words.shape == (2, -(-len(codes) * bits // 32))
    assert unpack(words, bits)[:, : len(codes)].tolist() == [codes, codes[::-1]]
    assert not unpack(words, bits)[:, len(codes) :].any()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_ceil16_is_the_next_number_up(stored: torch.dtype) -> None:
    """All 65536 numbers, and a point slightly above and below each."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(stored).float()
    every = every[every.isfinite()].unique()  # ascending, the two zeros as one
    assert torch.equal(ceil16(every, stored).float(), every)
    between = (every[:-1].double() * 0.99 + every[1:].double() * 0.01).float()
    assert torch.equal(ceil16(between, stored).float(), every[1:])
    between = (every[:-1].double() * 0.01 + every[1:].double() * 0.99).float()
    assert torch.equal(ceil16(between, stored).float(), every[1:])
    assert ceil16(torch.tensor([math.inf]), stored).item() == torch.finfo(stored).max


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 20, 64, 80, 128])
def test_codes_dequantize_as_the_reference_within_half_a_step(dim: int, dtype: str, bits: int) -> None:
    kv = ragged([[64, 0, 193]], dim, DTYPES[dtype])
    actual = QuantKV.quantize(kv, bits, bits, residual=0)
    for row, pages in enumerate(actual.pages):
        for x, got, expected in zip(kv.head(row), actual.head(row), dequantized(kv, row, bits, bits, 0), strict=True):
            # Measured 0; a processor that fuses the sum rounds differently, in 16 bits rarely by a whole unit.
            unit = torch.finfo(x.dtype).eps
            torch.testing.assert_close(got, expected, rtol=unit, atol=unit)
            assert got.dtype == x.dtype
            assert torch.equal(got[pages * PAGE :], x[pages * PAGE :])
    # float32 dequantizes without another rounding.
    page, slot = (t.flatten() for t in torch.meshgrid(torch.arange(4), torch.arange(PAGE), indexing="ij"))
    k, v = actual.k.take_keys(page, slot).view(4, PAGE, dim), actual.v.take_values(page, slot, dim).view(4, PAGE, dim)
    assert actual.k.scale is not None
    assert actual.v.scale is not None
    k_steps = actual.k.scale.float().repeat_interleave(GROUP, 1)
    v_steps = actual.v.scale.float().repeat_interleave(GROUP, 2)[..., :dim]
    source = torch.cat([kv.table[0, 0, :1], kv.table[0, 2, :3]]).long()
    for x, got, steps in ((kv.k, k, k_steps), (kv.v, v, v_steps)):
        error = (got - x[source].float()).abs()
        # Measured 0.5; float32 may round code * scale + zero, of numbers up to 16, by 1e-6.
        assert (error <= 0.5 * steps + 4e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_tiny_and_huge_groups(dtype: str) -> None:
    top = torch.finfo(DTYPES[dtype]).max if dtype == "fp16" else 60000.0
    values = torch.tensor([0.0, 1.0, -2.5, 1e-7, -1e-7, 0.1, top, -top])
    k = values[torch.arange(64) % 8].expand(1, 1, 64, 64).contiguous().to(DTYPES[dtype])  # constant in every channel
    spread = torch.stack([k[0, 0], k[0, 0] * (-1) ** torch.arange(64)[:, None]]).to(k.dtype)  # and from -x to x
    kv = PagedKV.full(spread[None], spread[None], 64)
    for bits in (8, 4, 2):
        actual = QuantKV.quantize(kv, bits, bits, residual=0)
        for row in (0, 1):
            (k, _), (got, _) = kv.head(row), actual.head(row)
            assert got.isfinite().all()
            span = k.float().amax(0) - k.float().amin(0)
            # Rounding of scale (2**-7 of it in bfloat16) and of zero, and underflow of float16.
            assert ((got - k).float().abs() <= span / (2**bits - 1) * 0.51 + k.float().abs() * 2**-8 + 1e-7).all()
        assert actual.head(0)[0][:, :2].float().equal(kv.head(0)[0][:, :2].float())


def test_float32_beyond_float16_saturates() -> None:
    x = torch.tensor([1e6, -1e6, 1e30, 7e4])[torch.arange(64) % 4].expand(1, 1, 64, 64).contiguous()
    actual = QuantKV.quantize(PagedKV.full(x, x, 64), 8, 8, residual=0)
    for got in actual.head(0):
        assert got.isfinite().all()
    assert all(t.isfinite().all() for t in actual.attend(torch.zeros(1, 1, 1, 64), 1.0))


def test_fewer_bits_are_less_exact() -> None:
    kv = uniform(1, 2, 1000, 64)
    q = torch.randn(1, 6, 4, 64)
    exact = kv.attend(q, 0.125)[0]
    errors = {}
    for name, (k_bits, v_bits) in NAMES.items():
        errors[name] = (QuantKV.quantize(kv, k_bits, v_bits).attend(q, 0.125)[0] - exact).norm() / exact.norm()
    assert 0 < errors["int8"] < 0.02 < errors["int4"] < 0.3 < errors["int2"]  # measured 0.006, 0.10, 0.58
    assert errors["int8"] < errors["kv8v4"] < errors["int4"] < errors["kv4v2"] < errors["int2"]
    assert errors["kv16v8"] < errors["int8"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_attention_over_ragged_heads_is_attention_over_dequantized_slots(
    group: int, dim: int, bits: tuple[int, int]
) -> None:
    actual = QuantKV.quantize(ragged([LENGTHS], dim), *bits)
    assert actual.counts == tuple(LENGTHS)
    assert actual.pages == (0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 13)
    for tokens in (1, 11):
        check_attention(torch.randn(1, len(LENGTHS) * group, tokens, dim), actual, TOLERANCE["fp32"])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", LENGTHS)
def test_attention_over_heads_of_equal_length(n: int, bits: tuple[int, int]) -> None:
    for dim, residual, tokens in ((64, 128, 1), (20, 0, 1), (64, 64, 5)):
        actual = QuantKV.quantize(uniform(1, 3, n, dim), *bits, residual)
        check_attention(torch.randn(1, 9, tokens, dim), actual, TOLERANCE["fp32"])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_in_every_dtype(dtype: str, bits: tuple[int, int]) -> None:
    for kv in (uniform(1, 2, 300, 64, DTYPES[dtype]), ragged([[300, 0, 129, 400]], 64, DTYPES[dtype])):
        q = torch.randn(1, kv.lens.shape[1] * 3, 1, 64).to(DTYPES[dtype])
        check_attention(q, QuantKV.quantize(kv, *bits), TOLERANCE[dtype])


@pytest.mark.parametrize("counts", [[[200, 300], [0, 77]], [[250, 250], [250, 250]]])
def test_two_sequences_and_rows_that_share_one(counts: list[list[int]]) -> None:
    q = torch.randn(6, 4, 3, 16)
    for part in (counts, counts[:1]):
        actual = QuantKV.quantize(ragged(part, 16), 4, 4)
        check_attention(q, actual, TOLERANCE["fp32"])
        rows = [actual.attend(q[i : i + 1], 0.25) for i in range(6)] if len(part) == 1 else []
        for i, row in enumerate(rows):
            for together, alone in zip(actual.attend(q, 0.25), row, strict=True):
                torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["even", "ragged"])
def test_blocks_of_pages_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    kv = uniform(1, 2, 1000, 16) if kind == "even" else ragged([[1000, 200]], 16)
    q = torch.randn(1, 4, 7, 16)
    whole = QuantKV.quantize(kv, 4, 2)
    results = whole.attend(q, 0.25)
    monkeypatch.setattr(quant, "WORKSPACE", 3 * PAGE * 16)
    blocks = QuantKV.quantize(kv, 4, 2)
    for a, b in ((whole.k, blocks.k), (whole.v, blocks.v)):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
    assert dense.block_rows(dense.MAX_SCORES, torch.device("cuda")) == dense.CUDA_BLOCK
    for max_scores in (dense.MAX_SCORES, 5000, 1):
        monkeypatch.setattr(dense, "MAX_SCORES", max_scores)
        for actual, expected in zip(blocks.attend(q, 0.25), results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("residual", [0, 1, 64, 128, 2000])
def test_the_newest_slots_are_exact_and_the_rest_is_the_reference(residual: int, bits: tuple[int, int]) -> None:
    kv = ragged([[0, 63, 130], [200, 64, 128]], 20)
    actual = QuantKV.quantize(kv, *bits, residual)
    for row, n in enumerate(kv.counts):
        assert n - actual.pages[row] * PAGE >= min(n, residual)
        for got, expected, full in zip(
            actual.head(row), dequantized(kv, row, *bits, residual), kv.head(row), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(got[actual.pages[row] * PAGE :], full[actual.pages[row] * PAGE :])
        b, h = divmod(row, 3)
        assert torch.equal(actual.kept_positions(b, h), kv.kept_positions(b, h))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_taken_slots_are_those_of_the_head(dtype: str, bits: tuple[int, int]) -> None:
    for residual in (0, 128):
        actual = QuantKV.quantize(ragged([[64, 63, 1, 330]], 20, DTYPES[dtype]), *bits, residual)
        for row, n in enumerate(actual.counts):
            for slots in (torch.randperm(n), torch.tensor([n - 1, 0, n - 1]), torch.arange(0)):
                for got, whole in zip(actual.take(row, slots), actual.head(row), strict=True):
                    assert torch.equal(got, whole[slots])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["even", "ragged"])
def test_bytes_are_those_of_the_tensors(kind: str, bits: tuple[int, int]) -> None:
    dim, counts = 20, (300, 300) if kind == "even" else (300, 65)
    kv = uniform(1, 2, 300, dim) if kind == "even" else ragged([list(counts)], dim)
    actual = QuantKV.quantize(kv, *bits)
    rest = actual.residual
    tensors = [*actual.k.tensors, *actual.v.tensors, actual.table, actual.lens, actual.positions]
    tensors += [rest.k, rest.v, rest.table, rest.lens, rest.positions]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    assert actual.allocated_bytes == sum(storages.values())
    old = sum(actual.pages) * PAGE
    assert old == 2 * 128 if kind == "even" else old == 128
    # Keys per slot: codes and a 32nd of a 2-byte scale and zero per channel; values: whole words, one group.
    k_slot = dim * 4 if bits[0] == 16 else dim * bits[0] / 8 + dim * 4 / GROUP
    v_slot = dim * 4 if bits[1] == 16 else math.ceil(dim * bits[1] / 32) * 4 + 4
    new = (sum(counts) - old) * 2 * dim * 4
    assert actual.read_bytes == old * (k_slot + v_slot) + new
    assert actual.kept_bytes == actual.read_bytes + (0 if kind == "even" else 4 * sum(counts))
    assert actual.kept_bytes < kv.kept_bytes
    assert actual.kept_bytes <= actual.allocated_bytes


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
def test_a_rotation_is_orthonormal_and_its_own_inverse(dim: int) -> None:
    x, y = torch.randn(7, dim), torch.randn(7, dim)
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(x) @ rotate(y).T, x @ y.T, rtol=1e-4, atol=1e-4)
    # One outlier is spread over its block.
    block = dim & -dim
    outlier = torch.zeros(dim).index_fill_(0, torch.tensor([3]), 1.0)
    assert rotate(outlier)[:block].abs().allclose(torch.full((block,), block**-0.5))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dim", [64, 80])
def test_attention_over_rotated_slots_is_attention_over_their_head(dim: int, dtype: str) -> None:
    plain = ragged([[200, 70], [0, 129]], dim, DTYPES[dtype])
    kv = Quantizer(4, 4, residual=10, rotate="hadamard").quantize(plain)
    assert isinstance(kv, Rotated)
    q = torch.randn(2, 4, 3, dim).to(DTYPES[dtype])
    o, lse = kv.attend(q, 0.1)
    over_head, _ = reference_attention(q, kv, 0.1)
    torch.testing.assert_close(o.double(), over_head, rtol=0, atol=20 * TOLERANCE[dtype] * float(over_head.abs().max()))
    assert lse.shape == q.shape[:3]
    same = Quantizer(4, 4, residual=10).quantize(plain)
    assert (kv.kept_bytes, kv.allocated_bytes, kv.read_bytes, kv.counts) == (
        same.kept_bytes,
        same.allocated_bytes,
        same.read_bytes,
        same.counts,
    )
    slots = torch.tensor([0, 63, 64, 199])
    for taken, whole in zip(kv.take(0, slots), kv.head(0), strict=True):
        torch.testing.assert_close(taken, whole[slots], rtol=1e-2, atol=1e-2)
    assert torch.equal(kv.kept_positions(0, 0), plain.kept_positions(0, 0))


def test_a_rotation_helps_where_few_channels_have_outliers() -> None:
    v = torch.randn(1, 1, 640, 64)
    v[..., 5] *= 30
    plain = PagedKV.full(v, v, 640)
    errors = [
        (Quantizer(16, 4, residual=0, rotate=rotation).quantize(plain).head(0)[1] - v[0, 0]).norm()
        for rotation in ("hadamard", "none")
    ]
    assert errors[0] < 0.7 * errors[1]


def test_no_heads_and_no_slots_are_legal() -> None:
    none = torch.empty(0, PAGE, 0)
    table, lens = (torch.empty(shape, dtype=torch.int32) for shape in ((1, 0, 0), (1, 0)))
    actual = QuantKV.quantize(PagedKV(none, none, table, lens, None, ()), 4, 4)
    assert (actual.counts, actual.kept_bytes) == ((), 0)
    check_attention(torch.randn(1, 4, 2, 16), QuantKV.quantize(ragged([[0, 0]], 16), 4, 4), 0.0)


def test_recipe_names_and_refused_values() -> None:
    assert len(NAMES) == 3 + 12
    assert (NAMES["int4"], NAMES["kv8v4"], NAMES["kv16v2"]) == ((4, 4), (8, 4), (16, 2))
    stored = Quantizer(8, 4).quantize(uniform(1, 1, 200, 16))
    assert (stored.k.bits, stored.v.bits, stored.pages) == (8, 4, (1,))
    for k_bits, v_bits, residual in ((3, 4, 128), (8, 1, 128), (16, 16, 128), (4, 4, -1)):
        with pytest.raises(ValueError, match=r"bits|residual"):
            Quantizer(k_bits, v_bits, residual)
    with pytest.raises(ValueError, match="bits are one of"):
        QuantKV.quantize(uniform(1, 1, 200, 16), 4, 5)
