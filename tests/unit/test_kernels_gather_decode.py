"""Attention over selected slots: the kernel against its reference, and a decode step against `Selective.attend`.

The cases run in a child process under Triton's interpreter (tests/interpreter.py) and return the errors that they
measure.
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

from lceval.kernels import launch
from lceval.kernels.bits import Bits
from lceval.kernels.bounds import Bounds
from lceval.kernels.decode import reference as whole_reference
from lceval.kernels.gather_decode import decode_selected, gather_decode, reference
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.quant import QuantKV
from lceval.kernels.select import Selective, indexed_keys

Case = dict[str, Any]
LENGTHS = [0, 1, 15, 17, 63, 64, 65, 259]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest error over all cases, relative to the largest output of the same head: measured fp32 1.1e-6 (sums in another
# order), fp16 6.5e-4 (p and o rounded to 11 bits), bf16 3.7e-3 in the interpreter, which
# computes in float32 (o rounded to 8 bits).
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 5e-3}
# A GPU rounds p to bfloat16, the interpreter does not; not measured on a GPU yet.
GPU_TOLERANCE = TOLERANCE | {"bf16": 1e-2}
# lse is float32 whatever q is; measured 1.5e-6.
LSE_TOLERANCE = 1e-5


def cache(lens: list[list[int]], dim: int, dtype: torch.dtype, seed: int = 0, *, value_dim: int = 0) -> PagedKV:
    """Heads that keep `lens` slots of one context, in order."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lens)
    shape = (*counts.shape, max(1, int(counts.max())))
    k, v = (torch.randn(*shape, width, generator=generator).to(dtype) for width in (dim, value_dim or dim))
    return PagedKV.gather(k, v, torch.rand(shape, generator=generator).argsort(-1).argsort(-1) < counts[..., None])


