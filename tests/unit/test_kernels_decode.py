"""Decode attention: the reference against torch's own attention, the kernels against the reference.

The cases run in a child process under Triton's interpreter (tests/interpreter.py) and return the errors that they
measure; each test compares those of one case with the tolerance.
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

from lceval.kernels import fp8, launch
from lceval.kernels.decode import choose_splits, decode, reference
from lceval.kernels.paged import PAGE

Cache = tuple[Tensor, Tensor, Tensor, Tensor]
LENGTHS = [0, 1, 15, 17, 63, 64, 65, 259]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest error measured over all cases, relative to the largest output of the same head: fp32 2.4e-6 (sums in
# another order), fp16 6.2e-4 (p and o rounded to 11 bits), bf16 3.6e-3 in the interpreter, which computes in
# float32 (o rounded to 8 bits).
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 5e-3}
# lse is float32 whatever q is; measured 2.9e-6.
LSE_TOLERANCE = 1e-5


def ragged(lens: list[list[int]], dim: int, dtype: torch.dtype, seed: int = 0, *, value_dim: int = 0) -> Cache:
    """k, v, table, lens of a cache in shuffled pages; slots and pages that the kernel must not read are NaN."""
    rng = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lens, dtype=torch.int32)
    used = -(-counts // PAGE)
    spare = 2
    pool = int(used.sum()) + spare
    k, v = (torch.full((pool, PAGE, width), math.nan, dtype=dtype) for width in (dim, value_dim or dim))
    order = torch.randperm(pool, generator=rng).int()
    table = torch.zeros(*counts.shape, int(used.max()), dtype=torch.int32)
    first = 0
    for row, n in zip(table.flatten(0, 1), counts.flatten().tolist(), strict=True):
        pages = order[first : first + -(-n // PAGE)]
        first += len(pages)
        row[: len(pages)] = pages
        for i, page in enumerate(pages.tolist()):
            kept = min(PAGE, n - i * PAGE)
            k[page, :kept] = torch.randn(kept, dim, generator=rng).to(dtype)
            v[page, :kept] = torch.randn(kept, v.shape[2], generator=rng).to(dtype)
    return k, v, table, counts


def queries(batch: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, heads, dim, generator=torch.Generator().manual_seed(1)).to(dtype)


def errors(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The largest error of o, relative to its head, and of lse; NaN where an empty head is not 0 and -inf."""
    (o, lse), (want_o, want_lse) = got, want
    empty = torch.isneginf(want_lse)
    if not torch.equal(torch.isneginf(lse), empty) or o[empty].any() or want_o[empty].any():
        return {"o": math.nan, "lse": math.nan}
    scale = want_o.float().abs().amax(-1).masked_fill(empty, 1.0)
    worst = (o.float() - want_o.float()).abs().amax(-1) / scale
    worst_lse = torch.where(empty, 0.0, (lse - want_lse).abs())
    return {"o": worst.max().item(), "lse": worst_lse.max().item()}


# --- cases: run in the child process ------------------------------------------------------------------------


def grid_case(dtype: str, batch: int, group: int, dim: int, pool: str = "", device: str = "cpu") -> dict[str, float]:
    lens = torch.tensor(LENGTHS).view(batch, -1)
    k, v, table, counts = ragged(lens.tolist(), dim, DTYPES[dtype])
    cache = (fp8.encode(k), fp8.encode(v), table, counts) if pool == "fp8" else (k, v, table, counts)
    q = queries(batch, lens.shape[1] * group, dim, DTYPES[dtype])
    o, lse = decode(*(x.to(device) for x in (q, *cache)), dim**-0.5, splits=3)
    return errors((o.cpu(), lse.cpu()), reference(q, *cache, dim**-0.5))


def variant_case(
    dtype: str,
    dim: int,
    value_dim: int,
    cap: float | None = None,
    latent: bool = False,
    codes: bool = False,
    device: str = "cpu",
) -> dict[str, float]:
    """What models other than Llama have: capped logits, keys wider or narrower than values, latents."""
    k, v, table, lens = ragged([LENGTHS], dim, DTYPES[dtype], value_dim=value_dim)
    k, v = (fp8.encode(x) if codes else x for x in (k, v))
    k, v = (x.to(device) for x in (k, v))
    cache = (k, k[..., :value_dim] if latent else v, table.to(device), lens.to(device))
    # Logits up to about 4, twice the smallest cap.
    q = (2 * queries(1, 3 * len(LENGTHS), dim, DTYPES[dtype])).to(device)
    o, lse = decode(q, *cache, dim**-0.5, cap, splits=3)
    return errors((o.cpu(), lse.cpu()), tuple(x.cpu() for x in reference(q, *cache, dim**-0.5, cap)))


