"""A compressed context quantized to 8, 4 or 2 bits, and attention over it in PyTorch.

KIVI's layout (Liu et al. 2024): of the n slots that a head keeps, the oldest max(0, n - residual) // 64 pages are
quantized once; the newest n - 64 * pages stay in full precision, in a separate `PagedKV`. A number x of a group
with lowest value `low` and highest value `high` is stored as

    zero = floor16(low),   scale = ceil16((high - zero) / (2**b - 1)),   code = round((x - zero) / scale)

and dequantized as code * scale + zero. floor16 and ceil16 round to 16 bits (bfloat16 for bfloat16 models, else float16)
downwards and upwards: the 2**b levels cover the whole group, so the error of a value is at most scale / 2, and a
constant group that 16 bits represent is exact. Values above 65504 in a float32 model saturate at float16's range.

    keys    groups of 32 consecutive slots of one channel, two a page (outliers live in channels)
            words [P, PAGE * b / 32, D] int32    slot s of its page: word s * b // 32, from bit s * b % 32 on
            scale, zero [P, PAGE / 32, D]
    values  groups of 32 channels of one slot; the last one is smaller if 32 does not divide D
            words [P, PAGE, ceil(D * b / 32)] int32    channel d: word d * b // 32, from bit d * b % 32 on
            scale, zero [P, PAGE, ceil(D / 32)]

With 16 bits `words` is the pool [P, PAGE, D] in the model's dtype, without scale and zero. Only full pages are
quantized, so the pools have no slack; each head's pages are contiguous, heads in row order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lceval.kernels import dense
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.softmax import capped

GROUP = 32
BITS = (16, 8, 4, 2)
# Numbers that are dequantized to float32 at a time, 4 MiB. Measured on one core with 1 MiB of L2, over 6000 slots of
# 3 x 64 and of 8 x 128: an eighth takes 1.6 times as long, and four times as many up to 1.4 times.
WORKSPACE = 1 << 20
# Up to this many query rows a KV head, keys are multiplied in their memory layout (see `_scores`); the two methods
# took equally long at 8 to 16 rows.
FEW_ROWS = 8


def reference(x: Tensor, bits: int, stored: torch.dtype) -> Tensor:
    """The definition: x [n, m] float32 quantized and dequantized, groups along the last axis (keys: [D, n]).

    stored: dtype of scale and zero.
    """
    out = torch.empty_like(x)
    for i in range(x.shape[0]):
        for start in range(0, x.shape[1], GROUP):
            group = x[i, start : start + GROUP]
            zero = -ceil16(-group.min(), stored).float()
            scale = ceil16((group.max() - zero) / (2**bits - 1), stored).float()
            codes = ((group - zero) / scale).round().clamp(0, 2**bits - 1) if scale > 0 else torch.zeros_like(group)
            out[i, start : start + GROUP] = codes * scale + zero
    return out


def ceil16(x: Tensor, stored: torch.dtype) -> Tensor:
    """x float32 rounded up to a 16-bit float type, clamped to its largest finite number."""
    top = torch.finfo(stored).max
    x = x.clamp(-top, top)
    y = x.to(stored)
    # Adding 1 to the bits gives the next larger magnitude, so negative numbers need -1.
    up = torch.where(y.view(torch.int16) < 0, -1, 1) * (y.float() < x)
    return (y.view(torch.int16) + up.to(torch.int16)).view(stored)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] below 2**bits into int32 words [..., ceil(n * bits / 32)], the first in the lowest bits."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes.int(), (0, -codes.shape[-1] % per_word))
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_word, per_word)
    return (codes << _shifts(bits, 32, codes)).sum(-1, dtype=torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes [..., W * 32 / bits] int32 of words [..., W]."""
    return (words[..., None] >> _shifts(bits, 32, words)).bitwise_and_(2**bits - 1).flatten(-2)


def _shifts(step: int, width: int, like: Tensor) -> Tensor:
    return torch.arange(0, width, step, dtype=torch.int32, device=like.device)


