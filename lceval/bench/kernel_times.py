"""The decode attention kernels against the memory bandwidth and against SDPA over the uncompressed cache.

Each case is one layer with Llama-3.1-8B's heads, built and run as in lcft (`compact`, the recipe's quantization and
sparse attention, `dispatch`). On a CUDA device a case is a CUDA graph over enough copies of the layer to exceed the L2
cache; times are medians of replays. Without a GPU, `predict` gives a roofline estimate.
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
from lceval.core.errors import InfrastructureError, UserError
from lceval.kernels import compact, dispatch
from lceval.kernels.paged import KV, PAGE, PagedKV
from lceval.kernels.softmax import Softmax
from lceval.kernels.window import window_scores
from lceval.models.policies import Quantizer
from lceval.models.recipe import parse

LENGTHS, BATCHES, KEEPS = (8192, 32768, 131072), (1, 8, 32), (1.0, 0.5, 0.25, 0.1)
# Recipes without an evictor (`keep` evicts); sparse attention selects a tenth of the context.
RECIPES = ("full", "int8", "int4", "int2", "fier:0.1", "quest:0.1")
# The first layers of a sparse attention (fier) are dense, so a later layer is timed.
LAYER = 2
# The rotated copies are together four times the L2 cache (50 MB on an H100).
ROTATED_BYTES = 200 * 2**20
REPEATS = 30
PREFILL_LENGTH = 32768


@dataclass(frozen=True)
class Shape:
    """A layer: query heads, KV heads, head dimension, hidden size and MLP size (for its prefill)."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    hidden: int = 4096
    inner: int = 14336


LLAMA_8B = Shape()


@dataclass(frozen=True)
class KernelCase:
    """One decoding step of `batch` sequences over contexts of `length` tokens, of which a share `keep` is kept."""

    recipe: str
    length: int
    batch: int
    keep: float

    @property
    def keys(self) -> dict[str, Any]:
        """The case as it stands in a row of the report."""
        return {"store": self.recipe, "length": self.length, "batch": self.batch, "keep": self.keep}


@dataclass(frozen=True)
class Device:
    """The peak rates of a GPU, for predictions.

    Attributes:
        bytes_s: copy bandwidth in bytes per second, reads and writes together.
        flops_s: dense 16-bit tensor-core operations per second.
        alu_s: float32 lanes times clock, for dequantization.
        launch_s: minimum seconds per kernel of a CUDA graph.
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
# Instructions that dequantize one code: shift, mask or convert, multiply-add.
OPS_PER_CODE = 3
# Kernels per step: splits and merge; a sparse attention adds a scan, a bound and four to six of top-k.
LAUNCHES = {"full": 2, "int8": 3, "int4": 3, "int2": 3, "fier:0.1": 9, "quest:0.1": 6}
# Targets: share of the memory bandwidth, for quantized and for full-precision caches.
AIM = {"int8": 0.7, "int4": 0.7, "int2": 0.7}
FULL_AIM = 0.85


def cases(
    lengths: Sequence[int] = LENGTHS, batches: Sequence[int] = BATCHES, keeps: Sequence[float] = KEEPS
) -> Iterator[KernelCase]:
    """Every recipe at every share kept; sparse attention over the full cache only."""
    for length in lengths:
        for batch in batches:
            for recipe in RECIPES:
                for keep in keeps:
                    if keep == 1.0 or parse(recipe).sparse_attention is None:
                        yield KernelCase(recipe, length, batch, keep)


def ragged(length: int, keep: float, heads: int) -> list[int]:
    """Slots per head, from 0.5 to 1.5 times the mean, so that heads differ as under adakv."""
    if keep == 1.0:
        return [length] * heads
    return [round(length * keep * (0.5 + (head + 0.5) / heads)) for head in range(heads)]


def build(case: KernelCase, shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> KV:
    """The KV cache of the case's layer, with random keys and values."""
    rng = torch.Generator(device).manual_seed(seed)
    recipe = parse(case.recipe)
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
        kept: Any = recipe.quantizer.gathered(k_seen, v_seen, keep, counts * case.batch)
    elif keep is None:
        kept = PagedKV.full(k, v, case.length)
    else:
        kept = compact.gather(k_seen, v_seen, keep, counts * case.batch)
    return kept if recipe.sparse_attention is None else recipe.sparse_attention.wrap(kept, LAYER, case.length)


def measure(
    selected: Sequence[KernelCase], *, device: str, dtype: torch.dtype, shape: Shape = LLAMA_8B
) -> list[dict[str, Any]]:
    """Measured rows, one per case, with SDPA on a full cache of the same shape in the same run.

    A case that does not fit the device's memory has an `error` and no times.
    """
    copy_s = copy_bandwidth(device)
    dense: dict[tuple[int, int], float | None] = {}
    rows = []
    for case in selected:
        key = case.length, case.batch
        if key not in dense:
            dense[key] = _attempt(lambda case=case: sdpa_seconds(case, shape, device, dtype))  # type: ignore[misc]
        row: dict[str, Any] = {"kernel": "decode", **case.keys, "sdpa_us": _us(dense[key])}
        measured = _attempt(lambda case=case: kernel_seconds(case, shape, device, dtype))  # type: ignore[misc]
        if measured is None:
            rows.append({**row, "error": "out of memory"})
            continue
        seconds, read = measured
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


