"""One launch a decoding step: the kernel against the definition, over several contexts, tails and steps.

The cases run in a child process under Triton's interpreter (tests/interpreter.py), as those of test_kernels_decode.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import interpreter
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels_decode import DTYPES, TOLERANCE, ragged

from lceval.kernels import fp8, step
from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.launch import BLOCK_G
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.quant import Pool, QuantKV
from lceval.kernels.queue import TAIL_SPAN, Workspace, items_of
from lceval.kernels.softmax import Softmax

# Kept slots of each KV head of three contexts, of which the last has no tokens.
CONTEXTS = [(0, 1, 65, 130), (330, 64, 17, 0), ()]
OWNERS = (0, 0, 0, 1, 2)
PADS = (0, 3, 70, 0, 5)
# Tokens of each row's context in a layer with a window, of which it keeps the last.
TOKENS = (200, 90, 33, 0, 130)
# Tokens in the tails: none, past the longest padding, past a whole item.
LENGTHS = (0, 72, TAIL_SPAN + 20)


def context(counts: Sequence[int], dim: int, value_dim: int, dtype: torch.dtype, seed: int, latent: bool) -> PagedKV:
    if not counts:
        return PagedKV.empty(torch.empty(0, dtype=dtype))
    k, v, table, lens = ragged([list(counts)], dim, dtype, seed, value_dim=value_dim)
    return PagedKV(k, k[..., :value_dim] if latent else v, table, lens, None, tuple(counts))


def step_case(
    dtype: str,
    group: int,
    dim: int,
    value_dim: int = 0,
    cap: float | None = None,
    sinks: bool = False,
    latent: bool = False,
    codes: str = "",
    window: int = 0,
    chunked: bool = False,
    device: str = "cpu",
) -> dict[str, float]:
    """The largest error over steps at several lengths of the tails, by one queue, and whether the tokens were kept."""
    number, value_dim = DTYPES[dtype], value_dim or dim
    kv_heads, rows = len(CONTEXTS[0]), len(OWNERS)
    rng = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(number).to(device)

    contexts: list[Any] = [context(n, dim, value_dim, number, i, latent) for i, n in enumerate(CONTEXTS)]
    if codes:
        stored = STORED[codes]
        contexts = [stored(kv) for kv in contexts if kv.counts]
    owners, pads = (OWNERS[:4], PADS[:4]) if codes else (OWNERS, PADS)
    seen = None
    if window:
        owners = tuple(range(len(TOKENS)))
        slots = [tokens % window if chunked else min(tokens, window - 1) for tokens in TOKENS]
        contexts = [context((n,) * kv_heads if n else (), dim, value_dim, number, n, latent) for n in slots]
        starts, origins = (torch.tensor(TOKENS) - torch.tensor(x) for x in (pads, slots))
        seen = step.Window(window, chunked, starts.to(device), origins.to(device))
    rows, heads = len(owners), group * kv_heads
    contexts = [moved(kv, device) for kv in contexts]
    columns = 2 * TAIL_SPAN
    keys = torch.full((rows, kv_heads, columns, dim), math.nan, dtype=number, device=device)
    values = keys[..., :value_dim] if latent else keys.new_full((*keys.shape[:3], value_dim), math.nan)
    softmax = Softmax(dim**-0.5, cap, random(heads) if sinks else None)
    queue = Workspace().queue(contexts, owners, (keys, values), heads)
    on_device = torch.tensor(pads, device=device)
    worst, kept = 0.0, 1.0
    for length in LENGTHS:
        for row, pad in enumerate(pads):
            written = slice(pad, max(pad, length))
            keys[row, :, written] = random(kv_heads, written.stop - pad, dim)
            if not latent:
                values[row, :, written] = random(kv_heads, written.stop - pad, value_dim)
        q, k = (2 * random(rows, heads, 1, dim)), random(rows, kv_heads, 1, dim)
        v = k[..., :value_dim] if latent else random(rows, kv_heads, 1, value_dim)
        want = step.reference(
            q[:, :, 0].cpu(), k[:, :, 0].cpu(), v[:, :, 0].cpu(), (keys.cpu(), values.cpu()), length, pads,
            [moved(contexts[owner], "cpu") for owner in owners], Softmax(dim**-0.5, cap, cpu(softmax.sink)), seen,
        )  # fmt: skip
        place = torch.tensor([length], dtype=torch.int32, device=device)
        o = step.attend(q, k, v, (keys, values), place, on_device, queue, softmax, seen)
        error = (o[:, :, 0].cpu().float() - want).abs().amax(-1) / want.abs().amax(-1)
        worst = max(worst, error.max().item())
        appended = torch.equal(keys[:, :, length], k[:, :, 0]) and torch.equal(values[:, :, length], v[:, :, 0])
        kept = min(kept, float(appended and not queue.arrived.any()))
    return {"o": worst, "kept": kept}


def in_fp8(kv: PagedKV) -> Fp8KV:
    pages = PagedKV(fp8.encode(kv.k), fp8.encode(kv.v), kv.table, kv.lens, None, kv.counts)
    scales = torch.tensor([[0.5, 1.0, 2.0, 0.25]])
    return Fp8KV(pages, scales, scales.flip(1), kv.k.dtype)


STORED: dict[str, Callable[[PagedKV], Any]] = {
    "fp8": in_fp8,
    **{f"kv{k}v{v}": partial(QuantKV.quantize, k_bits=k, v_bits=v, residual=40) for k, v in ((4, 4), (8, 2), (16, 4))},
}


def cpu(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.cpu()


def moved(kv: Any, device: str) -> Any:
    if isinstance(kv, QuantKV):
        k, v = (Pool(x.bits, *(y.to(device) for y in x.tensors)) for x in (kv.k, kv.v))
        residual, table = moved(kv.residual, device), kv.table.to(device)
        return QuantKV(k, v, table, kv.pages, None, residual, kv.lens.to(device), kv.counts)
    if isinstance(kv, Fp8KV):
        return Fp8KV(moved(kv.kv, device), kv.k_scale.to(device), kv.v_scale.to(device), kv.dtype)
    k = kv.k.to(device)
    v = k[..., : kv.v.shape[-1]] if kv.v.data_ptr() == kv.k.data_ptr() else kv.v.to(device)
    return PagedKV(k, v, kv.table.to(device), kv.lens.to(device), None, kv.counts)


CASES: dict[str, Callable[[], dict[str, float]]] = {
    f"{interpreter.LABELS[case[0]]} {' '.join(map(str, case[1:]))}": partial(step_case, *case)
    for case in [
        ("fp32", 1, 16),
        ("fp32", 3, 64),
        ("fp32", 20, 32),
        ("fp16", 8, 96),
        ("fp32", 2, 32, 32, 2.0),
        ("fp32", 3, 32, 32, None, True),
        ("fp16", 3, 48, 32, 2.0, True),
        ("fp32", 4, 80, 64, None, False, True),
        ("fp32", 3, 64, 64, None, False, False, "fp8"),
        ("fp32", 3, 64, 64, None, False, False, "kv4v4"),
        ("fp16", 1, 48, 48, 2.0, True, False, "kv8v2"),
        ("fp32", 20, 16, 16, None, False, False, "kv16v4"),
        ("fp32", 3, 32, 32, None, False, False, "", 100),
        ("fp16", 8, 64, 64, 2.0, True, False, "", TAIL_SPAN + 50),
        ("fp32", 2, 16, 16, None, False, False, "", 60, True),
    ]
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_attention_over_context_tail_and_new_token(
    case: str, interpreted: Callable[[str], dict[str, float]]
) -> None:
    error = interpreted(case)
    assert error["o"] <= TOLERANCE[case.split()[0]]
    assert error["kept"] == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_is_attention_over_context_tail_and_new_token(case: str) -> None:
    error = CASES[case](device="cuda")  # type: ignore[call-arg]
    assert error["o"] <= TOLERANCE[case.split()[0]]
    assert error["kept"] == 1.0


@given(
    counts=st.lists(st.lists(st.integers(0, 5000), min_size=2, max_size=2).map(tuple), min_size=1, max_size=3),
    group=st.integers(1, 40),
    rows=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    target=st.integers(1, 600),
    pages=st.integers(1, 40),
)
def test_a_queue_has_every_slot_once_in_items_of_about_one_size(
    counts: list[tuple[int, ...]], group: int, rows: list[int], target: int, pages: int
) -> None:
    owners = [owner for owner, n in zip(range(len(counts)), rows, strict=False) for _ in range(n)]
    layout = [[(of, -(-max(of) // PAGE))] for of in counts]
    items, tiles = items_of(layout, owners, group, 2, pages, target)
    seen: dict[tuple[int, int], int] = {}
    for source, row, among, head, first, _, start, stop, tile in items:
        begin, end, tails, expected = tiles[tile]
        of_tile = [item for item in items if item[8] == tile]
        assert len(of_tile) == expected
        assert all(item[8] == tile for item in [*items[begin:end], *items[tails : tails + expected - end + begin]])
        assert among * min(group, BLOCK_G) <= BLOCK_G
        assert stop - start > 0
        assert start % PAGE == 0
        for own in range(row, row + among):
            for query in range(first, min(group, first + BLOCK_G)):
                key = (own, head * group + query)
                seen[key] = seen.get(key, 0) + stop - start
                assert source in (0, 1 + owners[own])
    for row, owner in enumerate(owners):
        for head in range(2 * group):
            assert seen[row, head] == counts[owner][head // group] + pages * PAGE
    spans = [-(-(stop - start) // PAGE) for source, *_, start, stop, _ in items if source]
    if spans:
        assert max(spans) <= max(2, -(-sum(spans) // target), -(-max(map(max, counts)) // PAGE // 128) + 1)


# A launch of every gated dtype, width and storage, over batches and tails of several sizes.
LAUNCHES = """
from lceval.kernels import step
from lceval.kernels.queue import WorkQueue

