"""Every kernel of lceval.kernels on this device: its error against its PyTorch reference, and what it compiles to.

Without CUDA the launchers run their references, so that the same lines are checked; under TRITON_INTERPRET=1 they run
the kernels in Triton's interpreter.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch
from recording import NEEDS_CUDA, LeftOutError, bounded
from torch import Tensor
from workload import Setup, exact_attention, lse_error, random_layer, random_queries, relative_error

from lceval.kernels import aot, compact, decode, dispatch, gather_decode, merge, scan, shifted, step, topk, window
from lceval.kernels.bits import Bits
from lceval.kernels.bounds import Bounds
from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.launch import INTERPRETED, runs_kernels
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.quant import QuantKV
from lceval.kernels.queue import Workspace
from lceval.kernels.select import indexed_keys
from lceval.kernels.softmax import Softmax

# The query heads of a KV head: Qwen2.5-7B's, one, a divisor and a non-divisor of the 16 rows of a tile.
GROUPS = (7, 1, 8, 24)
# Channels of keys and of values, the cap, whether values are the first channels of the keys.
KINDS = {
    "capped logits": (128, 128, 5.0, False),
    "wide keys": (192, 128, None, False),
    "latents": (576, 512, None, True),
}
BITS = ((8, 8), (4, 4), (2, 2), (8, 4), (16, 4))
UNIT = 16
# Those of the kernels' tests (`GPU_TOLERANCE` where they have one), here of the relative error. Sums of attention
# weights are float32 for every dtype of the queries.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
QUANTISED_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LSE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
SUMS_TOLERANCE = 5e-5
# Compiled at once, and in a dry run alone; the others compile together, a process a core.
FIRST = "decode.split"


def checks(setup: Setup) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and function of each check, the most valuable first."""
    yield f"figures {FIRST}", partial(_figures, setup, FIRST)
    for group in GROUPS:
        yield f"error decode.split and merge, {group} heads a KV head", partial(_decode, setup, group)
    for name, kind in KINDS.items():
        yield f"error decode of {name}", partial(_kind, setup, *kind)
    for stored in ("full precision", "fp8", "kv4v4", "a window"):
        yield f"error step over {stored}", partial(_step, setup, stored)
    yield "error merge with the rest", partial(_merge, setup)
    for bits in BITS:
        yield f"codes compact.keys and compact.values, {bits[0]} and {bits[1]} bits", partial(_quantize, setup, bits)
        yield f"error quant_decode.split, {bits[0]} and {bits[1]} bits", partial(_quant_decode, setup, bits)
    yield "slots compact.index and compact.gather", partial(_gather, setup)
    yield "error window.lse and window.received", partial(_window, setup)
    for kind in ("bits", "bounds"):
        yield f"error scan.{kind} and scan.score", partial(_scan, setup, kind)
        yield f"error gather.split, chosen by {kind}", partial(_gather_decode, setup, kind)
    for units in (2000, 20_000):
        yield f"choice topk of {units} units", partial(_topk, setup, units)
    yield "error shifted.forward, shifted.query and shifted.key", partial(_shifted, setup)
    for kernel in sorted({variant.kernel for variant in aot.variants()} - {FIRST}):
        yield f"figures {kernel}", partial(_figures, setup, kernel)


