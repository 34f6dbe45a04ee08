"""RetrievalAttention: sparse attention to sinks, recent tokens and the nearest keys in between."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lceval.kernels.dense import attention_logits
from lceval.kernels.paged import KV
from lceval.kernels.select import mean_softmax, selective
from lceval.models.policies.base import SINKS, Amount

# Below this many vectors a head is searched exhaustively: clustering would not pay off.
SMALL = 1024
# The probed lists hold on average this many times the slots to select, and at least this share of all: fewer lower the
# recall (on rotated, anisotropic keys a quarter has a recall of 80% of the best 64, a sixteenth 38%).
OVERSAMPLE = 4
LEAST_PROBED = 0.25
# The score of a slot that is always selected; a mean of softmaxes is at most 1.
PINNED = 2.0


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Attend to sinks, recent slots and the keys nearest to the query by inner product (RetrievalAttention,
    Liu et al. 2024, arXiv 2409.10516, section 3).

    The first `sinks` and the last `recent` slots are always selected; a budget below their sum goes to the most recent
    slots first. Each query head of a KV head searches separately; the results are ranked together by the mean of their
    softmaxes. If the search returns fewer slots than the budget, the earliest other slots fill it. `index=exact`
    searches exhaustively, the upper bound of any index. The first `skip` layers stay dense.

    Differs from the paper: all slots stay on one device, and `index=ivf` (an inverted file of faiss) is built from keys
    only, while the paper's graph is also built from the queries of the prefill.

    Cost: no memory is freed; `index=ivf` builds and searches its index on the CPU.

    Attributes:
        nprobe: inverted lists to search, of about sqrt(n); 0 searches as many as contain four times the budget on
            average, and at least a quarter.
    """

    amount: Amount
    sinks: int = SINKS
    recent: int = 64
    index: str = "ivf"
    nprobe: int = 0
    skip: int = 0

    def __post_init__(self) -> None:
        if self.index not in ("ivf", "exact"):
            raise ValueError("index must be ivf or exact")
        if min(self.sinks, self.recent, self.nprobe, self.skip) < 0:
            raise ValueError("sinks, recent, nprobe and skip must be at least 0")

    def wrap(self, kv: KV, layer: int, context_tokens: int) -> KV:
        """One layer's slots with sparse attention; a share is of the context's tokens, not of the kept ones."""
        if layer < self.skip:
            return kv
        budget = self.amount.tokens(context_tokens)
        recent = min(self.recent, budget)
        sinks = min(self.sinks, budget - recent)

        def build(keys: Iterable[Tensor]) -> Nearest:
            searched = budget - sinks - recent
            between = (k[sinks : len(k) - recent] if len(k) else k for k in keys)
            return Nearest.build(between, sinks, recent, searched, self.nprobe if self.index == "ivf" else None)

        return selective(kv, budget, build)


@dataclass(frozen=True)
class Centroids:
    """What determines a head's inverted file beside its keys: the centres of the lists [n, D], and lists to search."""

    centres: Tensor
    nprobe: int


