"""RetrievalAttention: the sinks, the most recent tokens, and what a nearest-neighbour search finds in between."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lceval.kernels.paged import KV
from lceval.kernels.select import promise, selective
from lceval.models.policies.base import SINKS, Amount

# Below this many vectors a head is searched exhaustively: clustering so few gains nothing.
SMALL = 1024
# Lists are probed that on average hold this many times the slots wanted, and at least this share of all: fewer find
# too little (on rotated, anisotropic keys a quarter finds 80% of the best 64, a sixteenth 38%).
OVERSAMPLE = 4
LEAST_PROBED = 0.25
# The score of a slot that is always read; a mean of softmaxes is at most 1.
PINNED = 2.0


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Attend to `sinks` first and `recent` last slots and to the keys nearest to the query by inner product.

    Liu et al. 2024 (arXiv 2409.10516, section 3), with two differences: the context's slots stay on one device, and
    the search is an inverted file (`index=ivf`, faiss) that knows keys alone, where the paper's graph is built from
    the prefill's queries too. `index=exact` searches exhaustively: the best any index could do.

    Of a budget below sinks + recent, the most recent slots take all they can. Every query head of a KV head searches
    for itself; what they find is ranked together, by the mean of their softmaxes over it. Where they find fewer slots
    than the budget allows, the earliest others fill it.

    Attributes:
        nprobe: inverted lists to search, of about sqrt(n); 0 for as many as hold four times the budget on
            average, at least a quarter of them.
        skip: how many of the first layers are read whole.
    """

    amount: Amount
    sinks: int = SINKS
    recent: int = 64
    index: str = "ivf"
    nprobe: int = 0
    skip: int = 0

    def __post_init__(self) -> None:
        if self.index not in ("ivf", "exact"):
            raise ValueError("index is ivf or exact")
        if min(self.sinks, self.recent, self.nprobe, self.skip) < 0:
            raise ValueError("sinks, recent, nprobe and skip are at least 0")

    def wrap(self, kv: KV, layer: int, context_tokens: int) -> KV:
        """One layer's slots, read selectively; the amount is of the context's tokens, not of the kept ones."""
        if layer < self.skip:
            return kv
        budget = self.amount.tokens(context_tokens)
        recent = min(self.recent, budget)
        sinks = min(self.sinks, budget - recent)

        def build(keys: Iterable[Tensor]) -> Nearest:
            wanted = budget - sinks - recent
            between = (k[sinks : len(k) - recent] if len(k) else k for k in keys)
            return Nearest.build(between, sinks, recent, wanted, self.nprobe if self.index == "ivf" else None)

        return selective(kv, budget, build)


@dataclass(frozen=True)
class Nearest:
    """Keys to search, between slots that are always read.

    Attributes:
        keys: [sum of n, D], the keys of heads that are searched exhaustively, side by side.
        starts: each head's first key in `keys`.
        files: each head's inverted file (faiss.IndexIVFFlat), or None.
        sinks, recent: slots before and after those indexed, always selected.
        wanted: slots to find for every query head.
    """

    keys: Tensor
    starts: tuple[int, ...]
    files: tuple[Any, ...]
    sinks: int
    recent: int
    wanted: int

    unit = 1

    @classmethod
    def build(cls, keys: Iterable[Tensor], sinks: int, recent: int, wanted: int, nprobe: int | None) -> Nearest:
        """From the keys [n, D] to search of every head. nprobe as in `Retrieval`; None searches exhaustively."""
        files, exhaustive = [], []
        for k in keys:
            file = nprobe is not None and wanted > 0 and len(k) >= SMALL
            files.append(inverted_file(k, wanted, nprobe or 0) if file else None)
            # Nothing is searched where sinks and recent slots take the whole budget.
            exhaustive.append(k[:0] if file or not wanted else k)
        starts = accumulate((len(k) for k in exhaustive[:-1]), initial=0)
        return cls(torch.cat(exhaustive), tuple(starts), tuple(files), sinks, recent, wanted)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the keys, faiss' float32 copies of them, its 64-bit ids and its centroids."""
        copies: int = sum(f.ntotal * (4 * f.d + 8) + f.nlist * 4 * f.d for f in self.files if f)
        return self.keys.numel() * self.keys.element_size() + copies

    @property
    def read_bytes(self) -> int:
        """Bytes that a search of one query head reads: all keys, or all centroids and lists of average length.

        The other query heads of a KV head read the same keys, but may probe other lists.
        """
        probed: int = sum(f.ntotal * f.nprobe // f.nlist * (4 * f.d + 8) + f.nlist * 4 * f.d for f in self.files if f)
        return self.keys.numel() * self.keys.element_size() + probed

    def scores(self, first: int, n: int, q: Tensor, scaling: float) -> Tensor:
        """[R, Q, n] float32, as `Index.scores`. q: [R, Q, G, D]."""
        heads, queries = q.shape[:2]
        scores = torch.full((heads, queries, n), PINNED, device=q.device)
        between = scores[..., self.sinks : n - self.recent]
        if not self.wanted:
            between.zero_()
        elif self.files[first] is None:
            own = slice(self.starts[first], self.starts[first] + heads * between.shape[-1])
            keys = self.keys[own].view(heads, -1, q.shape[-1])
            logits = torch.matmul(q.flatten(1, 2), keys.transpose(1, 2)).float().mul_(scaling)
            between.copy_(promise(logits.view(*q.shape[:3], -1)))
        else:
            found = [_search(self.files[first + i], q[i] * scaling, self.wanted) for i in range(heads)]
            between.copy_(torch.stack(found))
        return scores


def _search(file: Any, q: Tensor, wanted: int) -> Tensor:
    """[Q, n] float32 on the CPU: mean over G of the softmaxes over what each of q [Q, G, D], scaled, finds in `file`.

    It is `promise` over logits that are -inf wherever nothing was found.
    """
    queries, group, dim = q.shape
    logits, slots = (torch.from_numpy(x) for x in file.search(q.reshape(-1, dim).float().cpu().numpy(), wanted))
    # A search that finds too few fills its answer with slot -1, whose column is cut off again.
    scores = torch.zeros(queries, file.ntotal + 1)
    weights = logits.softmax(-1).div_(group)
    return scores.scatter_add_(1, slots.view(queries, -1) + 1, weights.view(queries, -1))[:, 1:]


def inverted_file(k: Tensor, wanted: int, nprobe: int) -> Any:
    """A faiss.IndexIVFFlat over keys [n, D]. The clustering is seeded: the same keys give the same lists.

    A graph (HNSW, 16 links) over 6000 anisotropic keys took 7 times as long to build and twice as long to search, and
    found 62% of the best tenth where probing 40% of the lists found 85%.
    """
    import faiss

    n, dim = k.shape
    lists = round(math.sqrt(n))
    file = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    # faiss prints a warning below 39 vectors a list; lists here have sqrt(n).
    file.cp.min_points_per_centroid = 1
    rows = k.float().cpu().numpy()
    file.train(rows)
    file.add(rows)
    file.nprobe = min(lists, nprobe or math.ceil(max(LEAST_PROBED, OVERSAMPLE * wanted / n) * lists))
    return file