def kernel_seconds(case: KernelCase, shape: Shape, device: str, dtype: torch.dtype) -> tuple[float, int]:
    """Seconds of a step, and the bytes it reads."""
    first = build(case, shape, device, dtype)
    copies = 1 if device == "cpu" else -(-ROTATED_BYTES // max(1, first.read_bytes))
    layers = [first, *(build(case, shape, device, dtype, seed) for seed in range(1, copies))]
    q = torch.randn(case.batch, shape.heads, 1, shape.dim, device=device, dtype=dtype)
    scaling = shape.dim**-0.5
    runs = [lambda kv=kv: dispatch.attend(q, kv, scaling) for kv in layers]
    return seconds_of(runs, device), first.read_bytes


def sdpa_seconds(case: KernelCase, shape: Shape, device: str, dtype: torch.dtype) -> float:
    """Seconds of PyTorch's SDPA over the uncompressed cache."""
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
    """The cost of scoring a layer and compacting it to 25%, relative to its prefill (attention and four matmuls)."""
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
    softmax = Softmax(shape.dim**-0.5)
    scoring = seconds_of([lambda: window_scores(window, k, softmax)], device)
    compacting = seconds_of([lambda: compact.gather(k, v, keep, counts)], device)
    quantizing = seconds_of([lambda: compact.quantize(k, v, keep, counts, 4, 4)], device)
    prefill = seconds_of([layer], device)
    return {
        "length": length,
        "prefill_us": _us(prefill),
        "score_us": _us(scoring),
        "compact_us": _us(compacting),
        "quantise_us": _us(quantizing),
        "share": (scoring + compacting) / prefill,
        "share_int4": (scoring + quantizing) / prefill,
    }


def seconds_of(runs: Sequence[Callable[[], Any]], device: str) -> float:
    """Median seconds of one run; on CUDA, all runs are captured in a graph that is replayed."""
    for run in runs:
        run()
    if device == "cpu":
        times_s = []
        for _ in range(3):
            for run in runs:
                start = time.perf_counter()
                run()
                times_s.append(time.perf_counter() - start)
        return statistics.median(times_s)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times_s = []
    for _ in range(REPEATS):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start_event.record()
        graph.replay()
        end_event.record()
        torch.cuda.synchronize()
        times_s.append(start_event.elapsed_time(end_event) / 1000 / len(runs))
    return statistics.median(times_s)


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a copy, reads and writes together."""
    source = torch.empty(2**28 if device != "cpu" else 2**22, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds_of([lambda: target.copy_(source)], device)


def dense_bytes(case: KernelCase, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of the uncompressed cache."""
    return 2 * case.batch * shape.kv_heads * case.length * shape.dim * dtype.itemsize


@cache
def read_bytes(recipe: str, keep: float, shape: Shape = LLAMA_8B) -> tuple[float, float]:
    """Bytes that a step reads per sequence, linear in its length: slope and intercept, from two built layers."""
    short, long = 4096, 8192
    small, large = (
        build(KernelCase(recipe, length, 1, keep), shape, "cpu", torch.float16).read_bytes for length in (short, long)
    )
    slope = (large - small) / (long - short)
    return slope, small - slope * short


def predict(selected: Sequence[KernelCase], device: Device, shape: Shape = LLAMA_8B) -> list[dict[str, Any]]:
    """Predicted rows, one per case: the lower bound of its time, and its time at the target share of the bandwidth."""
    rows = []
    for case in selected:
        slope, intercept = read_bytes(case.recipe, case.keep, shape)
        read = case.batch * (slope * case.length + intercept)
        full = dense_bytes(case, shape, torch.float16)
        slots = case.batch * shape.kv_heads * case.length * case.keep
        # A tile has 16 query rows, even if fewer query heads share a KV head.
        flops = 4 * 16 * shape.dim * slots
        codes = 2 * shape.dim * slots if case.recipe.startswith("int") else 0
        floors = {
            "bytes": read / device.bytes_s,
            "flops": flops / device.flops_s,
            "alu": OPS_PER_CODE * codes / device.alu_s,
            "launches": LAUNCHES[case.recipe] * device.launch_s,
        }
        bound = max(floors, key=lambda name: floors[name])
        seconds = max(floors["bytes"] / AIM.get(case.recipe, FULL_AIM), *floors.values())
        sdpa = full / device.bytes_s
        rows.append(
            {
                "kernel": "decode",
                **case.keys,
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
        predicted: a key of DEVICES to predict, instead of measuring this machine.

    Raises:
        UserError: an unknown device, or an invalid length, batch or share.
        InfrastructureError: no CUDA device to measure.
    """
    lengths, batches, keeps = lengths or LENGTHS, batches or BATCHES, keeps or KEEPS
    if min(lengths) < PAGE or min(batches) < 1 or not all(0 < keep <= 1 for keep in keeps):
        raise UserError(
            f"bench kernels requires lengths of at least {PAGE} tokens, batches of at least 1 and shares up to 1"
        )
    selected = list(cases(lengths, batches, keeps))
    head = {"bench": "kernels", "shape": asdict(LLAMA_8B)}
    if predicted is not None:
        if predicted not in DEVICES:
            raise UserError(f"cannot predict {predicted!r}: expected one of {', '.join(DEVICES)}")
        return {**head, "predicted": DEVICES[predicted].name, "rows": predict(selected, DEVICES[predicted])}
    if not torch.cuda.is_available():
        raise InfrastructureError("no CUDA device to measure; `--predict h100` prints an estimate")
    return {
        **head,
        "predicted": None,
        "copy_bytes_s": copy_bandwidth("cuda"),
        "rows": measure(selected, device="cuda", dtype=torch.bfloat16),
        "prefill": prefill_side("cuda", torch.bfloat16),
        "machine": machine(),
    }


def _attempt(run: Callable[[], Any]) -> Any:
    """The result of `run`, or None if the device runs out of memory."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else 1e6 * seconds