SINK = torch.empty(64, dtype=torch.bfloat16)
for gated in step.variants():
    sizes = gated.constants
    dtype, dim, value_dim = variant.TORCH[gated.name.split()[0]], sizes["D"] + sizes["REST"], sizes["E"]
    codes = step.Codes(bool(sizes["FP8"]), sizes["K_BITS"], sizes["V_BITS"])
    softmax = step.Softmax(0.1, sizes["CAP"] or None, SINK if sizes["SINK"] else None)
    for rows, kv_heads, group, pages in [(1, 1, 1, 1), (1, 8, 4, 16), (2, 4, 3, 17), (2, 16, 4, 33)]:
        q = torch.empty(rows, 1, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
        k, v = (torch.empty(rows, kv_heads, 1, width, dtype=dtype) for width in (dim, value_dim))
        keys = torch.empty(rows, kv_heads, 64 * pages, dim, dtype=dtype)
        values = keys[..., :value_dim] if sizes["LATENT"] else torch.empty(*keys.shape[:3], value_dim, dtype=dtype)
        int32, int64 = (torch.zeros(3, 9, dtype=x) for x in (torch.int32, torch.int64))
        results = torch.empty(3, 16, value_dim), torch.empty(3, 16)
        queue = WorkQueue(int32, int32, pages, int64, *results, int32, codes, ())
        window = step.Window(7, sizes["WINDOW"] == 2, int64, int64) if sizes["WINDOW"] else None
        step.attend(q, k, v, (keys, values), int32, int64, queue, softmax, window)
report(step.variants())
"""


def test_launches_are_of_gated_variants_and_a_longer_tail_needs_no_new_one() -> None:
    result = interpreter.recorded_launches(LAUNCHES)
    assert [row for row in result["launched"] if row not in result["gated"]] == []
    assert len(result["launched"]) == len(result["gated"])


if __name__ == "__main__":
    interpreter.main(CASES)