@dataclass(frozen=True)
class Pool:
    """The quantized pages of all keys or of all values of a layer, in the layout above.

    Attributes:
        words: packed codes; full-precision numbers if bits is 16.
        scale, zero: one of each per group; None if bits is 16.
    """

    bits: int
    words: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.words, self.scale, self.zero) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @classmethod
    def quantize(cls, pool: Tensor, index: Tensor, bits: int, *, keys: bool) -> Pool:
        """Pages `index` [P] of a full-precision pool [*, PAGE, D], in blocks of bounded size."""
        if bits == 16:
            return cls(bits, pool[index])
        pages, dim = len(index), pool.shape[-1]
        stored = torch.bfloat16 if pool.dtype == torch.bfloat16 else torch.float16
        groups = (PAGE // GROUP, dim) if keys else (PAGE, -(-dim // GROUP))
        codes = (PAGE * bits // 32, dim) if keys else (PAGE, -(-dim * bits // 32))
        words = torch.empty(pages, *codes, dtype=torch.int32, device=pool.device)
        scale, zero = (torch.empty(pages, *groups, dtype=stored, device=pool.device) for _ in range(2))
        for span in _spans(pages, WORKSPACE // (PAGE * dim)) if pages else []:
            x = pool[index[span]].float().transpose(1, 2) if keys else pool[index[span]].float()
            # A short last group repeats its last channel, which leaves minimum and maximum unchanged.
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], -x.shape[-1] % GROUP)], -1)
            x = x.view(*x.shape[:-1], -1, GROUP)
            low, high = x.aminmax(dim=-1, keepdim=True)
            z = -ceil16(-low, stored)
            s = ceil16((high - z.float()) / (2**bits - 1), stored)
            x = (x - z.float()).div_(torch.where(s > 0, s.float(), 1.0)).round_().clamp_(0, 2**bits - 1)
            packed = pack(x.flatten(-2)[..., : PAGE if keys else dim], bits)
            words[span] = packed.transpose(1, 2) if keys else packed
            scale[span], zero[span] = ((t[..., 0].transpose(1, 2) if keys else t[..., 0]) for t in (s, z))
        return cls(bits, words, scale, zero)

    def take_keys(self, page: Tensor, slot: Tensor) -> Tensor:
        """Keys [m, D] at slots [m] of pages [m]."""
        if self.scale is None or self.zero is None:
            return self.words[page, slot]
        bit = slot * self.bits
        codes = (self.words[page, bit // 32] >> (bit % 32).int()[:, None]).bitwise_and_(2**self.bits - 1)
        at = page, slot // GROUP
        return torch.addcmul(self.zero[at].float(), codes, self.scale[at].float())

    def take_values(self, page: Tensor, slot: Tensor, dim: int) -> Tensor:
        """Values [m, D] at slots [m] of pages [m]."""
        if self.scale is None or self.zero is None:
            return self.words[page, slot]
        codes = unpack(self.words[page, slot], self.bits)[:, :dim]
        scale, zero = (t[page, slot].float().repeat_interleave(GROUP, 1)[:, :dim] for t in (self.scale, self.zero))
        return torch.addcmul(zero, codes, scale)

    def heads(self, first: int, rows: int, pages: int) -> Pool:
        """Views [rows, pages, ...] of `rows` heads of `pages` pages each, from page `first` on."""
        return self._map(lambda t: t[first : first + rows * pages].view(rows, pages, *t.shape[1:]))

    def pages(self, span: slice) -> Pool:
        """Pages `span` of each head, of a view from `heads`."""
        return self._map(lambda t: t[:, span])

    def _map(self, view: Callable[[Tensor], Tensor]) -> Pool:
        return Pool(self.bits, *map(view, self.tensors))

    def planes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers as x * scale + zero, with x in the codes' memory layout: byte by byte.

        Code c of a word is in plane c % planes, in byte c // planes. It is shifted to the upper end of that byte and
        interpreted as a signed number around the middle of its group: relative to the lowest value, cancellation in
        sums over 6000 slots gave an error of 7e-5, not 2e-6. This takes a tenth of the time of shifting every code out
        of its word.

        Returns x [8 / bits, *words.shape[:-1], 4 * words.shape[-1]], scale and zero shaped as stored, all float32.
        """
        assert self.scale is not None and self.zero is not None  # noqa: PT018
        # Half a step, if the byte has room for it below the code: 4 bits span -7.5 to 7.5 steps.
        half = 2 ** (7 - self.bits) if self.bits < 8 else 0
        words = self.words[None]
        if self.bits < 8:
            shifts = _shifts(self.bits, 8, words).flip(0).view(-1, *[1] * self.words.ndim)
            words = (words << shifts).bitwise_and_(_every_byte(256 - 2 ** (8 - self.bits)))
        x = words.bitwise_xor(_every_byte(128 + half)).view(torch.int8).float()
        scale = self.scale.float() * 2.0 ** (self.bits - 8)
        return x, scale, torch.add(self.zero, scale, alpha=128 - half)


def _every_byte(value: int) -> int:
    """An int32 with `value` in each of its four bytes."""
    return int.from_bytes(bytes([value] * 4), "little", signed=True)


@dataclass(frozen=True)
class QuantKV:
    """One layer of a compressed context, quantized except the newest slots. Immutable.

    Attributes:
        k, v: the quantized pages.
        table: [B, Hkv, M] int32, quantized pages of each head, in order; entries past its last page are 0.
        pages: quantized pages of each head, on the host, row by row.
        positions: [P, PAGE] int32, original position of each quantized slot; None if every token was kept.
        residual: the newest slots of each head, in full precision.
        lens, counts: as in `KV`, of all slots.
    """

    k: Pool
    v: Pool
    table: Tensor
    pages: tuple[int, ...]
    positions: Tensor | None
    residual: PagedKV
    lens: Tensor
    counts: tuple[int, ...]

    @classmethod
    def quantize(cls, kv: PagedKV, k_bits: int, v_bits: int, residual: int = 128) -> QuantKV:
        """Quantize `kv` except the newest slots of every head: at least `residual` of them, or all if it has fewer.

        Raises:
            ValueError: bits other than 16, 8, 4, 2, or a negative residual.
        """
        if k_bits not in BITS or v_bits not in BITS or residual < 0:
            raise ValueError(f"bits are one of {BITS} and residual at least 0, got {k_bits}, {v_bits}, {residual}")
        pages = tuple(max(0, n - residual) // PAGE for n in kv.counts)
        used = [-(-n // PAGE) for n in kv.counts]
        table = kv.table.flatten(0, 1)
        at = torch.arange(table.shape[1], device=table.device)
        first, last = (torch.tensor(x, device=table.device)[:, None] for x in (pages, used))
        old, new = (table[mask].long() for mask in (at < first, (at >= first) & (at < last)))
        left = [n - PAGE * p for n, p in zip(kv.counts, pages, strict=True)]
        return cls(
            k=Pool.quantize(kv.k, old, k_bits, keys=True),
            v=Pool.quantize(kv.v, old, v_bits, keys=False),
            table=_table(pages, kv.lens),
            pages=pages,
            positions=None if kv.positions is None else kv.positions[old],
            residual=PagedKV(
                k=kv.k[new],
                v=kv.v[new],
                table=_table([u - p for u, p in zip(used, pages, strict=True)], kv.lens),
                lens=torch.tensor(left, dtype=torch.int32, device=kv.lens.device).view(kv.lens.shape),
                positions=None if kv.positions is None else kv.positions[new],
                counts=tuple(left),
            ),
            lens=kv.lens,
            counts=kv.counts,
        )

    @property
    def value_dim(self) -> int:
        """As `KV.value_dim`."""
        return self.residual.value_dim

    @property
    def kept_bytes(self) -> int:
        """Bytes of codes, scales, zeros and positions (quantized pages are all full) and of the residual's slots."""
        at = 0 if self.positions is None else self.positions.nbytes
        return self.k.nbytes + self.v.nbytes + at + self.residual.kept_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors, including the residual's page slack, tables and lengths."""
        tables = self.table.nbytes + self.lens.nbytes
        return self.kept_bytes - self.residual.kept_bytes + tables + self.residual.allocated_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes that one decoding step reads: codes, scales, zeros and residual slots."""
        return self.k.nbytes + self.v.nbytes + self.residual.read_bytes

    def kept_positions(self, b: int, h: int) -> Tensor:
        """[n] int64, the original positions of one head's slots, ascending."""
        row = b * self.lens.shape[1] + h
        if self.positions is None:
            return torch.arange(self.counts[row], device=self.lens.device)
        old = self.positions[self.table[b, h, : self.pages[row]].long()].flatten().long()
        return torch.cat([old, self.residual.kept_positions(b, h)])

    def head(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, D] of head `row`, dequantized, in the model's dtype."""
        old = self._take_quantized(row, torch.arange(self.pages[row] * PAGE, device=self.table.device))
        new = self.residual.head(row)
        return torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]])

    def take(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [m, D] of slots [m] of head `row`; only these are dequantized."""
        split = self.pages[row] * PAGE
        if split == 0:
            return self.residual.take(row, slots)
        old = self._take_quantized(row, slots.clamp(max=split - 1))
        if split == self.counts[row]:
            return old
        # Both sources for every slot: separating them first would wait for the device.
        new = self.residual.take(row, (slots - split).clamp_(min=0))
        is_old = (slots < split)[:, None]
        return torch.where(is_old, old[0], new[0]), torch.where(is_old, old[1], new[1])

    def _take_quantized(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        page, slot = self.table.flatten(0, 1)[row][slots // PAGE].long(), slots % PAGE
        k, v = self.k.take_keys(page, slot), self.v.take_values(page, slot, self.residual.v.shape[-1])
        dtype = self.residual.k.dtype
        top = torch.finfo(
            dtype
        ).max  # a float16 group that ends there can dequantize above it, since its scale is rounded up
        return k.clamp(-top, top).to(dtype), v.clamp(-top, top).to(dtype)

    def attend(self, q: Tensor, scaling: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
        """As `KV.attend`: over the residual, and in float32 over the quantized pages, merged by log-sum-exp."""
        o, lse = self.residual.attend(q, scaling, cap)
        if not any(self.pages):
            return o, lse
        shape = self.lens.shape
        rows, row_o, row_lse = (dense.folded(x, *shape) for x in (q.float() * scaling, o.float(), lse[..., None]))
        for heads, k, v in self._heads():
            # Scores of a long question are computed in blocks of pages.
            limit = dense.block_rows(k.words.shape[0] * rows.shape[1] * PAGE, q.device)
            for span in _spans(k.words.shape[1], limit):
                part_o, part_lse = _attend_pages(rows[heads], k.pages(span), v.pages(span), self.value_dim, cap)
                row_o[heads] = dense.merge(part_o, part_lse, row_o[heads], row_lse[heads, :, 0])
                row_lse[heads, :, 0] = torch.logaddexp(part_lse, row_lse[heads, :, 0])
        return dense.unfolded(row_o, q.shape, shape[1]).to(q.dtype), dense.unfolded(row_lse, q.shape, shape[1])[..., 0]

    def _heads(self) -> Iterator[tuple[slice, Pool, Pool]]:
        """Rows and their pages: all at once if every head has the same number, else one head at a time."""
        equal_counts = len(set(self.pages)) == 1
        rows = len(self.pages) if equal_counts else 1
        for row, first in enumerate(accumulate(self.pages[:-1], initial=0)):
            if (pages := self.pages[row]) and not (equal_counts and row):
                yield slice(row, row + rows), self.k.heads(first, rows, pages), self.v.heads(first, rows, pages)


def _attend_pages(q: Tensor, k: Pool, v: Pool, value_dim: int, cap: float | None) -> tuple[Tensor, Tensor]:
    """q [R, M, D] float32, scaled, over k and v of [R, pages, ...] into o [R, M, D] and lse [R, M].

    Scales are multiplied into the codes in blocks of pages, since a product per group is slower on CPUs.
    A group's zero enters once, as sum_d q_d zero_d to the group's scores and as sum_s p_s zero_s to the output.
    """
    rows, queries, dim = q.shape
    scores = q.new_empty(rows, queries, k.words.shape[1], PAGE)
    spans = _spans(k.words.shape[1], WORKSPACE // (rows * PAGE * dim))
    for span in spans:
        _scores(q, k.pages(span), scores[:, :, span])
    scores = capped(scores, cap)
    lse = torch.logsumexp(scores, (2, 3))
    scores.sub_(lse[..., None, None]).exp_()
    o = q.new_zeros(rows, queries, value_dim)
    for span in spans:
        o += _weigh(scores[:, :, span].flatten(2), v.pages(span), value_dim)
    return o, lse


def _scores(q: Tensor, k: Pool, out: Tensor) -> None:
    """q [R, M, D] against the keys of k into out [R, M, pages, PAGE].

    The bytes of a word are slots of one channel, so keys are stored as [word, D, byte], not as [slot, D]. If a new
    layout costs more than the product, four copies of q, each nonzero at one byte only, multiply them in place.
    """
    rows, queries, dim = q.shape
    if k.bits == 16:
        out.copy_(torch.matmul(q, k.words.flatten(1, 2).float().transpose(1, 2)).view_as(out))
        return
    x, scale, zero = k.planes()
    x.view(*x.shape[:3], PAGE // GROUP, -1, x.shape[-1]).mul_(scale.repeat_interleave(4, -1)[..., None, :])
    x = x.flatten(2, 3)
    if queries > FEW_ROWS:
        keys = x.view(*x.shape[:3], dim, 4).permute(1, 2, 4, 0, 3).reshape(rows, -1, dim)
        out.copy_(torch.matmul(q, keys.transpose(1, 2)).view_as(out))
    else:
        spread = (q[:, :, None, :, None] * torch.eye(4, device=q.device)[:, None]).view(rows, -1, dim * 4)
        products = torch.matmul(spread, x.transpose(-1, -2)).view(-1, rows, queries, 4, x.shape[2])
        out.flatten(2).view(rows, queries, -1, 4, x.shape[0]).copy_(products.permute(1, 2, 4, 3, 0))
    bias = torch.matmul(q, zero.flatten(1, 2).transpose(1, 2)).view(rows, queries, -1, PAGE // GROUP, 1)
    out.view(*out.shape[:3], -1, GROUP).add_(bias)


def _weigh(weights: Tensor, v: Pool, dim: int) -> Tensor:
    """The values of v, weighted by weights [R, M, pages * PAGE] and summed: [R, M, D]."""
    if v.bits == 16:
        return torch.matmul(weights, v.words.flatten(1, 2).float())
    x, scale, zero = v.planes()
    x.mul_(scale.repeat_interleave(GROUP // x.shape[0], -1)[..., : x.shape[-1]])
    o = torch.matmul(weights, x.flatten(2, 3)).permute(1, 2, 3, 0).flatten(2)[..., :dim]
    zeros = torch.matmul(weights, zero.flatten(1, 2))
    return o + zeros.repeat_interleave(GROUP, -1)[..., :dim]


def _spans(pages: int, limit: int) -> list[slice]:
    """Slices of at most `limit` pages, of nearly equal size."""
    step = -(-pages // -(-pages // limit))
    return [slice(start, min(start + step, pages)) for start in range(0, pages, step)]


def _table(pages: Sequence[int], lens: Tensor) -> Tensor:
    """[B, Hkv, M] int32: page ids, consecutive over all heads."""
    at = torch.arange(max(pages, default=0), device=lens.device)
    count = torch.tensor(pages, dtype=torch.int64, device=lens.device)[:, None]
    ids = count.cumsum(0) - count + at
    return torch.where(at < count, ids, 0).int().view(*lens.shape, len(at))
