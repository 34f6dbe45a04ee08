"""The decode kernels against what the memory allows, and against SDPA over the uncompressed cache.

Every case is one layer with Llama-3.1-8B's heads, built and read as lcft builds and reads it (`compact`, the recipe's
store and reader, `dispatch`). On a CUDA device a case is a CUDA graph over as many copies of the layer as outgrow the
L2 cache; times are medians of replays. Without one, `predict` says what bytes and operations allow.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.bench.machine import machine
from lceval.errors import InfrastructureError, UserError
from lceval.kernels import compact, dispatch
from lceval.kernels.paged import KV, PAGE, PagedKV
from lceval.models.policies import Quantizer
from lceval.models.recipe import parse

LENGTHS, BATCHES, KEEPS = (8192, 32768, 131072), (1, 8, 32), (1.0, 0.5, 0.25, 0.1)
# What is kept is stored so; the readers choose a tenth of everything.
QUANTIZERS = ("full", "int8", "int4", "int2", "fier:0.1", "quest:0.1")
# A reader's first layers read everything (fier), so the layer that is timed is a later one.
LAYER = 2
# Rotated copies together outgrow the L2 cache (50 MB on an H100) four times.
ROTATED_BYTES = 200 * 2**20
REPEATS = 30
PREFILL_LENGTH = 32768


@dataclass(frozen=True)
class Shape:
    """A layer: query heads, KV heads, head dim, and the widths of its model's products (for its prefill)."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    hidden: int = 4096
    inner: int = 14336


LLAMA_8B = Shape()


@dataclass(frozen=True)
class Case:
    """One decoding step of `batch` sequences over contexts of `length` tokens."""

    store: str
    length: int
    batch: int
    keep: float


@dataclass(frozen=True)
class Device:
    """What a prediction rests on.

    Attributes:
        bytes_s: copy bandwidth, reads and writes together. flops_s: dense 16-bit tensor-core operations.
        alu_s: float32 lanes times clock, for dequantisation.
        launch_s: one kernel of a CUDA graph, at least.
    """

    name: str
    bytes_s: float
    flops_s: float
    alu_s: float
    launch_s: float = 2.5e-6


DEVICES = {
    "h100": Device("H100 SXM (3.35 TB/s)", 3.35e12, 989e12, 132 * 128 * 1.7e9),
    "h200": Device("H200 (4.8 TB/s)", 4.8e12, 989e12, 132 * 128 * 1.7e9),
    "a100": Device("A100 80GB SXM (2.04 TB/s)", 2.04e12, 312e12, 108 * 64 * 1.41e9),
}
# Instructions that turn a code into a factor of a product: shift, mask or convert, multiply-add.
OPS_PER_CODE = 3
# Kernels of a step: shares and merge; a reader's scan, promise and four to six of top-k come before.
LAUNCHES = {"full": 2, "int8": 3, "int4": 3, "int2": 3, "fier:0.1": 9, "quest:0.1": 6}
# The share of the memory's speed that DESIGN asks of full-precision and of quantised reading.
AIM = {"int8": 0.7, "int4": 0.7, "int2": 0.7}
FULL_AIM = 0.85


def cases(
    lengths: Sequence[int] = LENGTHS, batches: Sequence[int] = BATCHES, keeps: Sequence[float] = KEEPS
) -> Iterator[Case]:
    """Every store at every share kept; readers over everything."""
    for length in lengths:
        for batch in batches:
            for store in QUANTIZERS:
                for keep in keeps:
                    if keep == 1.0 or parse(store).sparse_attention is None:
                        yield Case(store, length, batch, keep)


def ragged(length: int, keep: float, heads: int) -> list[int]:
    """Slots of each head: from half to one and a half of the mean, so that heads differ as under adakv."""
    if keep == 1.0:
        return [length] * heads
    return [round(length * keep * (0.5 + (head + 0.5) / heads)) for head in range(heads)]


