"""Decode attention over quantized pages: the reference against the plain codec, the kernels against the reference.

The cases run in a child process under Triton's interpreter (tests/interpreter.py) and return the errors that they
measure; each test compares those of one case with the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lceval.kernels import dispatch, launch, merge, quant, variant
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.quant import Pool, QuantKV
from lceval.kernels.quant_decode import decode_pages, decode_quantised, reference

Error = dict[str, float]
Result = tuple[Tensor, Tensor]
LENGTHS = [0, 1, 15, 17, 63, 64, 65, 259]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PAIRS = list(product(quant.BITS, quant.BITS))[1:]
# Largest error measured over all cases, relative to the largest output of the same head: fp32 1.4e-6 (sums in another
# order), fp16 1.2e-3 (k, v, p and o rounded to 11 bits), bf16 3.6e-3 in the interpreter, which computes in float32.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}
# lse is float32 whatever q is, but keys are rounded to q's dtype: measured 1.5e-6 and 4.7e-5.
LSE_TOLERANCE = {"fp32": 1e-5, "fp16": 5e-4, "bf16": 4e-3}


def cache(counts: list[list[int]], dim: int, dtype: torch.dtype, seed: int = 0, *, value_dim: int = 0) -> PagedKV:
    """Random slots; the keys have channels far from zero, as those of models do."""
    rng = torch.Generator().manual_seed(seed)
    shape = (len(counts), len(counts[0]), max(map(max, counts)) + 1)
    sizes = (*shape, dim), (*shape, value_dim or dim), (*shape[:2], 1, dim)
    k, v, offset = (torch.randn(size, generator=rng) for size in sizes)
    keep = torch.arange(shape[2]) < torch.tensor(counts)[..., None]
    return PagedKV.gather((k + 4 * offset).to(dtype), v.to(dtype), keep)


def shuffled(kv: QuantKV) -> QuantKV:
    """The same pages in another order, among spare ones of NaN that must not be read."""
    count = kv.k.words.shape[0]
    order = torch.randperm(count + 2, generator=torch.Generator().manual_seed(3))[:count]

    def move(pool: Pool) -> Pool:
        moved = []
        for t in pool.tensors:
            new = torch.full((count + 2, *t.shape[1:]), math.nan if t.is_floating_point() else -1, dtype=t.dtype)
            new[order] = t
            moved.append(new)
        return Pool(pool.bits, *moved)

    table = order[kv.table.long()].int() if count else kv.table
    return replace(kv, k=move(kv.k), v=move(kv.v), table=table)


def queries(batch: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, heads, dim, generator=torch.Generator().manual_seed(1)).to(dtype)


def on(kv: QuantKV, device: str) -> QuantKV:
    """The cache with all tensors that a kernel reads on `device`."""
    k, v = (Pool(x.bits, *(t.to(device) for t in x.tensors)) for x in (kv.k, kv.v))
    rest = kv.residual
    rest = replace(rest, **{name: getattr(rest, name).to(device) for name in ("k", "v", "table", "lens")})
    return replace(kv, k=k, v=v, table=kv.table.to(device), lens=kv.lens.to(device), residual=rest)


def of_pages(kv: QuantKV) -> tuple[Any, ...]:
    """The arguments of `decode_pages` and its reference."""
    return kv.k, kv.v, kv.table, kv.lens, kv.residual.lens


def errors(got: Result, want: Result) -> Error:
    """The largest error of o, relative to its head, and of lse; NaN where an empty head is not 0 and -inf."""
    (o, lse), (want_o, want_lse) = ([x.cpu() for x in pair] for pair in (got, want))
    empty = torch.isneginf(want_lse)
    if not torch.equal(torch.isneginf(lse), empty) or o[empty].any() or want_o[empty].any():
        return {"o": math.nan, "lse": math.nan}
    scale = want_o.double().abs().amax(-1).masked_fill(empty, 1.0)
    worst = (o.double() - want_o.double()).abs().amax(-1) / scale
    worst_lse = torch.where(empty, 0.0, (lse - want_lse).abs())
    return {"o": worst.max().item(), "lse": worst_lse.max().item()}


def worst(*measured: Error) -> Error:
    # Python's max() over a NaN depends on its position.
    return {name: torch.tensor([error[name] for error in measured]).max().item() for name in measured[0]}


# --- cases: run in the child process, and on a GPU -----------------------------------------------------------------


def grid_case(
    dtype: str,
    group: int,
    dim: int,
    bits: tuple[int, int],
    lengths: list[int] = LENGTHS,
    value_dim: int = 0,
    cap: float | None = None,
    device: str = "cpu",
) -> Error:
    """Pages alone against the reference; pages with the newest slots against attention over the dequantized cache."""
    kv = shuffled(QuantKV.quantize(cache([lengths], dim, DTYPES[dtype], value_dim=value_dim), *bits, residual=0))
    q = queries(1, len(lengths) * group, dim, DTYPES[dtype])
    scaling = 0.3 * dim**-0.5
    moved = on(kv, device)
    pages = decode_pages(q.to(device), *of_pages(moved), scaling, cap, splits=3)
    whole = decode_quantised(q.to(device), moved, scaling, cap)
    # Slots that are not in pages are compared in float32: q and they are exact in it.
    new = replace(kv.residual, k=kv.residual.k.float(), v=kv.residual.v.float())
    want = reference(q, *of_pages(kv), scaling, cap)
    o, lse = new.attend(q.float()[:, :, None], scaling, cap)
    want_whole = merge.reference(want[0][:, :, None], want[1][..., None], (o[:, :, 0], lse[:, :, 0]))
    return worst(errors(pages, want), errors(whole, want_whole))


def splits_case(splits: int) -> Error:
    kv = QuantKV.quantize(cache([[330, 0]], 64, torch.float32), 4, 2, residual=0)
    q = queries(1, 6, 64, torch.float32)
    return errors(decode_pages(q, *of_pages(kv), 0.1, splits=splits), decode_pages(q, *of_pages(kv), 0.1, splits=1))


def shared_case(sequences: int) -> Error:
    """Rows that share a sequence give the results of each row alone."""
    kv = QuantKV.quantize(cache([[200, 0, 70], [128, 64, 1]][:sequences], 64, torch.float32), 4, 4, residual=10)
    q = queries(3 * sequences, 6, 64, torch.float32)
    o, lse = kv.attend(q[:, :, None], 0.1)
    got_o, got_lse = dispatch.attend(q[:, :, None], kv, 0.1)
    return errors((got_o[:, :, 0], got_lse[:, :, 0]), (o[:, :, 0], lse[:, :, 0]))


def pieces_case() -> Error:
    """More queries than one launch takes."""
    kv = QuantKV.quantize(cache([[200, 70]], 64, torch.float32), 4, 4, residual=10)
    q = queries(10, 6, 64, torch.float32).view(2, 5, 6, 64).transpose(1, 2)
    most, dispatch.MAX_ROWS = dispatch.MAX_ROWS, 6 * 2
    try:
        pieces = dispatch.attend(q, kv, 0.1)
    finally:
        dispatch.MAX_ROWS = most
    return errors(pieces, dispatch.attend(q, kv, 0.1))


def empty_case() -> Error:
    """No slot; no whole page; and no page in the pools, with the kernels called nonetheless."""
    measured = []
    for counts in ([[0, 0]], [[0, 63]]):
        kv = QuantKV.quantize(cache(counts, 64, torch.float32), 4, 4)
        q = queries(1, 6, 64, torch.float32)
        o, lse = kv.attend(q[:, :, None], 0.1)
        measured.append(errors(decode_quantised(q, kv, 0.1), (o[:, :, 0], lse[:, :, 0])))
        measured.append(errors(decode_pages(q, *of_pages(kv), 0.1), reference(q, *of_pages(kv), 0.1)))
    return worst(*measured)


def merge_case() -> Error:
    """Empty parts among others, nothing but empty parts, and an empty rest."""
    rng = torch.Generator().manual_seed(0)
    o, lse = torch.randn(2, 3, 19, 48, generator=rng), 9 * torch.randn(2, 3, 19, generator=rng)
    lse[:, 1, ::2] = lse[:, 2] = -math.inf
    o[lse.isneginf()] = 0.0
    rest = o[:, :, 4].contiguous(), lse[:, :, 4].contiguous()
    pairs = [(merge.merge(o, lse, r, torch.float32), merge.reference(o, lse, r)) for r in (None, rest)]
    return worst(*(errors(*pair) for pair in pairs))


def hypothesis_case() -> Error:
    """The largest errors over shapes drawn by hypothesis."""
    measured: list[Error] = []

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(
        counts=st.lists(st.integers(0, 200), min_size=2, max_size=2),
        group=st.integers(1, 18),
        dim=st.sampled_from([16, 48, 64]),
        bits=st.sampled_from(PAIRS),
        residual=st.sampled_from([0, 30, 128]),
    )
    def run(counts: list[int], group: int, dim: int, bits: tuple[int, int], residual: int) -> None:
        kv = shuffled(QuantKV.quantize(cache([counts], dim, torch.float32), *bits, residual))
        q = queries(1, 2 * group, dim, torch.float32)
        got = decode_pages(q, *of_pages(kv), 0.05, splits=2)
        measured.append(errors(got, reference(q, *of_pages(kv), 0.05)))

    run()
    return worst(*measured)


SHORT = [0, 63, 64, 130]
# Every G and every D in both dtypes, every number of bits on both sides; then padded and the widest head_dim, more
# query heads than one tile, bfloat16 (float32 arithmetic in the interpreter).
GRID: dict[str, tuple[Any, ...]] = {
    f"{interpreter.LABELS[dtype]}-G{group}-D{dim}-kv{bits[0]}v{bits[1]}": (dtype, group, dim, bits, lengths)
    for dtype, group, dim, bits, lengths in [
        ("fp32", 1, 64, (8, 4), LENGTHS),
        ("fp32", 3, 128, (2, 8), LENGTHS),
        ("fp32", 4, 64, (4, 2), SHORT),
        ("fp32", 8, 128, (16, 4), SHORT),
        ("fp16", 1, 128, (4, 4), LENGTHS),
        ("fp16", 3, 64, (2, 2), LENGTHS),
        ("fp16", 4, 128, (8, 8), LENGTHS),
        ("fp16", 8, 64, (2, 4), LENGTHS),
        ("fp16", 2, 96, (4, 16), SHORT),
        ("fp16", 2, 256, (8, 2), SHORT),
        ("fp16", 17, 80, (8, 4), SHORT),
        ("fp32", 2, 16, (2, 2), SHORT),
        ("bf16", 4, 64, (8, 2), SHORT),
        ("bf16", 2, 128, (16, 2), SHORT),
    ]
} | {
    # Capped logits (of about 1.5 at most, with the offsets of the keys), and keys wider and narrower than values.
    "cap-D64": ("fp32", 3, 64, (4, 4), SHORT, 64, 1.0),
    "cap-D128": ("fp16", 2, 128, (2, 8), SHORT, 128, 1.0),
    "cap-16-bit-keys": ("fp32", 2, 64, (16, 4), SHORT, 64, 1.0),
    "D48-E32": ("fp32", 2, 48, (4, 2), SHORT, 32),
    "D80-E144": ("fp32", 2, 80, (8, 4), SHORT, 144, 1.0),
    "D192-E128": ("fp16", 3, 192, (4, 4), SHORT, 128),
    "D64-E32-16-bit-values": ("fp32", 2, 64, (2, 16), SHORT, 32),
}
PROPERTIES: dict[str, Callable[[], Error]] = {
    **{f"splits={n}": partial(splits_case, n) for n in (2, 7)},
    **{f"sequences={n}": partial(shared_case, n) for n in (1, 2)},
    "pieces": pieces_case,
    "empty": empty_case,
    "merge": merge_case,
    "hypothesis": hypothesis_case,
}


CASES: dict[str, Callable[[], Error]] = {name: partial(grid_case, *case) for name, case in GRID.items()} | PROPERTIES


# --- tests ----------------------------------------------------------------------------------------------------------


def assert_close(error: Error, dtype: str) -> None:
    assert error["o"] <= TOLERANCE[dtype], error
    assert error["lse"] <= LSE_TOLERANCE[dtype], error


@pytest.mark.parametrize("case", GRID)
def test_kernels_agree_with_the_reference(case: str, interpreted: Callable[[str], Error]) -> None:
    assert_close(interpreted(case), GRID[case][0])


@pytest.mark.parametrize("case", PROPERTIES)
def test_kernels_keep_their_properties(case: str, interpreted: Callable[[str], Error]) -> None:
    assert_close(interpreted(case), "fp32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", PAIRS)
@pytest.mark.parametrize(
    ("dtype", "dim"), [(name, dim) for name, dims in variant.USED_HEAD_DIMS.items() for dim in dims]
)
def test_kernels_agree_with_the_reference_on_a_gpu(dtype: str, dim: int, bits: tuple[int, int]) -> None:
    for group in (1, 3, 4, 8):
        assert_close(grid_case(dtype, group, dim, bits, device="cuda"), dtype)


@pytest.mark.parametrize("bits", PAIRS)
def test_reference_is_attention_over_the_dequantized_cache(bits: tuple[int, int]) -> None:
    full = cache([[130, 0, 64]], 48, torch.float32)
    kv = shuffled(QuantKV.quantize(full, *bits, residual=0))
    q = queries(1, 6, 48, torch.float32)
    o, lse = reference(q, *of_pages(kv), 0.1)
    for row, pages in enumerate(kv.pages):
        k, v = (x[: pages * PAGE] for x in full.head(row))
        k = quant.reference(k.T, bits[0], torch.float16).T if bits[0] < 16 else k
        v = quant.reference(v, bits[1], torch.float16) if bits[1] < 16 else v
        heads = slice(2 * row, 2 * row + 2)
        logits = 0.1 * (q[0, heads].double() @ k.double().T)
        want = (logits.softmax(-1) @ v.double())[None], logits.logsumexp(-1)[None]
        assert_close(errors((o[:, heads], lse[:, heads]), want), "fp32")


@pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET=1: CPU tensors run the kernels")
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_cpu_tensors_take_the_torch_path_and_keep_their_dtype(dtype: torch.dtype) -> None:
    kv = QuantKV.quantize(cache([[330, 0]], 64, dtype), 4, 4, residual=70)
    q = queries(1, 6, 64, dtype)
    o, lse = decode_quantised(q, kv, 0.125)
    want_o, want_lse = kv.attend(q[:, :, None], 0.125)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(o, want_o[:, :, 0])
    assert torch.equal(lse, want_lse[:, :, 0])
    rest = queries(1, 6, 64, dtype), torch.zeros(1, 6)
    o, lse = decode_pages(q, *of_pages(kv), 0.125, rest=rest)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(o[:, 3:], rest[0][:, 3:])  # a head without a page takes the rest as it is


BAD: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "q axes": ({"q": lambda q: q[0]}, r"q must have 3 axes, got shape \(4, 64\)"),
    "head dim": ({"q": lambda q: q[..., :40]}, r"multiple of 16 up to 256, got \(1, 4, 40\)"),
    "double": ({"q": Tensor.double}, "q must be one of .* got torch.float64"),
    "other dim": ({"q": lambda q: q[..., :48].contiguous()}, r"k of 4 bits must be .* for q \(1, 4, 48\)"),
    "scale dtype": ({"q": Tensor.bfloat16}, r"k of 4 bits must be .*torch.bfloat16\), .*got .*torch.float16\)"),
    "layout": ({"k": lambda k: replace(k, words=k.words.mT.contiguous().mT)}, "words of k must be contiguous"),
    "pages of v": ({"v": lambda v: Pool(v.bits, *(t[:1] for t in v.tensors))}, r"as many pages, got \(5, .* and \(1,"),
    "table dtype": ({"table": Tensor.long}, "must be torch.int32, got torch.int64"),
    "group": ({"q": lambda q: q[:, :3]}, r"Hkv a divisor of 3, got \(1, 2, 5\)"),
    "lens shape": ({"lens": lambda n: n[:, :1]}, r"lens must be \(1, 2\) as table, got \(1, 1\)"),
    "lens beyond": ({"lens": lambda n: n + 64}, r"0 to 5 whole pages, got \[\[384, 64\]\] for \(1, 2, 5\)"),
    "part of a page": ({"newest": lambda n: n + 1}, r"whole pages, got \[\[319, -1\]\]"),
    "device": ({"lens": lambda n: n.to("meta")}, "lens must be on q's device, cpu, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_with_its_shape(case: str) -> None:
    kv = QuantKV.quantize(cache([[330, 0]], 64, torch.float32), 4, 4, residual=0)
    args = dict(zip(("k", "v", "table", "lens", "newest"), of_pages(kv), strict=True))
    args["q"] = queries(1, 4, 64, torch.float32)
    changes, message = BAD[case]
    args |= {name: change(args[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        decode_pages(**args, scaling=0.125)


def test_a_bad_rest_a_bad_split_count_and_bad_rows_are_refused() -> None:
    kv = QuantKV.quantize(cache([[330, 0]], 64, torch.float32), 4, 4, residual=0)
    q = queries(1, 4, 64, torch.float32)
    with pytest.raises(ValueError, match="splits must be 1 to 128, got 129"):
        decode_pages(q, *of_pages(kv), 0.1, splits=129)
    with pytest.raises(ValueError, match=r"rest must be o \(1, 4, 64\) and lse \(1, 4\) float32, got .*\(1, 2\)"):
        decode_pages(q, *of_pages(kv), 0.1, rest=(q, torch.zeros(1, 2)))
    with pytest.raises(ValueError, match=r"H a multiple of 2, got \(1, 3, 64\)"):
        decode_quantised(q[:, :3], kv, 0.1)


# A launch of every head_dim, dtype and pair of gated bits.
LAUNCHES = """
from lceval.kernels import merge, quant_decode
from lceval.kernels.quant import Pool

