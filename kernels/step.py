# ruff: noqa: N803, N806
"""One decoding step of a batch in one launch: attention to contexts and tails, append of the new token, and merge.

Every row attends to the kept slots of its context, to its own tail and to the token that is being fed:

    o = softmax(scaling * q [K_context; K_tail; k]^T) [V_context; V_tail; v]

with capped logits, learned sinks, and a sliding or chunked window if the layer has them. The programs take the items of
a queue (kernels/queue.py). The program of a tail's first item starts from the new token, and writes it to the tail,
whose length is read on the device: nothing in a launch depends on how much was written, so a step can be recorded once
and replayed. Each program writes a partial result; the last one of a tile merges them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lceval.kernels import decode, tiles
from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.launch import DTYPES, INTERPRETED, jit, runs_kernels, tl
from lceval.kernels.paged import KV, PagedKV, is_view
from lceval.kernels.quant import GROUP, QuantKV
from lceval.kernels.quant_tiles import attend_codes
from lceval.kernels.queue import ITEM, SOURCE, TILE, Codes, WorkQueue
from lceval.kernels.softmax import Softmax, log2_logits
from lceval.kernels.variant import TORCH, Variant, head_dims, tile_limits, widths


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail: tuple[Tensor, Tensor],
    length: int,
    pads: Sequence[int],
    contexts: Sequence[KV],
    softmax: Softmax,
    window: Window | None = None,
) -> Tensor:
    """The definition, in float32, row by row and head by head. Tests compare against it.

    Args:
        q: [B, H, D]; k, v: [B, Hkv, D] and [B, Hkv, E], the new token.
        tail: keys and values [B, Hkv, L, ...], of which `length` columns are written, the first `pads[b]` as padding.
        contexts: that of each row, of one sequence.
        window: its tensors on the CPU.

    Returns:
        o [B, H, E] float32.
    """
    B, H, _ = q.shape
    Hkv = k.shape[1]
    o = torch.empty(B, H, v.shape[2])
    for b, h in product(range(B), range(H)):
        head = h // (H // Hkv)
        low = first = 0
        if window is not None:
            position = int(window.starts[b]) + length
            bound = position - position % window.size if window.chunked else position - window.size + 1
            low, first = max(0, bound - int(window.starts[b])), max(0, bound - int(window.origins[b]))
        own = slice(max(pads[b], low), length)
        parts = [(tail[0][b, head, own], tail[1][b, head, own]), (k[b, head][None], v[b, head][None])]
        if contexts[b].counts:
            kept = contexts[b].head(head)
            parts.append((kept[0][first:], kept[1][first:]))
        keys, values = (torch.cat([x.float() for x in of]) for of in zip(*parts, strict=True))
        products = (keys @ q[b, h].float())[None, None, None, None]
        weights = softmax.of_heads(slice(h, h + 1)).weights(products)
        o[b, h] = weights.flatten() @ values
    return o


class Window(NamedTuple):
    """What the queries of a layer see: the last `size` positions, their own included, or those of their chunk.

    Attributes:
        chunked: whether `size` is a chunk of the sequence.
        starts: [B] int64, the position of the tail's first column in each row, negative in padding.
        origins: [B] int64, the position of the first slot of each row's context.
    """

    size: int
    chunked: bool
    starts: Tensor
    origins: Tensor


_jit = jit("G", "heads", "spans", "capacity", "window")


@_jit
def step_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, sources_ptr, items_ptr, tiles_ptr, length_ptr, pads_ptr, sink_ptr,
    starts_ptr, origins_ptr, part_o_ptr, part_lse_ptr, arrived_ptr, o_ptr, scaling, G, heads, spans, capacity, window,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    D: tl.constexpr, D_PAD: tl.constexpr, REST: tl.constexpr, REST_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, FP8: tl.constexpr,
    LATENT: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, ITEM: tl.constexpr, TILE: tl.constexpr,
    SOURCE: tl.constexpr, WINDOW: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Attend to one item; the last program of a tile merges what the others wrote. o: [B, H, E], contiguous."""
    LOG2E: tl.constexpr = 1.4426950408889634
    KD: tl.constexpr = D + REST
    VD: tl.constexpr = KD if LATENT else E
    number = tl.program_id(0).to(tl.int64)
    item = items_ptr + number * ITEM
    source = tl.load(item).to(tl.int64)
    row0 = tl.load(item + 1).to(tl.int64)
    rows = tl.load(item + 2)
    head = tl.load(item + 3)
    g0 = tl.load(item + 4)
    place = tl.load(item + 5)
    first = tl.load(item + 6)
    n = tl.load(item + 7)
    tile = tl.load(item + 8)
    is_tail = source == 0
    own = is_tail & (first == 0)
    length = tl.load(length_ptr).to(tl.int32)
    low = tl.where(is_tail, tl.load(pads_ptr + row0).to(tl.int32), 0)
    n = tl.where(is_tail, tl.minimum(n, length), n)
    low = tl.maximum(low, first)
    if WINDOW:
        start = tl.load(starts_ptr + row0).to(tl.int32)
        position = start + length
        bound = position - position % window if WINDOW == 2 else position - window + 1
        low = tl.maximum(low, bound - tl.where(is_tail, start, tl.load(origins_ptr + row0).to(tl.int32)))
    last_tile = tl.where(low < n, tl.cdiv(n, BLOCK_S), 0)

    group = tl.minimum(G, BLOCK_G)
    offs_m = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, D_PAD)
    offs_e = tl.arange(0, E_PAD)
    mask_d = offs_d < D
    mask_e = offs_e < E
    g = g0 + offs_m % group
    mask_m = (offs_m < rows * group) & (g < G)
    row_m = row0 + offs_m // group
    q_row = q_ptr + row_m * stride_qb + (head * G + g) * stride_qh
    q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0)

    address = sources_ptr + source * SOURCE
    keys = tl.load(address)
    values = tl.load(address + 1)
    page_ptr = tl.load(address + 2).to(tl.pointer_type(tl.int32)) + place
    dtype = k_ptr.dtype.element_ty
    tail_k = tl.multiple_of(keys.to(tl.pointer_type(dtype)), 16)
    tail_v = tl.multiple_of(values.to(tl.pointer_type(dtype)), 16)

    # The new token: the tail's first program starts from it, and appends it.
    new_k = k_ptr + row0 * stride_kb + head * stride_kh
    new_v = v_ptr + row0 * stride_vb + head * stride_vh
    column = (row0 * heads + head) * capacity + length
    # Of a program that does not start from it, no channel is loaded; of one that does not append it, none is stored.
    loaded = tl.where(own, KD, 0)
    appended = tl.where(own & (g0 == 0), KD, 0)
    k = tl.load(new_k + offs_d, mask=offs_d < tl.minimum(loaded, D), other=0.0)
    v = tl.load(new_v + offs_e, mask=offs_e < tl.where(own, E, 0), other=0.0)
    tl.store(tail_k + column * KD + offs_d, k, mask=offs_d < tl.minimum(appended, D))
    products = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1)
    if REST:
        offs_r = D + tl.arange(0, REST_PAD)
        mask_r = offs_r < KD
        q_rest = tl.load(q_row[:, None] + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        k_rest = tl.load(new_k + offs_r, mask=offs_r < loaded, other=0.0)
        tl.store(tail_k + column * KD + offs_r, k_rest, mask=offs_r < appended)
        products += tl.sum(q_rest.to(tl.float32) * k_rest.to(tl.float32)[None, :], 1)
    else:
        q_rest = q
    if not LATENT:
        tl.store(tail_v + column * VD + offs_e, v, mask=offs_e < tl.where(own & (g0 == 0), E, 0))
    m = tl.where(own, log2_logits(products, scaling, CAP), float("-inf"))
    l = tl.where(own, 1.0, 0.0) + tl.zeros([BLOCK_G], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_G, E_PAD], tl.float32) + v.to(tl.float32)[None, :]

    # Of two kinds of slots, a program has one.
    is_codes = source > 0 if FP8 else (source > 0) & (source % 2 == 0)
    if K_BITS or FP8:
        if not is_codes:
            m, l, acc = tiles.attend_tiles(  # noqa: E741
                q, q_rest, m, l, acc, tail_k, tail_v, page_ptr, low // BLOCK_S, last_tile, low, n, scaling,
                PAGE * KD, KD, PAGE * VD, VD,
                D, D_PAD, REST, REST_PAD, E, E_PAD, PAGE, BLOCK_S, 0, LATENT, CAP,
            )  # fmt: skip
        elif K_BITS:
            k_kind: tl.constexpr = tl.int32 if K_BITS < 16 else dtype
            v_kind: tl.constexpr = tl.int32 if V_BITS < 16 else dtype
            scale_kind: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
            k_words = tl.multiple_of(keys.to(tl.pointer_type(k_kind)), 16)
            v_words = tl.multiple_of(values.to(tl.pointer_type(v_kind)), 16)
            k_scales = tl.multiple_of(tl.load(address + 3).to(tl.pointer_type(scale_kind)), 16)
            v_scales = tl.multiple_of(tl.load(address + 4).to(tl.pointer_type(scale_kind)), 16)
            k_zeros = tl.multiple_of(tl.load(address + 5).to(tl.pointer_type(scale_kind)), 16)
            v_zeros = tl.multiple_of(tl.load(address + 6).to(tl.pointer_type(scale_kind)), 16)
            m, l, acc = attend_codes(  # noqa: E741
                q, m, l, acc, k_words, k_scales, k_zeros, v_words, v_scales, v_zeros, page_ptr, first // BLOCK_S,
                last_tile, scaling, D, D_PAD, E, E_PAD, PAGE, GROUP, K_BITS, V_BITS, BLOCK_S, CAP,
            )  # fmt: skip
        else:
            k_scale = tl.load(tl.load(address + 3).to(tl.pointer_type(tl.float32)) + head)
            v_scale = tl.load(tl.load(address + 4).to(tl.pointer_type(tl.float32)) + head)
            k_codes = tl.multiple_of(keys.to(tl.pointer_type(tl.uint8)), 16)
            v_codes = tl.multiple_of(values.to(tl.pointer_type(tl.uint8)), 16)
            m, l, acc = tiles.attend_tiles(  # noqa: E741
                q, q_rest, m, l, acc, k_codes, v_codes, page_ptr, low // BLOCK_S, last_tile, low, n,
                scaling * k_scale, PAGE * KD, KD, PAGE * VD, VD,
                D, D_PAD, REST, REST_PAD, E, E_PAD, PAGE, BLOCK_S, 1, LATENT, CAP,
            )  # fmt: skip
            acc *= v_scale
    else:
        m, l, acc = tiles.attend_tiles(  # noqa: E741
            q, q_rest, m, l, acc, tail_k, tail_v, page_ptr, low // BLOCK_S, last_tile, low, n, scaling,
            PAGE * KD, KD, PAGE * VD, VD,
            D, D_PAD, REST, REST_PAD, E, E_PAD, PAGE, BLOCK_S, 0, LATENT, CAP,
        )  # fmt: skip

    empty = l == 0.0
    part = number * BLOCK_G + offs_m
    tl.store(part_lse_ptr + part, tl.where(empty, float("-inf"), m + tl.log2(tl.where(empty, 1.0, l))))
    o = acc / tl.where(empty, 1.0, l)[:, None]
    tl.store(part_o_ptr + part[:, None] * E + offs_e[None, :], o, mask=mask_e[None, :])

    # All of this program's stores come before its arrival, and all arrivals before the loads of the last one.
    tl.debug_barrier()
    begin = tl.load(tiles_ptr + tile * TILE)
    end = tl.load(tiles_ptr + tile * TILE + 1)
    tails = tl.load(tiles_ptr + tile * TILE + 2)
    items = tl.load(tiles_ptr + tile * TILE + 3)
    arrived = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
    if arrived == items - 1:
        tl.store(arrived_ptr + tile, 0)
        # A tile has the rows of its context's items; a tail's item has one of them.
        lead = tl.load(items_ptr + tl.where(begin < end, begin, tails).to(tl.int64) * ITEM + 1).to(tl.int64)
        all_rows = (items - (end - begin)) // spans
        row_m = lead + offs_m // group
        mask_m = (offs_m < all_rows * group) & (g0 + offs_m % group < G)
        if SINK:
            sink = tl.load(sink_ptr + head * G + g0 + offs_m % group, mask=mask_m, other=0.0).to(tl.float32)
            m = sink * LOG2E
            l = tl.full([BLOCK_G], 1.0, tl.float32)  # noqa: E741
        else:
            m = tl.full([BLOCK_G], float("-inf"), tl.float32)
            l = tl.zeros([BLOCK_G], tl.float32)  # noqa: E741
        acc = tl.zeros([BLOCK_G, E_PAD], tl.float32)
        # The tails first: the new token, in their first items, makes m finite.
        for i in range(spans + end - begin):
            in_tail = i < spans
            of = tl.where(in_tail, tails + offs_m // group * spans + i, begin + i - spans).to(tl.int64)
            part = of * BLOCK_G + tl.where(in_tail, offs_m % group, offs_m)
            lse = tl.load(part_lse_ptr + part, mask=mask_m, other=0.0, cache_modifier=".cg")
            mask = mask_m[:, None] & mask_e[None, :]
            x = tl.load(part_o_ptr + part[:, None] * E + offs_e[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            m_new = tl.maximum(m, lse)
            alpha = tl.exp2(m - m_new)
            beta = tl.exp2(lse - m_new)
            acc = acc * alpha[:, None] + x * beta[:, None]
            l = l * alpha + beta  # noqa: E741
            m = m_new
        out = o_ptr + (row_m * heads * G + head * G + g0 + offs_m % group)[:, None] * E + offs_e[None, :]
        tl.store(out, (acc / l[:, None]).to(o_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_e[None, :])


def fits(contexts: Sequence[object], k: Tensor, v: Tensor) -> bool:
    """Whether the kernel has this layout: all contexts in full precision, in fp8 or over codes, of widths that `decode`
    has, and over codes equal ones of keys and values.

    k, v: [..., D] and [..., E], keys and values of the same kind as the contexts'.
    """
    if k.dtype not in DTYPES or not runs_kernels(k, "step"):
        return False
    # The interpreter represents bf16 as raw 16-bit integers.
    if INTERPRETED and k.dtype == torch.bfloat16:
        return False
    bits = {Codes.of(kv) if isinstance(kv, QuantKV) else None for kv in contexts}
    if bits != {None}:
        dims = k.shape[-1], v.shape[-1]
        return None not in bits and len(bits) == 1 and decode.fits(*dims) and dims[0] == dims[1]
    known = {type(kv) for kv in contexts} in ({PagedKV}, {Fp8KV})
    return known and decode.fits(k.shape[-1], v.shape[-1], latent=is_view(k, v))


def attend(
    q: Tensor, k: Tensor, v: Tensor, tail: tuple[Tensor, Tensor], length: Tensor, pads: Tensor, queue: WorkQueue,
    softmax: Softmax, window: Window | None = None,
) -> Tensor:  # fmt: skip
    """Append the new token to the tails, and attend.

    Args:
        q, k, v: [B, H, 1, D], [B, Hkv, 1, D] and [B, Hkv, 1, E].
        tail: as for `Workspace.queue`, which made `queue`.
        length: [1] int32, columns of the tails that are written; the token becomes the next.
        pads: [B] int64, columns of padding at the start of each tail.
        window: of a layer of which a query sees a window; `queue` then has a context for every row.

    Returns:
        [B, H, 1, E] in q's dtype.
    """
    q, k, v = (x[:, :, 0] for x in (q, k, v))
    B, H, D = q.shape
    E = v.shape[2]
    latent = is_view(*tail)
    o = torch.empty(B, H, 1, E, dtype=q.dtype, device=q.device)
    sizes = constants(q.dtype, D, E, softmax, queue.codes, latent=latent, window=window)
    starts, origins, size = (pads, pads, 1) if window is None else (window.starts, window.origins, window.size)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    with torch.cuda.device(q.get_device()):
        step_kernel[(len(queue.items),)](
            q, k, v, queue.sources, queue.items, queue.tiles, length, pads, q if softmax.sink is None else softmax.sink,
            starts, origins, queue.part_o, queue.part_lse, queue.arrived, o, softmax.scaling, H // k.shape[1],
            k.shape[1], queue.spans, tail[0].shape[2], size, *strides, **sizes, **options(q.dtype, sizes),
        )  # fmt: skip
    return o


def constants(
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    softmax: Softmax,
    codes: Codes,
    *,
    latent: bool = False,
    window: Window | None = None,
) -> dict[str, float]:
    """The compile-time arguments of `step_kernel`."""
    sizes = tiles.constants(dtype, head_dim, value_dim) | tiles.kinds(softmax.cap, latent, codes.fp8)
    if codes.k_bits:  # whole groups of values
        sizes |= {name: max(GROUP, int(sizes[name])) for name in ("D_PAD", "E_PAD")}
    sizes |= {"K_BITS": codes.k_bits, "V_BITS": codes.v_bits, "GROUP": GROUP}
    sizes |= {"WINDOW": 0 if window is None else 1 + window.chunked, "SINK": int(softmax.sink is not None)}
    return sizes | {"ITEM": ITEM, "TILE": TILE, "SOURCE": SOURCE}


def options(dtype: torch.dtype, sizes: Mapping[str, float]) -> dict[str, int | bool]:
    """The launch options: those of `decode`, but contexts in fp8, whose tails are not, spilled at 256 channels."""
    chosen = tiles.options(dtype, sizes)
    return chosen | {"num_warps": 8} if sizes["FP8"] and sizes["D_PAD"] == 256 else chosen


LIMITS = tile_limits(255, "step", "step.latent")
_FULL = Codes()


def variants() -> Iterator[Variant]:
    """The specialisations that `attend` uses."""
    plain = Softmax(1.0)
    for dtype, dim in head_dims():
        yield variant(dtype, dim, dim, plain)
    # Of codes, whose loops are gated with their own kernels, the sizes with the most registers.
    for dim, codes in [(128, Codes(True)), (256, Codes(True)), (128, Codes(False, 4, 4)), (256, Codes(False, 8, 4))]:
        yield variant("bf16", dim, dim, plain, codes)
    # Gemma 2; gpt-oss; Llama 4; MiMo-V2; DeepSeek-V3.
    none = torch.empty(0)
    yield variant("bf16", 256, 256, Softmax(1.0, cap=50.0), window=Window(1, False, none, none))
    yield variant("bf16", 64, 64, Softmax(1.0, sink=none), window=Window(1, False, none, none))
    yield variant("bf16", 128, 128, plain, window=Window(1, True, none, none))
    yield variant("bf16", 192, 128, plain)
    yield variant("bf16", 576, 512, plain, latent=True)


def variant(
    dtype: str,
    dim: int,
    value_dim: int,
    softmax: Softmax,
    codes: Codes = _FULL,
    *,
    latent: bool = False,
    window: Window | None = None,
) -> Variant:
    """`step_kernel` for one dtype and one kind of keys and values."""
    sizes = constants(TORCH[dtype], dim, value_dim, softmax, codes, latent=latent, window=window)
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "v", "sink", "o")}
    pointers |= {f"{name}_ptr": "*i32" for name in ("items", "tiles", "length", "arrived")}
    pointers |= {f"{name}_ptr": "*i64" for name in ("sources", "pads", "starts", "origins")}
    pointers |= {"part_o_ptr": "*fp32", "part_lse_ptr": "*fp32"}
    kind = f"{' cap' if softmax.cap else ''}{' sink' if softmax.sink is not None else ''}{' fp8' if codes.fp8 else ''}"
    kind += "" if window is None else " chunk" if window.chunked else " window"
    kind += f" kv{codes.k_bits}v{codes.v_bits}" if codes.k_bits else ""
    return Variant(
        kernel="step.latent" if latent else "step",
        name=f"{dtype} {widths(dim, value_dim)}{kind}",
        fn=step_kernel,
        pointers=pointers,
        floats=("scaling",),
        aligned=("stride_",),
        constants=sizes,
        options=options(TORCH[dtype], sizes),
    )