@dataclass(frozen=True)
class Nearest:
    """A search index over the keys between the slots that are always selected.

    Attributes:
        keys: [sum of n, D], concatenated keys of the heads that are searched exhaustively.
        starts: first key of each head in `keys`.
        files: inverted file (faiss.IndexIVFFlat) of each head, or None; Centroids in a saved index.
        sinks, recent: slots before and after the indexed ones, always selected.
        count: slots to retrieve for every query head.
    """

    keys: Tensor
    starts: tuple[int, ...]
    files: tuple[Any, ...]
    sinks: int
    recent: int
    count: int

    unit = 1

    @classmethod
    def build(cls, keys: Iterable[Tensor], sinks: int, recent: int, count: int, nprobe: int | None) -> Nearest:
        """Build the index from each head's keys [n, D]. nprobe as in `Retrieval`; None searches exhaustively."""
        files, exhaustive = [], []
        for k in keys:
            file = nprobe is not None and count > 0 and len(k) >= SMALL
            files.append(inverted_file(k, count, nprobe or 0) if file else None)
            # No search if sinks and recent slots take the whole budget.
            exhaustive.append(k[:0] if file or not count else k)
        starts = accumulate((len(k) for k in exhaustive[:-1]), initial=0)
        return cls(torch.cat(exhaustive), tuple(starts), tuple(files), sinks, recent, count)

    def saved(self) -> Nearest:
        """This index as tensors only: Centroids in place of the inverted files."""
        centroids = (
            f and Centroids(torch.from_numpy(f.quantizer.reconstruct_n(0, f.nlist)), f.nprobe) for f in self.files
        )
        return replace(self, files=tuple(centroids))

    def opened(self, keys: Iterable[Tensor]) -> Nearest:
        """The index of which this is the saved form, given the keys [n, D] that `select.indexed_keys` returns."""
        between = (k[self.sinks : len(k) - self.recent] for k in keys)
        files = (c and _inverted_file(k, c.centres, c.nprobe) for k, c in zip(between, self.files, strict=True))
        return replace(self, files=tuple(files))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the keys, of faiss' float32 copies, 64-bit ids and centroids."""
        copies: int = sum(f.ntotal * (4 * f.d + 8) + f.nlist * 4 * f.d for f in self.files if f)
        return self.keys.numel() * self.keys.element_size() + copies

    @property
    def read_bytes(self) -> int:
        """Bytes that the search of one query head reads: all keys, or all centroids and lists of average length.

        The other query heads of a KV head read the same keys but can probe other lists.
        """
        probed: int = sum(f.ntotal * f.nprobe // f.nlist * (4 * f.d + 8) + f.nlist * 4 * f.d for f in self.files if f)
        return self.keys.numel() * self.keys.element_size() + probed

    def scores(self, first: int, n: int, q: Tensor, scaling: float) -> Tensor:
        """[R, Q, n] float32, as `Index.scores`. q: [R, Q, G, D]."""
        heads, queries = q.shape[:2]
        scores = torch.full((heads, queries, n), PINNED, device=q.device)
        between = scores[..., self.sinks : n - self.recent]
        if not self.count:
            between.zero_()
        elif self.files[first] is None:
            head_keys = slice(self.starts[first], self.starts[first] + heads * between.shape[-1])
            keys = self.keys[head_keys].view(heads, -1, q.shape[-1])
            logits = attention_logits(q.flatten(1, 2), keys, scaling)
            between.copy_(mean_softmax(logits.view(*q.shape[:3], -1)))
        else:
            retrieved = [_search(self.files[first + i], q[i] * scaling, self.count) for i in range(heads)]
            between.copy_(torch.stack(retrieved))
        return scores


def _search(file: Any, q: Tensor, count: int) -> Tensor:
    """[Q, n] float32 on the CPU: `mean_softmax` over the logits of the slots that q [Q, G, D], scaled, retrieves.

    The logits of all other slots are -inf.
    """
    queries, group, dim = q.shape
    logits, slots = (torch.from_numpy(x) for x in file.search(q.reshape(-1, dim).float().cpu().numpy(), count))
    # faiss pads short results with slot -1, whose column is removed.
    scores = torch.zeros(queries, file.ntotal + 1)
    weights = logits.softmax(-1).div_(group)
    return scores.scatter_add_(1, slots.view(queries, -1) + 1, weights.view(queries, -1))[:, 1:]


def inverted_file(k: Tensor, count: int, nprobe: int) -> Any:
    """A faiss.IndexIVFFlat over keys [n, D]. The clustering is seeded, so equal keys give equal lists.

    A graph (HNSW, 16 links) over 6000 anisotropic keys took 7 times as long to build and twice as long to search, with
    a recall of 62% of the best tenth, where probing 40% of the lists had 85%.
    """
    n = len(k)
    lists = round(math.sqrt(n))
    nprobe = nprobe or math.ceil(max(LEAST_PROBED, OVERSAMPLE * count / n) * lists)
    return _inverted_file(k, lists, min(lists, nprobe))


def _inverted_file(k: Tensor, lists: int | Tensor, nprobe: int) -> Any:
    """An inverted file over keys [n, D] with so many lists, or with lists of these centres [lists, D]."""
    import faiss

    rows, dim = k.float().cpu().numpy(), k.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    if isinstance(lists, Tensor):
        quantizer.add(lists.cpu().numpy())
        lists = len(lists)
    file = faiss.IndexIVFFlat(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
    # faiss warns below 39 vectors per list; lists here have sqrt(n).
    file.cp.min_points_per_centroid = 1
    # Clusters only if the quantizer has no centres yet.
    file.train(rows)
    file.add(rows)
    file.nprobe = nprobe
    return file