def launched_checks(setup: Setup) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What the launches of all checks before compiled: more than one binary of a kind says what specialises it."""
    for kernel in sorted({variant.kernel for variant in aot.variants()}):
        yield f"launched {kernel}", partial(_launched, setup, kernel)


def _decode(setup: Setup, group: int) -> dict[str, Any]:
    k, v, keep, _ = random_layer(setup)
    kv = PagedKV.gather(k, v, keep)
    rows, heads = 2, keep.shape[1] * group
    q, scaling = random_queries(setup, rows, heads, setup.head_dim), setup.head_dim**-0.5
    expected = exact_attention(q, kv, scaling)
    table, lens = kv.table.expand(rows, -1, -1), kv.lens.expand(rows, -1)
    values = {}
    for name, splits in (("split", None), ("single", 1)):
        o, lse = decode.decode(q, kv.k, kv.v, table, lens, scaling, splits=splits)
        values |= {f"{name}_o": relative_error(o, expected[0]), f"{name}_lse": lse_error(lse, expected[1])}
    tolerance, of_lse = TOLERANCE[setup.dtype], LSE_TOLERANCE[setup.dtype]
    return bounded(values, split_o=tolerance, single_o=tolerance, split_lse=of_lse, single_lse=of_lse)


def _kind(setup: Setup, dim: int, value_dim: int, cap: float | None, latent: bool) -> dict[str, Any]:
    keep = random_layer(setup)[2]
    k, v = (random_queries(setup, *keep.shape, channels) for channels in (dim, value_dim))
    kv = PagedKV.gather(k, k[..., :value_dim] if latent else v, keep)
    q, scaling = random_queries(setup, 2, keep.shape[1] * 8, dim), dim**-0.5
    table, lens = kv.table.expand(2, -1, -1), kv.lens.expand(2, -1)
    expected_o, expected_lse = decode.reference(q, kv.k, kv.v, table, lens, scaling, cap)
    o, lse = dispatch.attend(q[:, :, None], kv, scaling, cap)
    values = {"o": relative_error(o[:, :, 0], expected_o), "lse": lse_error(lse[:, :, 0], expected_lse)}
    return bounded(values, o=TOLERANCE[setup.dtype], lse=LSE_TOLERANCE[setup.dtype])


def _step(setup: Setup, stored: str) -> dict[str, Any]:
    """Two steps of three rows on two contexts, one of them padded: outputs, and whether the tokens were appended."""
    if not runs_kernels(torch.empty(0, device=setup.device), "step"):
        raise LeftOutError(NEEDS_CUDA)
    contexts, dim, rows = [], setup.head_dim, 3
    for _ in range(rows if stored == "a window" else 2):
        k, v, keep, counts = random_layer(setup)
        kv: Any = compact.quantize(k, v, keep, counts, 4, 4) if stored == "kv4v4" else PagedKV.gather(k, v, keep)
        contexts.append(Fp8KV.quantize(kv) if stored == "fp8" else kv)
    kv_heads = len(contexts[0].counts)
    tail = tuple(random_queries(setup, rows, kv_heads, 2 * PAGE, dim) for _ in range(2))
    owners, pads, softmax = (0, 0, 1), (0, 5, 0), Softmax(dim**-0.5)
    seen = None
    if stored == "a window":  # of which queries see the end of the contexts, and not all of the tails
        owners, tokens = (0, 1, 2), torch.tensor([200, 180, 150], device=setup.device)
        seen = step.Window(60, False, tokens - torch.tensor(pads, device=setup.device), tokens - 40)
    queue = Workspace().queue(contexts, owners, tail, 7 * kv_heads)
    errors, kept = [], True
    for length in (70, 71):
        q = random_queries(setup, rows, 7 * kv_heads, 1, dim)
        k, v = (random_queries(setup, rows, kv_heads, 1, dim) for _ in range(2))
        on_device = torch.tensor([length], dtype=torch.int32, device=setup.device)
        o = step.attend(q, k, v, tail, on_device, torch.tensor(pads, device=setup.device), queue, softmax, seen)
        kept &= torch.equal(tail[0][:, :, length], k[:, :, 0]) and torch.equal(tail[1][:, :, length], v[:, :, 0])
        own = [contexts[owner] for owner in owners]
        expected = step.reference(q[:, :, 0], k[:, :, 0], v[:, :, 0], tail, length, pads, own, softmax, seen)
        errors.append(relative_error(o[:, :, 0].cpu(), expected))
    values = {"o": max(errors), "not_appended": int(not kept), "not_merged": int(queue.arrived.any())}
    tolerance = (QUANTISED_TOLERANCE if stored == "kv4v4" else TOLERANCE)[setup.dtype]
    return bounded(values, o=tolerance, not_appended=0, not_merged=0)


def _merge(setup: Setup) -> dict[str, Any]:
    shares = 5
    part_o = random_queries(setup, 2, 28, shares, setup.head_dim).float()
    part_lse = random_queries(setup, 2, 28, shares).float()
    part_lse[:, ::3, 1:4] = -torch.inf
    rest = random_queries(setup, 2, 28, setup.head_dim), random_queries(setup, 2, 28).float()
    o, lse = merge.merge(part_o, part_lse, rest, setup.dtype)
    expected_o, expected_lse = merge.reference(part_o, part_lse, rest)
    values = {"o": relative_error(o, expected_o), "lse": lse_error(lse, expected_lse)}
    return bounded(values, o=TOLERANCE[setup.dtype], lse=LSE_TOLERANCE[setup.dtype])


def _quantize(setup: Setup, bits: tuple[int, int]) -> dict[str, Any]:
    """Codes, scales and zeros must be the CPU's bit for bit: what is stored must not depend on where it was made."""
    k, v, keep, counts = random_layer(setup)
    kv = compact.quantize(k, v, keep, counts, *bits)
    expected = QuantKV.quantize(PagedKV.gather(k.cpu(), v.cpu(), keep.cpu()), *bits)
    pairs = [
        (x.cpu(), y)
        for a, b in ((kv.k, expected.k), (kv.v, expected.v))
        for x, y in zip(a.tensors, b.tensors, strict=True)
    ]
    values: dict[str, Any] = {"pages": sum(kv.pages)}
    values["differing"] = sum(int((x != y).sum()) for x, y in pairs)
    values["misplaced"] = _misplaced(kv, expected)
    return bounded(values, differing=0, misplaced=0)