def build(case: Case, shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> KV:
    """The case's layer, of random keys and values."""
    rng = torch.Generator(device).manual_seed(seed)
    recipe = parse(case.store)
    padded = -(-case.length // PAGE) * PAGE
    size = (case.batch, shape.kv_heads, padded, shape.dim)
    k, v = (torch.randn(size, generator=rng, device=device, dtype=dtype) for _ in "kv")
    counts = ragged(case.length, case.keep, shape.kv_heads)
    keep = None
    if case.keep < 1.0:
        order = torch.rand(size[:3], generator=rng, device=device)[..., : case.length].argsort(-1).argsort(-1)
        keep = order < torch.tensor(counts, device=device)[:, None]
    k_seen, v_seen = k[:, :, : case.length], v[:, :, : case.length]
    if isinstance(recipe.quantizer, Quantizer):
        store = recipe.quantizer
        kept: Any = compact.quantize(
            k_seen, v_seen, keep, counts * case.batch, store.k_bits, store.v_bits, store.residual
        )
    elif keep is None:
        kept = PagedKV.full(k, v, case.length)
    else:
        kept = compact.gather(k_seen, v_seen, keep, counts * case.batch)
    return kept if recipe.sparse_attention is None else recipe.sparse_attention.wrap(kept, LAYER, case.length)


def measure(
    picked: Sequence[Case], *, device: str, dtype: torch.dtype, shape: Shape = LLAMA_8B
) -> list[dict[str, Any]]:
    """Rows of what each case took, SDPA on the full cache of the same shape in the same run.

    A case that does not fit the device's memory has `error` and no times.
    """
    copy_s = copy_bandwidth(device)
    dense: dict[tuple[int, int], float | None] = {}
    rows = []
    for case in picked:
        key = case.length, case.batch
        if key not in dense:
            dense[key] = _attempt(lambda case=case: sdpa_seconds(case, shape, device, dtype))  # type: ignore[misc]
        row: dict[str, Any] = {"kernel": "decode", **asdict(case), "sdpa_us": _us(dense[key])}
        taken = _attempt(lambda case=case: kernel_seconds(case, shape, device, dtype))  # type: ignore[misc]
        if taken is None:
            rows.append({**row, "error": "out of memory"})
            continue
        seconds, read = taken
        floor = read / copy_s
        rows.append(
            {
                **row,
                "bytes": read,
                "us": _us(seconds),
                "floor_us": _us(floor),
                "bandwidth_share": floor / seconds,
                "speedup_vs_sdpa": None if dense[key] is None else dense[key] / seconds,
                "ideal_speedup": dense_bytes(case, shape, dtype) / read,
            }
        )
    return rows


def kernel_seconds(case: Case, shape: Shape, device: str, dtype: torch.dtype) -> tuple[float, int]:
    """Seconds of a step, and the bytes that it reads."""
    first = build(case, shape, device, dtype)
    copies = 1 if device == "cpu" else -(-ROTATED_BYTES // max(1, first.read_bytes))
    layers = [first, *(build(case, shape, device, dtype, seed) for seed in range(1, copies))]
    q = torch.randn(case.batch, shape.heads, 1, shape.dim, device=device, dtype=dtype)
    scaling = shape.dim**-0.5
    runs = [lambda kv=kv: dispatch.attend(q, kv, scaling) for kv in layers]
    return seconds_of(runs, device), first.read_bytes


def sdpa_seconds(case: Case, shape: Shape, device: str, dtype: torch.dtype) -> float:
    """PyTorch's attention over the uncompressed cache."""
    size = (case.batch, shape.kv_heads, case.length, shape.dim)
    bytes_ = dense_bytes(case, shape, dtype)
    copies = 1 if device == "cpu" else -(-ROTATED_BYTES // bytes_)
    caches = [tuple(torch.randn(size, device=device, dtype=dtype) for _ in "kv") for _ in range(copies)]
    q = torch.randn(case.batch, shape.heads, 1, shape.dim, device=device, dtype=dtype)
    runs = [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in caches]
    return seconds_of(runs, device)


def prefill_side(
    device: str, dtype: torch.dtype, shape: Shape = LLAMA_8B, length: int = PREFILL_LENGTH
) -> dict[str, Any]:
    """What scoring and compacting a layer to a quarter cost beside prefilling it: attention and its four products."""
    from lceval.kernels.window import window_scores

    q, k, v = (
        torch.randn(1, n, length, shape.dim, device=device, dtype=dtype) for n in (shape.heads, *[shape.kv_heads] * 2)
    )
    x, y = (torch.randn(length, n, device=device, dtype=dtype) for n in (shape.hidden, shape.inner))
    kv_width = 2 * shape.kv_heads * shape.dim
    weights = [
        torch.randn(*size, device=device, dtype=dtype)
        for size in (
            (shape.hidden, shape.hidden + kv_width),
            (shape.hidden, shape.hidden),
            (shape.hidden, 2 * shape.inner),
        )
    ]
    down = torch.randn(shape.inner, shape.hidden, device=device, dtype=dtype)

    def layer() -> Tensor:
        for weight in weights:
            x @ weight
        y @ down
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    counts = ragged(length, 0.25, shape.kv_heads)
    order = torch.rand(1, shape.kv_heads, length, device=device).argsort(-1).argsort(-1)
    keep = order < torch.tensor(counts, device=device)[:, None]
    window = q[:, :, -64:].contiguous()
    scaling = shape.dim**-0.5
    scoring = seconds_of([lambda: window_scores(window, k, scaling)], device)
    compacting = seconds_of([lambda: compact.gather(k, v, keep, counts)], device)
    quantising = seconds_of([lambda: compact.quantize(k, v, keep, counts, 4, 4)], device)
    prefill = seconds_of([layer], device)
    return {
        "length": length,
        "prefill_us": _us(prefill),
        "score_us": _us(scoring),
        "compact_us": _us(compacting),
        "quantise_us": _us(quantising),
        "share": (scoring + compacting) / prefill,
        "share_int4": (scoring + quantising) / prefill,
    }


def seconds_of(runs: Sequence[Callable[[], Any]], device: str) -> float:
    """Median seconds of one run: on CUDA of a graph of all of them, replayed; else by the clock."""
    for run in runs:
        run()
    if device == "cpu":
        taken = []
        for _ in range(3):
            for run in runs:
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
        return statistics.median(taken)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    taken = []
    for _ in range(REPEATS):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start_event.record()
        graph.replay()
        end_event.record()
        torch.cuda.synchronize()
        taken.append(start_event.elapsed_time(end_event) / 1000 / len(runs))
    return statistics.median(taken)


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a copy, read and written ones together."""
    source = torch.empty(2**28 if device != "cpu" else 2**22, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds_of([lambda: target.copy_(source)], device)


def dense_bytes(case: Case, shape: Shape, dtype: torch.dtype) -> int:
    """Keys and values of the uncompressed cache."""
    return 2 * case.batch * shape.kv_heads * case.length * shape.dim * dtype.itemsize


@cache
def read_bytes(store: str, keep: float, shape: Shape = LLAMA_8B) -> tuple[float, float]:
    """Bytes that a step reads of one sequence: slope and intercept of the length, from two layers that were built."""
    short, long = 4096, 8192
    small, large = (
        build(Case(store, length, 1, keep), shape, "cpu", torch.float16).read_bytes for length in (short, long)
    )
    slope = (large - small) / (long - short)
    return slope, small - slope * short


def predict(picked: Sequence[Case], device: Device, shape: Shape = LLAMA_8B) -> list[dict[str, Any]]:
    """What each case can take at best, and what it takes at the share of the memory's speed that is aimed at."""
    rows = []
    for case in picked:
        slope, intercept = read_bytes(case.store, case.keep, shape)
        read = case.batch * (slope * case.length + intercept)
        full = dense_bytes(case, shape, torch.float16)
        slots = case.batch * shape.kv_heads * case.length * case.keep
        # A tile has 16 rows of queries, however few heads share a KV head.
        flops = 4 * 16 * shape.dim * slots
        codes = 2 * shape.dim * slots if case.store.startswith("int") else 0
        floors = {
            "bytes": read / device.bytes_s,
            "flops": flops / device.flops_s,
            "alu": OPS_PER_CODE * codes / device.alu_s,
            "launches": LAUNCHES[case.store] * device.launch_s,
        }
        bound = max(floors, key=lambda name: floors[name])
        seconds = max(floors["bytes"] / AIM.get(case.store, FULL_AIM), *floors.values())
        sdpa = full / device.bytes_s
        rows.append(
            {
                "kernel": "decode",
                **asdict(case),
                "bytes": read,
                "floor_us": _us(floors["bytes"]),
                "bound_by": bound,
                "us": _us(seconds),
                "sdpa_us": _us(sdpa),
                "speedup_vs_sdpa": sdpa / seconds,
                "ideal_speedup": full / read,
            }
        )
    return rows


def bench(
    predicted: str | None,
    lengths: Sequence[int] | None,
    batches: Sequence[int] | None,
    keeps: Sequence[float] | None,
) -> dict[str, Any]:
    """The report of `lceval bench kernels`.

    Args:
        predicted: a key of DEVICES: say what that device allows instead of measuring this one.

    Raises:
        UserError: no such device, or a length, batch or share that makes no case.
        InfrastructureError: nothing to measure on.
    """
    lengths, batches, keeps = lengths or LENGTHS, batches or BATCHES, keeps or KEEPS
    if min(lengths) < PAGE or min(batches) < 1 or not all(0 < keep <= 1 for keep in keeps):
        raise UserError(
            f"bench kernels takes lengths of {PAGE} tokens or more, batches of 1 or more and shares up to 1"
        )
    picked = list(cases(lengths, batches, keeps))
    head = {"bench": "kernels", "shape": asdict(LLAMA_8B)}
    if predicted is not None:
        if predicted not in DEVICES:
            raise UserError(f"no device {predicted!r} to predict: one of {', '.join(DEVICES)}")
        return {**head, "predicted": DEVICES[predicted].name, "rows": predict(picked, DEVICES[predicted])}
    if not torch.cuda.is_available():
        raise InfrastructureError("no CUDA device to measure: `--predict h100` says what bytes and operations allow")
    return {
        **head,
        "predicted": None,
        "copy_bytes_s": copy_bandwidth("cuda"),
        "rows": measure(picked, device="cuda", dtype=torch.bfloat16),
        "prefill": prefill_side("cuda", torch.bfloat16),
        "machine": machine(),
    }


def _attempt(run: Callable[[], Any]) -> Any:
    """What `run` gives, or None where the device's memory does not hold it."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else 1e6 * seconds