def pool(bits, dim, dtype, keys):
    if bits == 16:
        return Pool(16, torch.empty(5, 64, dim, dtype=dtype))
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    words, group = ((2 * bits, dim), (2, dim)) if keys else ((64, -(-dim * bits // 32)), (64, -(-dim // 32)))
    return Pool(bits, torch.empty(5, *words, dtype=torch.int32), *(torch.empty(5, *group, dtype=stored) for _ in "sz"))

merge.merge = lambda *args: None
gated = quant_decode.GATED_BITS
cases = [(name, dim, dim, bits, None) for name, dim in variant.head_dims() for bits in gated[name]]
for name, dim, value_dim, bits, cap in [*cases, ("bf16", 256, 256, (4, 4), 50.0), ("bf16", 192, 128, (4, 4), None)]:
    dtype = variant.TORCH[name]
    k, v = pool(bits[0], dim, dtype, True), pool(bits[1], value_dim, dtype, False)
    for batch, kv_heads, group, pages in [(1, 1, 1, 1), (1, 8, 4, 16), (2, 4, 3, 17), (2, 16, 8, 33)]:
        q = torch.empty(batch, kv_heads * group, dim, dtype=dtype)
        table, lens = (torch.zeros(batch, kv_heads, *x, dtype=torch.int32) for x in ((pages,), ()))
        for splits in (1, 2, 16, 17):
            quant_decode._launch(q, k, v, table, lens, lens, 0.1, cap, None, splits)
report(quant_decode.variants())
"""


def test_launches_are_of_gated_variants_and_a_growing_cache_needs_no_new_one() -> None:
    result = interpreter.recorded_launches(LAUNCHES)
    assert [row for row in result["launched"] if row not in result["gated"]] == []
    assert len(result["launched"]) == len(result["gated"])


if __name__ == "__main__":
    interpreter.main(CASES)