def splits_case(splits: int) -> dict[str, float]:
    cache = ragged([[300, 0]], 64, torch.float32)
    q = queries(1, 6, 64, torch.float32)
    return errors(decode(q, *cache, 0.125, splits=splits), decode(q, *cache, 0.125, splits=1))


def permuted_case() -> dict[str, float]:
    """The slots of every head in another order, across its pages."""
    k, v, table, lens = ragged([[300, 65, 0, 1]], 64, torch.float32)
    q = queries(1, 12, 64, torch.float32)
    before = decode(q, k, v, table, lens, 0.125, splits=3)
    for row, n in zip(table[0], lens[0].tolist(), strict=True):
        pages = row[: -(-n // PAGE)]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
        for pool in (k, v):
            slots = pool[pages].flatten(0, 1)
            slots[:n] = slots[:n][order]
            pool[pages] = slots.view(-1, PAGE, 64)
    return errors(decode(q, k, v, table, lens, 0.125, splits=3), before)


def strided_case() -> dict[str, float]:
    """K and V side by side in one pool, q cut from a longer tensor, one cache that all sequences share."""
    k, v, table, lens = ragged([[130, 7]], 64, torch.float32)
    pool = torch.stack([k, v], 1)
    q = queries(3, 8, 128, torch.float32)[:, ::2, :64]
    args = (q, pool[:, 0], pool[:, 1], table.expand(3, -1, -1), lens.expand(3, -1), 0.125)
    return errors(decode(*args, splits=2), reference(*args))


def empty_case() -> dict[str, float]:
    """Every head is empty, and so is the pool."""
    pool, lens = torch.empty(0, PAGE, 64), torch.zeros(2, 3, dtype=torch.int32)
    args = (queries(2, 9, 64, torch.float32), pool, pool, lens[..., None][..., :0], lens, 0.125)
    return errors(decode(*args), reference(*args))


def codes_case() -> dict[str, float]:
    """Every finite 8-bit float as a value: over a single slot the output is the value."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN
    pool = torch.zeros(1, PAGE, 256, dtype=torch.uint8)
    pool[0, 0] = codes
    table, lens = torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32)
    q = torch.zeros(1, 1, 256)
    o, lse = decode(q, torch.zeros_like(pool), pool, table, lens, 0.125)
    exact = fp8.decode(codes)
    return {"o": 0.0 if torch.equal(o[0, 0], exact) else math.inf, "lse": float(lse.abs().max())}


def hypothesis_case() -> dict[str, float]:
    """The largest errors over shapes drawn by hypothesis."""
    worst = {"o": 0.0, "lse": 0.0}

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(
        lens=st.lists(st.lists(st.integers(0, 200), min_size=2, max_size=2), min_size=1, max_size=2),
        group=st.integers(1, 18),
        dim=st.sampled_from([16, 48, 64]),
        splits=st.one_of(st.none(), st.integers(1, 7)),
        scaling=st.floats(0.01, 1.0),
    )
    def run(lens: list[list[int]], group: int, dim: int, splits: int | None, scaling: float) -> None:
        cache = ragged(lens, dim, torch.float32)
        q = queries(len(lens), 2 * group, dim, torch.float32)
        # The tolerances are for logits scaled by 1 / sqrt(D): float32 errors grow with the logits.
        size = max(1.0, scaling * dim**0.5)
        absolute = errors(decode(q, *cache, scaling, splits=splits), reference(q, *cache, scaling))
        error = {name: value / size for name, value in absolute.items()}
        assert error["o"] <= TOLERANCE["fp32"], error
        assert error["lse"] <= LSE_TOLERANCE, error
        worst.update({name: max(worst[name], error[name]) for name in worst})

    run()
    return worst


# Every dtype with every G and D; B alternates, so that it meets each of those.
PAIRS = [
    (dtype, 1 + (i + j + k) % 2, group, dim)
    for (i, dtype), (j, group), (k, dim) in product(
        enumerate(["fp32", "fp16"]), enumerate([1, 3, 4, 8]), enumerate([64, 128])
    )
]
# A padded and the widest head_dim, more query heads than one tile, bfloat16 (float32 arithmetic in the interpreter).
ODD = [
    *[("fp32", 1, 4, 96), ("fp16", 1, 4, 96), ("fp32", 1, 2, 256), ("fp16", 1, 2, 256)],
    *[("fp32", 1, 17, 64), ("fp16", 2, 17, 64), ("bf16", 1, 4, 64), ("bf16", 2, 3, 128)],
]
CODES = [(*case, "fp8") for case in [("fp32", 1, 4, 64), ("fp16", 2, 3, 128), ("bf16", 1, 4, 96), ("fp16", 1, 17, 64)]]
GRID: dict[str, tuple[str, int, int, int] | tuple[str, int, int, int, str]] = {
    "-".join([interpreter.LABELS[case[0]], f"B{case[1]}", f"G{case[2]}", f"D{case[3]}", *case[4:]]): case
    for case in (*PAIRS, *ODD, *CODES)
}
VARIANTS: dict[str, tuple[Any, ...]] = {
    "cap-D64": ("fp32", 64, 64, 2.0),
    "cap-D128": ("fp16", 128, 128, 2.0),
    "cap-fp8": ("fp32", 64, 64, 2.0, False, True),
    "D48-E32": ("fp32", 48, 32),
    "D192-E128": ("fp16", 192, 128),
    "D192-E128-fp8": ("fp16", 192, 128, None, False, True),
    "D80-E144": ("fp32", 80, 144),
    "latent-D48-E32": ("fp32", 48, 32, None, True),
    "latent-D576-E512": ("fp16", 576, 512, None, True),
    "latent-D576-E512-cap": ("fp32", 576, 512, 2.0, True),
    "latent-D576-E512-fp8": ("fp16", 576, 512, None, True, True),
}
PROPERTIES: dict[str, Callable[[], dict[str, float]]] = {
    **{f"splits={n}": partial(splits_case, n) for n in (2, 5, 16, 128)},
    "permuted": permuted_case,
    "strided": strided_case,
    "empty": empty_case,
    "codes": codes_case,
    "hypothesis": hypothesis_case,
}


CASES: dict[str, Callable[[], dict[str, float]]] = {
    **{n: partial(grid_case, *c) for n, c in GRID.items()},
    **{n: partial(variant_case, *c) for n, c in VARIANTS.items()},
    **PROPERTIES,
}


# --- tests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*GRID, *VARIANTS])
def test_kernels_agree_with_the_reference(case: str, interpreted: Callable[[str], dict[str, float]]) -> None:
    error = interpreted(case)
    assert error["o"] <= TOLERANCE[(GRID | VARIANTS)[case][0]]
    assert error["lse"] <= LSE_TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [*GRID, *VARIANTS])
def test_compiled_kernels_agree_with_the_reference(case: str) -> None:
    error = CASES[case](device="cuda")  # type: ignore[call-arg]
    assert error["o"] <= TOLERANCE[(GRID | VARIANTS)[case][0]]
    assert error["lse"] <= LSE_TOLERANCE


@pytest.mark.parametrize("case", PROPERTIES)
def test_kernels_keep_their_properties(case: str, interpreted: Callable[[str], dict[str, float]]) -> None:
    error = interpreted(case)
    assert error["o"] <= TOLERANCE["fp32"]
    assert error["lse"] <= LSE_TOLERANCE


@given(st.lists(st.integers(0, 200), min_size=4, max_size=4), st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=30)
def test_reference_is_torch_attention_over_the_kept_slots(lens: list[int], group: int) -> None:
    k, v, table, counts = ragged([lens[:2], lens[2:]], 32, torch.float32)
    q = queries(2, 2 * group, 32, torch.float32)
    o, lse = reference(q, k, v, table, counts, 0.2)
    for b, h in product(range(2), range(2 * group)):
        n = int(counts[b, h // group])
        pages = table[b, h // group]
        keys, values = (pool[pages].flatten(0, 1)[:n] for pool in (k, v))
        if n == 0:
            assert not o[b, h].any()
            assert torch.isneginf(lse[b, h])
            continue
        want = sdpa(q[b, None, h, None], keys[None], values[None], scale=0.2)
        # Two float32 orders of summation; measured 6e-7 at outputs of about 1.
        torch.testing.assert_close(o[b, h], want.flatten(), rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(lse[b, h], (keys @ q[b, h] * 0.2).exp().sum().log(), rtol=1e-5, atol=5e-6)


@given(n=st.integers(1, 200), data=st.data())
@settings(deadline=None, max_examples=30)
def test_reference_split_at_a_page_and_merged_equals_the_whole(n: int, data: st.DataObject) -> None:
    k, v, table, lens = ragged([[n]], 32, torch.float32)
    q = queries(1, 2, 32, torch.float32)
    cut = data.draw(st.integers(0, -(-n // PAGE)))
    head = torch.tensor([[min(n, cut * PAGE)]], dtype=torch.int32)
    parts = [
        reference(q, k, v, table, head, 0.2),
        reference(q, k, v, table[:, :, cut:], lens - head, 0.2),
    ]
    lses = torch.stack([lse for _, lse in parts])
    weights = lses.softmax(0)[..., None]
    merged = (weights * torch.stack([o for o, _ in parts])).sum(0), lses.logsumexp(0)
    error = errors(merged, reference(q, k, v, table, lens, 0.2))
    assert error["o"] <= TOLERANCE["fp32"]
    assert error["lse"] <= LSE_TOLERANCE


@pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET=1: CPU tensors run the kernels")
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_cpu_tensors_take_the_reference_and_keep_their_dtype(dtype: torch.dtype) -> None:
    cache = ragged([[100, 0]], 64, dtype)
    q = queries(1, 6, 64, dtype)
    o, lse = decode(q, *cache, 0.125)
    want_o, want_lse = reference(q, *cache, 0.125)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(o, want_o.to(dtype))
    assert torch.equal(lse, want_lse)


BAD: dict[str, tuple[dict[str, Callable[[Tensor], Tensor]], str]] = {
    "q axes": ({"q": lambda q: q[:, None]}, r"q must have 3 axes, got shape \(1, 1, 4, 64\)"),
    "head dim": ({"q": lambda q: q[..., :60]}, r"multiple of 16 up to 256, got \(1, 4, 60\)"),
    "dtypes": ({"q": Tensor.half}, "q, k, v must share .* got torch.float16"),
    "double": ({"q": Tensor.double, "k": Tensor.double, "v": Tensor.double}, "got torch.float64"),
    "page size": ({"k": lambda k: k[:, :32]}, r"must be \[P, 64, 64\] and .*, got \(4, 32, 64\)"),
    "value dim": ({"v": lambda v: v[..., :60]}, r"multiple of 16 up to 256, .* and values of 60"),
    "v shape": ({"v": lambda v: v[:1]}, r"got \(4, 64, 64\) and \(1, 64, 64\)"),
    "table dtype": ({"table": Tensor.long}, "table and lens must be torch.int32, got torch.int64"),
    "table batch": ({"table": lambda t: t.repeat(2, 1, 1)}, r"must be \[1, Hkv, M\].*got \(2, 2, 2\)"),
    "group": ({"q": lambda q: q[:, :3]}, r"Hkv a divisor of 3, got \(1, 2, 2\)"),
    "lens shape": ({"lens": lambda n: n[:, :1]}, r"lens must be \(1, 2\) as table, got \(1, 1\)"),
    "lens beyond": ({"lens": lambda n: n + 64}, r"lens must be 0 to 128, .* got \[\[164, 64\]\]"),
    "lens below": ({"lens": lambda n: n - 1}, r"got \[\[99, -1\]\]"),
    "layout": ({"k": lambda k: k.mT}, "last axis of k must be contiguous"),
    "device": ({"k": lambda k: k.to("meta")}, "k must be on q's device, cpu, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_with_its_shape(case: str) -> None:
    changes, message = BAD[case]
    k, v, table, lens = ragged([[100, 0]], 64, torch.float32)
    args = {"q": queries(1, 4, 64, torch.float32), "k": k, "v": v, "table": table, "lens": lens}
    args |= {name: change(args[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        decode(args["q"], args["k"], args["v"], args["table"], args["lens"], 0.125)


@pytest.mark.parametrize("splits", [0, 129])
def test_a_bad_split_count_is_refused(splits: int) -> None:
    cache = ragged([[100, 0]], 64, torch.float32)
    with pytest.raises(ValueError, match=f"splits must be 1 to 128, got {splits}"):
        decode(queries(1, 4, 64, torch.float32), *cache, 0.125, splits=splits)


@given(st.integers(1, 4096), st.integers(0, 1 << 15), st.integers(1, 256))
def test_split_count_fills_the_device_but_leaves_two_pages_each(rows: int, pages: int, sms: int) -> None:
    splits = choose_splits(rows, pages, sms)
    assert 1 <= splits <= 128
    assert splits == 1 or pages // splits >= 2
    if rows * splits < 4 * sms:
        assert splits in (1, pages // 2, 128)


def test_without_triton_the_module_imports_and_only_a_kernel_call_fails() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from lceval.kernels import launch, decode as module
args = torch.ones(1, 2, 64), *torch.ones(2, 1, 64, 64), *torch.zeros(2, 1, 1, 1).int()
args = *args[:4], args[4][0], 1.0
print(*module.decode(*args)[1].shape)
launch.INTERPRETED = True  # selects the kernels, as a CUDA tensor does
module.decode(*args)
"""
    child = interpreter.python("-W", "error", "-c", code)
    assert child.stdout == "1 2\n", child.stderr
    assert "RuntimeError: decode on cpu needs the package triton, which is not installed" in child.stderr


if __name__ == "__main__":
    interpreter.main(CASES)
