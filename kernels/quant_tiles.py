# ruff: noqa: N803, N806
"""What the kernels over quantized pages share: the loop over tiles of codes, dequantized in registers."""

from __future__ import annotations

from lceval.kernels.launch import jit, tl
from lceval.kernels.softmax import log2_logits


@jit()
def expand(words, scale, zero, BITS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes FIRST, FIRST + STEP, ... of each word c: scale * (1 + c / 2**BITS) + zero, along new axes of 2."""
    if STEP * BITS == 32:
        # A code in the upper bits of the fraction of 1.0 needs no conversion, which has a quarter of the throughput.
        TOP: tl.constexpr = 23 - BITS
        AT: tl.constexpr = FIRST * BITS
        code = words << (TOP - AT) if AT <= TOP else words >> (AT - TOP)
        x = (code & (((1 << BITS) - 1) << TOP)) | 0x3F800000
        return x.to(tl.float32, bitcast=True) * scale + zero
    else:
        even = expand(words, scale, zero, BITS, FIRST, 2 * STEP)
        odd = expand(words, scale, zero, BITS, FIRST + STEP, 2 * STEP)
        return tl.join(even, odd)


@jit()
def attend_codes(  # type: ignore[no-untyped-def]
    q, m, l, acc, k_ptr, k_scale_ptr, k_zero_ptr, v_ptr, v_scale_ptr, v_zero_ptr, page_ptr,  # noqa: E741
    first, last, scaling,
    D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BLOCK_S: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Compute the softmax m [G] (log2), l [G], acc [G, E] of queries q [G, D] over the tiles from `first` to `last`.

    m, l and acc are those of no slots. Pages are full, and listed at `page_ptr`; their layout is that of quant.py.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    TILES: tl.constexpr = PAGE // BLOCK_S
    # A word packs K_PER slots of a channel, or V_PER channels of a slot; with 16 bits one number is one word.
    K_PER: tl.constexpr = 32 // K_BITS if K_BITS < 16 else 1
    V_PER: tl.constexpr = 32 // V_BITS if V_BITS < 16 else 1
    K_ROWS: tl.constexpr = BLOCK_S // K_PER
    V_WORDS: tl.constexpr = (E + V_PER - 1) // V_PER
    C: tl.constexpr = (E + GROUP - 1) // GROUP
    C_PAD: tl.constexpr = E_PAD // GROUP
    dtype: tl.constexpr = q.dtype
    offs_d = tl.arange(0, D_PAD)
    offs_e = tl.arange(0, E_PAD)
    offs_s = tl.arange(0, BLOCK_S)
    offs_w = tl.arange(0, K_ROWS)
    offs_c = tl.arange(0, C_PAD)
    offs_v = offs_c[None, :, None] * (GROUP // V_PER) + tl.arange(0, GROUP // V_PER)[None, None, :]
    mask_d = offs_d < D
    mask_e = offs_e < E
    mask_c = (offs_c < C)[None, :]
    # Loaded one tile ahead, as in tiles.py.
    page = tl.load(page_ptr + first // TILES, mask=first < last, other=0).to(tl.int64)
    if K_BITS < 16:
        group = page * (PAGE // GROUP) * D + offs_d
        # Without pages the pool may be empty.
        mask = offs_d < tl.where(first < last, D, 0)
        centre = tl.load(k_zero_ptr + group, mask=mask, other=0.0).to(tl.float32)
        centre += tl.load(k_scale_ptr + group, mask=mask, other=0.0).to(tl.float32) * (1 << (K_BITS - 1))
        bias = tl.sum(q.to(tl.float32) * centre[None, :], 1)
    for tile in range(first, last):
        row = tile % TILES
        v_row = page * PAGE + row * BLOCK_S + offs_s
        if V_BITS < 16:
            at_v = v_row[:, None] * C + offs_c[None, :]
            v_scale = tl.load(v_scale_ptr + at_v, mask=mask_c, other=0.0).to(tl.float32) * (1 << V_BITS)
            v_zero = tl.load(v_zero_ptr + at_v, mask=mask_c, other=0.0).to(tl.float32) - v_scale
            v = tl.load(v_ptr + v_row[:, None, None] * V_WORDS + offs_v, mask=offs_v < V_WORDS, other=0)
        else:
            v = tl.load(v_ptr + v_row[:, None] * E + offs_e[None, :], mask=mask_e[None, :], other=0.0)
        k_row = (page * TILES + row) * K_ROWS + offs_w
        mask_k = mask_d[:, None]
        k = tl.load(k_ptr + k_row[None, :] * D + offs_d[:, None], mask=mask_k, other=0)
        if K_BITS < 16:
            at_k = (page * PAGE + row * BLOCK_S + offs_w * K_PER)[None, :] // GROUP * D + offs_d[:, None]
            scale = tl.load(k_scale_ptr + at_k, mask=mask_k, other=0.0)
            zero = tl.load(k_zero_ptr + at_k, mask=mask_k, other=0.0)
            scale = scale.to(tl.float32) * (1 << K_BITS)
            zero = zero.to(tl.float32) - centre[:, None] - scale
            k = expand(k, scale, zero, K_BITS, 0, 1).to(dtype).reshape(D_PAD, BLOCK_S)
        products = tl.dot(q, k, input_precision="ieee")
        if K_BITS < 16 and CAP > 0:  # otherwise the common part is added at the end
            products += bias[:, None]
        scores = log2_logits(products, scaling, CAP)
        m_new = tl.maximum(m, tl.max(scores, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        if V_BITS < 16:
            v = expand(v, v_scale[:, :, None], v_zero[:, :, None], V_BITS, 0, 1).to(dtype).reshape(BLOCK_S, E_PAD)
        acc = tl.dot(p.to(dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
        page = tl.load(page_ptr + (tile + 1) // TILES, mask=tile + 1 < last, other=0).to(tl.int64)
    if K_BITS < 16 and CAP == 0:
        m += bias * (scaling * LOG2E)
    return m, l, acc