def _quant_decode(setup: Setup, bits: tuple[int, int]) -> dict[str, Any]:
    k, v, keep, counts = random_layer(setup)
    kv = compact.quantize(k, v, keep, counts, *bits)
    q, scaling = random_queries(setup, 2, 28, setup.head_dim), setup.head_dim**-0.5
    o, lse = dispatch.attend(q[:, :, None], kv, scaling)
    expected_o, expected_lse = exact_attention(q, kv, scaling)
    values = {"o": relative_error(o[:, :, 0], expected_o), "lse": lse_error(lse[:, :, 0], expected_lse)}
    return bounded(values, o=QUANTISED_TOLERANCE[setup.dtype], lse=LSE_TOLERANCE[setup.dtype])


def _gather(setup: Setup) -> dict[str, Any]:
    k, v, keep, counts = random_layer(setup)
    kv, expected = compact.gather(k, v, keep, counts), PagedKV.gather(k, v, keep)
    pairs = [(a, b) for head in range(len(counts)) for a, b in zip(kv.head(head), expected.head(head), strict=True)]
    values = {"differing": sum(int((a != b).sum()) for a, b in pairs), "misplaced": _misplaced(kv, expected)}
    return bounded(values, differing=0, misplaced=0)


def _misplaced(kv: Any, expected: Any) -> int:
    """Slots whose position in the context is not the expected one."""
    heads = range(len(expected.counts))
    pairs = [(kv.kept_positions(0, head).cpu(), expected.kept_positions(0, head).cpu()) for head in heads]
    return sum(len(b) if len(a) != len(b) else int((a != b).sum()) for a, b in pairs)


def _window(setup: Setup) -> dict[str, Any]:
    k, _, _, _ = random_layer(setup)
    q, softmax = random_queries(setup, 1, 28, 64, setup.head_dim), Softmax(setup.head_dim**-0.5)
    expected = window.reference(q, k, softmax)
    values = {"received": relative_error(window.received(q, k, softmax), expected)}
    values["window_scores"] = relative_error(window.window_scores(q, k, softmax), expected / 64)
    return bounded(values, received=SUMS_TOLERANCE, window_scores=SUMS_TOLERANCE)


@cache
def _index(setup: Setup, kind: str) -> tuple[PagedKV, Bits | Bounds, int]:
    """A compressed layer, an index of its heads above the budget, and the budget in slots."""
    k, v, keep, _ = random_layer(setup)
    kv, budget = PagedKV.gather(k, v, keep), setup.layer_tokens // 4
    keys = indexed_keys(kv, budget)
    return kv, Bits.build(keys) if kind == "bits" else Bounds.build(keys, UNIT), budget


def _scan(setup: Setup, kind: str) -> dict[str, Any]:
    kv, index, budget = _index(setup, kind)
    q, scaling = random_queries(setup, 2, 28, setup.head_dim), setup.head_dim**-0.5
    scores, sizes = scan.scan(q, index, kv.lens, kv.counts, budget, scaling)
    expected, expected_sizes = scan.reference(q, index, kv.lens, budget, scaling)
    values = {"sizes_differing": int((sizes != expected_sizes).sum())}
    real = torch.arange(expected.shape[-1], device=sizes.device) < expected_sizes[..., None]
    values["scores"] = relative_error(scores[..., : expected.shape[-1]][real], expected[real])
    return bounded(values, sizes_differing=0, scores=SUMS_TOLERANCE)


