"""BM25 equals Lucene's formula; chunks lose no text and respect the token limit."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lceval.tasks.retrievers import Bm25, chunked, order_by
from lceval.tasks.rows import Document
from lceval.tasks.tokens import TokenMeter

STOPWORDS = re.findall(
    r"\w+",
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with",
)
ODD = [
    "",
    "The cat sat on the mat, and the CAT slept.",
    "of the and to",
    "cat",
    "a b c d 1 2 3",
    "cat cat cat cat dog",
    "Żółw żółw; naïve café, naïve Größe",
    "cat",
    "3M's capex was $1,577 million in 2018 (up 4.5%).",
    "snake_case under_score\n\n\tcat\u00a0dog",
    "x" * 500 + " dog",
]
QUESTIONS = [
    "cat",
    "cat cat dog",
    "the of",
    "",
    "?!",
    "unknown words only",
    "Größe ŻÓŁW 2018 577",
    "the CAT and the dog",
]
TEXTS = st.lists(
    st.lists(st.sampled_from(["the", "cat", "dog", "emu", "fox", "Cat", "of", "gnu", "x"]), max_size=9).map(" ".join)
)


def words_of(text: str) -> list[str]:
    return [word for word in re.findall(r"\w{2,}", text.lower()) if word not in STOPWORDS]


def bm25(texts: Sequence[str], question: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's BM25, straight from its formula."""
    counts = [Counter(words_of(text)) for text in texts]
    mean = sum(count.total() for count in counts) / max(1, len(texts))
    scores = [0.0] * len(texts)
    for word in words_of(question):
        df = sum(word in count for count in counts)
        for number, count in enumerate(counts):
            if tf := count[word]:
                weight = tf / (tf + k1 * (1 - b + b * count.total() / mean))
                scores[number] += math.log(1 + (len(texts) - df + 0.5) / (df + 0.5)) * weight
    return scores


def check_bm25(texts: Sequence[str], question: str) -> None:
    expected, index = bm25(texts, question), Bm25(texts)
    assert index.scores(question).tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    ranked = order_by("bm25", texts)(question)
    assert sorted(ranked) == list(range(len(texts)))
    for better, worse in pairwise(ranked):
        assert expected[better] >= expected[worse] * (1 - 1e-12)
        assert better < worse or index.scores(question)[better] > index.scores(question)[worse]


@pytest.mark.parametrize("question", QUESTIONS)
def test_bm25_is_lucenes_formula_on_odd_texts(question: str) -> None:
    check_bm25(ODD, question)


@settings(deadline=None)
@given(TEXTS, st.sampled_from(["cat", "the dog of Cat", "emu gnu emu", "x", "yak", ""]))
def test_bm25_is_lucenes_formula_on_any_texts(texts: list[str], question: str) -> None:
    check_bm25(texts, question)


def test_indexing_and_ranking_print_and_log_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    caplog.handler.setLevel(logging.NOTSET)  # as in lm-eval: only the root logger's level filters
    order_by("bm25", ODD)("cat")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_importing_it_loads_neither_torch_nor_the_embedder() -> None:
    heavy = ("torch", "transformers", "sentence_transformers", "faiss")
    code = f"import sys, lceval.tasks.retrievers; print([m for m in {heavy} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


@cache
def meter(kind: str) -> TokenMeter:
    """One token per word or mark; or byte pairs, where the tokens of a word depend on what precedes it."""
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(
            ["the retrieval of chunks from documents, row by row: 1,577 and 2018"] * 9, trainer
        )
    return TokenMeter(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))


def document(text: str, pid: str = "p") -> Document:
    return Document(pid=pid, title=f"title of {pid}", text=text)


WORDS = st.one_of(
    st.sampled_from(["the", "retrieval", "of", "chunks,", "1,577", "row-by-row", "éé", "検索", "🦤🦤"]),
    st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), max_size=6),
    st.integers(1, 60).map("ab,".__mul__),
)
GAPS = st.sampled_from([" ", " ", " ", "\n", "  ", "\n\n", "\t", " \n ", "\u00a0"])
LONG = st.lists(st.tuples(WORDS, GAPS), max_size=60).map(lambda pairs: "".join(word + gap for word, gap in pairs))


@given(st.lists(LONG, max_size=4), st.integers(1, 40), st.sampled_from(["words", "bytes"]))
@settings(deadline=None)
def test_chunks_cover_the_text_in_order_and_respect_the_token_limit(texts: list[str], limit: int, kind: str) -> None:
    docs = [document(text, f"p{number}") for number, text in enumerate(texts)]
    chunks = chunked(docs, limit, meter(kind))
    for doc, whole in zip(docs, meter(kind).pieces(texts), strict=True):
        own = [chunk for chunk in chunks if chunk["pid"] == doc["pid"]]
        assert all(chunk["title"] == doc["title"] for chunk in own)
        if whole <= limit:
            assert [chunk["text"] for chunk in own] == [doc["text"]]
            continue
        place, word_splits = 0, []
        for chunk in own:
            start = doc["text"].index(chunk["text"], place)
            between = doc["text"][place:start]
            assert not between.strip()
            if not between and place:
                word_splits.append(place)
            place = start + len(chunk["text"])
            assert meter(kind).pieces([chunk["text"]])[0] <= limit or len(chunk["text"]) == 1
        assert not doc["text"][place:].strip()
        for split in word_splits:  # only inside a word that is longer than a chunk
            (word,) = (w.group() for w in re.finditer(r"\S+", doc["text"]) if w.start() < split < w.end())
            assert meter(kind).pieces([word])[0] > limit
    assert [chunk["pid"] for chunk in chunks] == sorted(chunk["pid"] for chunk in chunks)


@given(st.lists(WORDS.filter(str.strip), min_size=1, max_size=80), st.integers(4, 30))
@settings(deadline=None)
def test_a_chunk_on_one_line_is_nearly_full_or_has_no_room_for_the_next_word(words: list[str], limit: int) -> None:
    text = " ".join(words)
    chunks, count = chunked([document(text)], limit, meter("bytes")), meter("bytes").pieces
    place = 0
    for chunk in chunks[:-1]:
        start = text.index(chunk["text"], place)
        place = start + len(chunk["text"])
        if text[place] == " " and count([chunk["text"]])[0] < 0.95 * limit:
            end = text.find(" ", place + 1)
            assert count([text[start : end if end > 0 else len(text)]])[0] > limit


def test_a_chunk_ends_at_a_line_break_in_its_last_quarter() -> None:
    rows = [f"row {number} has exactly seven words\n" for number in range(40)]
    chunks = chunked([document("".join(rows))], 20, meter("words"))
    assert [chunk["text"].count("\n") + 1 for chunk in chunks] == [3] * 13 + [1]
    assert "\n".join(chunk["text"] for chunk in chunks) + "\n" == "".join(rows)
    # eleven words per row: a chunk is not halved to end at a line break
    long = "".join(f"row {number} has more words in it than half a chunk\n" for number in range(9))
    assert len(chunked([document(long)], 20, meter("words"))[0]["text"].split()) > 15


def test_chunking_a_long_document_takes_few_tokenizer_calls_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    counted = meter("bytes")
    pieces = counted.pieces
    monkeypatch.setattr(counted, "pieces", lambda texts: calls.extend(map(len, texts)) or pieces(texts), raising=False)
    text = "\n".join(f"In {year} the company's revenue was ${year * 7919:,}, up {year % 17}%." for year in range(3000))
    chunks = chunked([document(text)], 512, counted)
    assert len(chunks) > 50
    assert len(calls) <= 4 * len(chunks)
    assert sum(calls) <= 5 * len(text)