def shuffled(kv: PagedKV, device: str = "cpu") -> PagedKV:
    """The same slots with the pages in another order and two spare ones; what must not be read is NaN."""
    pages = len(kv.k) + 2
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(3))[: len(kv.k)]
    k, v = (torch.full((pages, *pool.shape[1:]), math.nan, dtype=pool.dtype) for pool in (kv.k, kv.v))
    k[order], v[order] = kv.k, kv.v
    table = torch.zeros_like(kv.table)
    for row, own, n in zip(table.flatten(0, 1), kv.table.flatten(0, 1), kv.counts, strict=True):
        used = -(-n // PAGE)
        row[:used] = order[own[:used].long()].int()
        if n % PAGE:
            k[row[used - 1], n % PAGE :] = math.nan
            v[row[used - 1], n % PAGE :] = math.nan
    k, v, table, lens = (t.to(device) for t in (k, v, table, kv.lens))
    return replace(kv, k=k, v=v, table=table, lens=lens, positions=None)


def queries(rows: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, heads, dim, generator=torch.Generator().manual_seed(1)).to(dtype)


def choose(kv: PagedKV, rows: int, unit: int, count: int) -> Tensor:
    """Random ascending units [rows, Hkv, count] of every head, padded with -1."""
    generator = torch.Generator().manual_seed(2)
    B, heads = kv.lens.shape  # noqa: N806
    chosen = torch.full((rows, heads, count), -1, dtype=torch.int32)
    for row, head in product(range(rows), range(heads)):
        units = -(-kv.counts[row // (rows // B) * heads + head] // unit)
        drawn = torch.randperm(units, generator=generator)[:count].sort().values
        chosen[row, head, : len(drawn)] = drawn.int()
    return chosen


def errors(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> Case:
    """The largest error of o, relative to its head, and of lse; NaN where an empty head is not 0 and -inf."""
    (o, lse), (want_o, want_lse) = ([x.cpu() for x in pair] for pair in (got, want))
    empty = torch.isneginf(want_lse)
    if not torch.equal(torch.isneginf(lse), empty) or o[empty].any() or want_o[empty].any():
        return {"o": math.nan, "lse": math.nan}
    scale = want_o.float().abs().amax(-1).masked_fill(empty, 1.0)
    worst = (o.float() - want_o.float()).abs().amax(-1) / scale
    return {"o": worst.max().item(), "lse": torch.where(empty, 0.0, (lse - want_lse).abs()).max().item()}


def grid_case(dtype: str, unit: int, batch: int, shared: int, group: int, dim: int, device: str = "cpu") -> Case:
    lens = torch.tensor(LENGTHS).view(batch, -1)
    kv = shuffled(cache(lens.tolist(), dim, DTYPES[dtype]))
    q = queries(batch * shared, lens.shape[1] * group, dim, DTYPES[dtype])
    args = q, kv.k, kv.v, kv.table, kv.lens, choose(kv, len(q), unit, 96 // unit), unit, 63, dim**-0.5
    on_device = [x.to(device) if isinstance(x, Tensor) else x for x in args]
    return errors(gather_decode(*on_device, splits=2), reference(*args))  # type: ignore[arg-type]


def variant_case(dtype: str, dim: int, value_dim: int, cap: float | None = None, device: str = "cpu") -> Case:
    """Capped logits, and keys and values of different widths."""
    kv = shuffled(cache([LENGTHS], dim, DTYPES[dtype], value_dim=value_dim))
    # Logits up to about 4, twice the cap.
    q = 2 * queries(2, 3 * len(LENGTHS), dim, DTYPES[dtype])
    args = q, kv.k, kv.v, kv.table, kv.lens, choose(kv, 2, 16, 6), 16, 63, dim**-0.5, cap
    on_device = [x.to(device) if isinstance(x, Tensor) else x for x in args]
    return errors(gather_decode(*on_device, splits=2), reference(*args))  # type: ignore[arg-type]


def splits_case(splits: int) -> Case:
    kv = shuffled(cache([[300, 40, 0]], 64, torch.float32))
    args = queries(2, 6, 64, torch.float32), kv.k, kv.v, kv.table, kv.lens, choose(kv, 2, 7, 20), 7, 40, 0.125
    return errors(gather_decode(*args, splits=splits), gather_decode(*args, splits=1))


def permuted_case() -> Case:
    """The chosen units in another order."""
    kv = shuffled(cache([[300, 140]], 64, torch.float32))
    q, chosen = queries(1, 6, 64, torch.float32), choose(kv, 1, 1, 90)
    args = q, kv.k, kv.v, kv.table, kv.lens
    permuted = gather_decode(*args, chosen[..., torch.randperm(90)], 1, 40, 0.125)
    return errors(permuted, gather_decode(*args, chosen, 1, 40, 0.125))


def strided_case() -> Case:
    """Values side by side with others in one pool."""
    kv = shuffled(cache([[300, 40]], 64, torch.float32))
    q, rest = queries(1, 6, 64, torch.float32), (kv.table, kv.lens, choose(kv, 1, 7, 20), 7, 40, 0.125)
    strided = gather_decode(q, kv.k, torch.stack([kv.v, kv.v], 1)[:, 0], *rest)
    return errors(strided, gather_decode(q, kv.k, kv.v, *rest))


def short_unit_case() -> Case:
    """The last unit has one slot, in a tile of its own; a tile without slots contributes nothing."""
    kv = shuffled(cache([[301]], 16, torch.float32))
    chosen = torch.tensor([[[2, -1, 3]]], dtype=torch.int32)
    args = queries(1, 2, 16, torch.float32), kv.k, kv.v, kv.table, kv.lens, chosen, 100, 99, 0.25
    return errors(gather_decode(*args, splits=3), reference(*args))


def step(
    lens: list[list[int]], shared: int, group: int, dim: int, dtype: str, unit: int, budget: int, device: str = "cpu"
) -> Case:
    """A decode step. The truth is computed in float32, where its selection depends on logits that q's dtype rounds."""
    kv = cache(lens, dim, DTYPES[dtype])
    build = Bits.build if unit == 1 else partial(Bounds.build, unit=unit)
    truth = Selective(kv, build(indexed_keys(kv, budget)), budget)
    q = queries(len(lens) * shared, len(lens[0]) * group, dim, DTYPES[dtype])
    index: Any = truth.index
    moved = {name: x.to(device) for name, x in vars(index).items() if isinstance(x, Tensor)}
    output = decode_selected(q.to(device), replace(truth, kv=shuffled(kv, device), index=replace(index, **moved)), 0.2)
    wide: Any = replace(index, bounds=index.bounds.float()) if unit > 1 else index
    truth = replace(truth, kv=replace(kv, k=kv.k.float(), v=kv.v.float()), index=wide)
    o, lse = truth.attend(q.float()[:, :, None], 0.2)
    return errors(output, (o[:, :, 0], lse[:, :, 0]))


def step_case(dtype: str, unit: int, batch: int, shared: int, device: str = "cpu") -> Case:
    lens = torch.tensor(LENGTHS).view(batch, -1).tolist()
    return step(lens, shared, 3, 64, dtype, unit, 60, device)


def hypothesis_case() -> Case:
    """The largest errors over steps drawn by hypothesis."""
    worst = {"o": 0.0, "lse": 0.0}

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(
        lens=st.lists(st.lists(st.integers(0, 200), min_size=2, max_size=2), min_size=1, max_size=2),
        shared=st.integers(1, 2),
        group=st.integers(1, 9),
        unit=st.sampled_from([1, 1, 3, 16, 130]),
        budget=st.integers(1, 150),
    )
    def run(lens: list[list[int]], shared: int, group: int, unit: int, budget: int) -> None:
        lens[0][1] = max(lens[0][1], budget + 1)
        error = step(lens, shared, group, 32, "fp32", unit, budget)
        assert_close(error, "fp32")
        worst.update({name: max(worst[name], error[name]) for name in worst})

    run()
    return worst


# Every dtype with every unit, with every G and with every D.
GRID = {
    f"{interpreter.LABELS[case[0]]}-unit{case[1]}-B{case[2]}-shared{case[3]}-G{case[4]}-D{case[5]}": case
    for case in [
        (dtype, unit, batch, shared, group, dim)
        for dtype, batch in (("fp32", 1), ("fp16", 2))
        for group, dim, unit, shared in ((1, 64, 1, 1), (3, 128, 16, 2), (4, 64, 16, 1), (8, 128, 1, 2))
    ]
    + [("fp32", 5, 1, 1, 17, 96), ("fp16", 1, 1, 1, 2, 256), ("bf16", 16, 1, 1, 4, 64), ("bf16", 1, 2, 1, 3, 128)]
}
VARIANTS: dict[str, tuple[Any, ...]] = {
    "cap-D64": ("fp32", 64, 64, 2.0),
    "cap-D128": ("fp16", 128, 128, 2.0),
    "D48-E32-cap": ("fp32", 48, 32, 2.0),
    "D192-E128": ("fp16", 192, 128),
}
STEPS = {
    f"step {case[0]}-unit{case[1]}-B{case[2]}-shared{case[3]}": case
    for case in product(["fp32", "fp16"], [1, 16], [1, 2], [1, 2])
}
PROPERTIES: dict[str, Callable[[], Case]] = {
    **{f"splits={n}": partial(splits_case, n) for n in (2, 5, 128)},
    "permuted": permuted_case,
    "strided": strided_case,
    "short unit": short_unit_case,
    "hypothesis": hypothesis_case,
}


CASES: dict[str, Callable[[], Case]] = {
    **{name: partial(grid_case, *case) for name, case in GRID.items()},
    **{name: partial(variant_case, *case) for name, case in VARIANTS.items()},
    **{name: partial(step_case, *case) for name, case in STEPS.items()},
    **PROPERTIES,
}


# Every launch of a decode step.
LAUNCHES = """
from lceval.kernels import gather_decode, scan, topk
from lceval.kernels.bits import Bits
from lceval.kernels.bounds import Bounds

for name, dims in variant.USED_HEAD_DIMS.items():
    dtype = variant.TORCH[name]
    for dim in dims:
        for rows, heads, group, tokens in [(1, 8, 4, 100), (3, 1, 1, 3000), (2, 4, 3, 70000)]:
            lens = torch.full((1, heads), tokens, dtype=torch.int32)
            q = torch.empty(rows, heads * group, dim, dtype=dtype)
            pool = torch.empty(2, 64, dim, dtype=dtype)
            table = torch.zeros(1, heads, -(-tokens // 64), dtype=torch.int32)
            keys = [torch.empty(64, dim, dtype=dtype)]
            for index in (Bits.build(keys), Bounds.build(keys, 16)):
                scores, sizes = scan._launch(q, index, lens, tokens, 50, 0.1)
                chosen = topk._launch(scores.flatten(0, 1), sizes.flatten(), 48 // index.unit)
                chosen = chosen.view(rows, heads, -1)
                for splits in (1, 16, 17):
                    gather_decode._launch(q, pool, pool, table, lens, chosen, index.unit, 50, 0.1, None, splits)
report(v for module in (scan, topk, gather_decode) for v in module.variants())
"""


def assert_close(error: Case, dtype: str, tolerance: dict[str, float] = TOLERANCE) -> None:
    assert error["o"] <= tolerance[dtype], error
    assert error["lse"] <= LSE_TOLERANCE, error


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_reference(case: str, interpreted: Callable[[str], Case]) -> None:
    dtypes = {name: str(row[0]) for name, row in [*GRID.items(), *VARIANTS.items(), *STEPS.items()]}
    assert_close(interpreted(case), dtypes.get(case, "fp32"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*GRID, *STEPS])
def test_kernels_agree_with_the_reference_on_a_gpu(case: str, dtype: str) -> None:
    if case in GRID:
        assert_close(grid_case(dtype, *GRID[case][1:], device="cuda"), dtype, GPU_TOLERANCE)
    else:
        assert_close(step_case(dtype, *STEPS[case][1:], device="cuda"), dtype, GPU_TOLERANCE)


def test_launches_are_of_gated_variants_for_every_context_length() -> None:
    result = interpreter.recorded_launches(LAUNCHES)
    launched = [row for row in result["launched"] if row[0] != "merge_kernel"]  # decode's
    assert [row for row in launched if row not in result["gated"]] == []
    assert {row[0] for row in launched} == {row[0] for row in result["gated"]}


@given(st.lists(st.integers(0, 200), min_size=2, max_size=4), st.sampled_from([1, 3, 16]))
@settings(deadline=None, max_examples=30)
def test_reference_over_every_unit_is_attention_over_the_whole(lens: list[int], unit: int) -> None:
    kv = shuffled(cache([lens], 32, torch.float32))
    q = queries(1, 2 * len(lens), 32, torch.float32)
    chosen = choose(kv, 1, unit, max(1, -(-max(lens) // unit)))
    for budget in (0, 100):
        error = errors(
            reference(q, kv.k, kv.v, kv.table, kv.lens, chosen, unit, budget, 0.2),
            whole_reference(q, kv.k, kv.v, kv.table, kv.lens, 0.2),
        )
        assert_close(error, "fp32")


@pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET=1: CPU tensors run the kernels")
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_cpu_tensors_take_the_torch_path_and_keep_their_dtype(dtype: torch.dtype) -> None:
    kv = cache([[100, 0]], 64, dtype)
    q = queries(3, 6, 64, dtype)
    selective = Selective(kv, Bits.build(indexed_keys(kv, 10)), 10)
    o, lse = decode_selected(q, selective, 0.125)
    want_o, want_lse = selective.attend(q[:, :, None], 0.125)
    assert o.dtype == dtype
    assert torch.equal(o, want_o[:, :, 0])
    assert torch.equal(lse, want_lse[:, :, 0])
    args = q, kv.k, kv.v, kv.table, kv.lens, choose(kv, 3, 1, 10), 1, 10, 0.125
    assert torch.equal(gather_decode(*args)[0], reference(*args)[0].to(dtype))


def test_a_quantized_cache_is_refused() -> None:
    kv = cache([[300]], 64, torch.float32)
    selective = Selective(QuantKV.quantize(kv, 4, 4), Bits.build(indexed_keys(kv, 10)), 10)
    with pytest.raises(TypeError, match="decode_selected reads a PagedKV by Bits or Bounds, got QuantKV by Bits"):
        decode_selected(queries(1, 2, 64, torch.float32), selective, 0.125)


BAD: dict[str, tuple[Case, str]] = {
    "q axes": ({"q": lambda q: q[:, None]}, r"q must have 3 axes, got shape \(2, 1, 4, 64\)"),
    "head dim": ({"q": lambda q: q[..., :60]}, r"multiple of 16 up to 256, got \(2, 4, 60\)"),
    "dtypes": ({"q": Tensor.half}, "q, k, v must share .* got torch.float16"),
    "page size": ({"k": lambda k: k[:, :32]}, r"must be \[P, 64, 64\] and .*, got \(4, 32, 64\)"),
    "group": ({"q": lambda q: q[:, :3]}, r"Hkv of 3, got \(1, 2\)"),
    "table": ({"table": lambda t: t[:, :1]}, r"table must be \[1, 2, M\] as lens, got \(1, 1, 2\)"),
    "chosen": ({"chosen": lambda c: c[:1]}, r"chosen must be \[2, 2, C\], C at least 1, got \(1, 2, 10\)"),
    "chosen none": ({"chosen": lambda c: c[..., :0]}, r"got \(2, 2, 0\)"),
    "chosen dtype": ({"chosen": Tensor.long}, "must be torch.int32, got torch.int32, torch.int32, torch.int64"),
    "chosen layout": ({"chosen": lambda c: c.mT.contiguous().mT}, "last axis of chosen must be contiguous"),
    "lens layout": ({"lens": lambda n: n.expand(2, -1), "table": lambda t: t.expand(2, -1, -1)}, "got strides"),
    "device": ({"k": lambda k: k.to("meta")}, "k must be on q's device, cpu, got meta"),
    "unit": ({"unit": lambda _: 0}, "unit must be at least 1 and budget at least 0, got 0 and 40"),
    "splits": ({"splits": lambda _: 129}, "splits must be 1 to 128, got 129"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused_with_its_shape(case: str) -> None:
    changes, message = BAD[case]
    kv = shuffled(cache([[100, 0]], 64, torch.float32))
    args: Case = {"q": queries(2, 4, 64, torch.float32), "k": kv.k, "v": kv.v, "table": kv.table, "lens": kv.lens}
    args |= {"chosen": choose(kv, 2, 1, 10), "unit": 1, "budget": 40, "scaling": 0.125, "splits": None}
    args |= {name: change(args[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        gather_decode(**args)


if __name__ == "__main__":
    interpreter.main(CASES)