def _gather_decode(setup: Setup, kind: str) -> dict[str, Any]:
    kv, index, budget = _index(setup, kind)
    q, scaling = random_queries(setup, 2, 28, setup.head_dim), setup.head_dim**-0.5
    scores, sizes = scan.reference(q, index, kv.lens, budget, scaling)
    chosen = topk.reference(scores.flatten(0, 1), sizes.flatten(), budget // index.unit).view(*sizes.shape, -1)
    args = (q, kv.k, kv.v, kv.table, kv.lens, chosen, index.unit, budget, scaling)
    o, lse = gather_decode.gather_decode(*args)
    expected_o, expected_lse = gather_decode.reference(*args)
    values = {"o": relative_error(o, expected_o), "lse": lse_error(lse, expected_lse)}
    return bounded(values, o=TOLERANCE[setup.dtype], lse=LSE_TOLERANCE[setup.dtype])


def _topk(setup: Setup, units: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(units)
    # Of few values, so that ties are cut.
    scores = torch.randint(0, 500, (4, units), generator=rng).float().to(setup.device)
    sizes = torch.tensor([units, units - 1, 100, 0], dtype=torch.int32, device=setup.device)
    count = units // 10
    chosen, expected = topk.top_indices(scores, sizes, count), topk.reference(scores, sizes, count)
    return bounded({"differing": int((chosen != expected).sum())}, differing=0)


def _shifted(setup: Setup) -> dict[str, Any]:
    tokens, group, dim = (192, 64, 64) if setup.small else (4096, 1024, 128)
    lens = torch.tensor([tokens - 5, tokens], dtype=torch.int32, device=setup.device)
    inputs = [random_queries(setup, 2, heads, tokens, dim).requires_grad_() for heads in (28, 4, 4)]
    gradient = random_queries(setup, 2, 28, tokens, dim)
    gradient = gradient.masked_fill((torch.arange(tokens, device=lens.device) >= lens[:, None])[:, None, :, None], 0)

    def outputs(attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        o = attend(*tensors, lens, group, dim**-0.5)
        return [o, *torch.autograd.grad(o, tensors, gradient.to(o.dtype))]

    actual = outputs(shifted.shifted, inputs)
    wide = [x.detach().to(setup.wide).requires_grad_() for x in inputs]
    expected = outputs(lambda *args: shifted.reference(*args)[0], wide)
    values = {
        name: relative_error(*pair) for name, *pair in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True)
    }
    return bounded(values, **dict.fromkeys(values, TOLERANCE[setup.dtype]))


def _figures(setup: Setup, kernel: str) -> dict[str, Any]:
    """Registers, stack bytes, spills and shared bytes of a kernel's variants at 16 bit, head dimension 128."""
    if INTERPRETED:
        raise LeftOutError("needs Triton's compiler: unset TRITON_INTERPRET")
    if setup.small and kernel != FIRST:
        raise LeftOutError(f"small sizes compile {FIRST} alone")
    if missing := aot.missing_tools():
        raise LeftOutError(f"needs {', '.join(missing)} (part of triton)")
    capability = 90
    if setup.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    first = kernel == FIRST
    rows = [_compile(place, capability) for place in _places(kernel)] if first else _others(capability)[kernel]
    broken = aot.check(rows)
    values: dict[str, Any] = {"target": f"sm_{capability}"}
    for row in rows:
        values[row.variant] = {key: asdict(row)[key] for key in ("registers", "stack", "spills", "shared")}
    return {**values, "failed": "; ".join(broken)} if broken else values


def _places(kernel: str) -> list[int]:
    """Places in `aot.variants()` of what a model with bfloat16 weights and head dimension 128 launches."""
    return [
        place
        for place, variant in enumerate(aot.variants())
        if variant.kernel == kernel and (variant.name.startswith("bf16 D128") or " D" not in variant.name)
    ]


def _compile(place: int, capability: int) -> aot.CompiledVariant:
    """By its place, since a jitted function does not go from one process to another."""
    return aot.compile_variant(aot.variants()[place], capability)


@cache
def _others(capability: int) -> dict[str, list[aot.CompiledVariant]]:
    """Every other kernel's variants, compiled by as many processes as there are cores."""
    kernels = sorted({variant.kernel for variant in aot.variants()} - {FIRST})
    places = [(kernel, place) for kernel in kernels for place in _places(kernel)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(_compile, [place for _, place in places], [capability] * len(places)))
    return {kernel: [row for (own, _), row in zip(places, rows, strict=True) if own == kernel] for kernel in kernels}


def _launched(setup: Setup, kernel: str) -> list[dict[str, int | None]]:
    if setup.device != "cuda":
        raise LeftOutError(NEEDS_CUDA)
    function = next(variant.fn for variant in aot.variants() if variant.kernel == kernel)
    binaries = function.device_caches[torch.cuda.current_device()][0].values()
    figures = {"registers": "n_regs", "spills": "n_spills"}
    return [{key: getattr(binary, name, None) for key, name in figures.items()} for binary in binaries]
