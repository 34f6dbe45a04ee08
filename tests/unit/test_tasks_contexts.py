"""Context settings: full, gold, none, rag; and invalid settings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, contexts, prompts

TASK = "lc_filings_ao_2k"


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer with one token per word or punctuation mark."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path_factory.getbasetemp() / "contexts-cache"))


def rows(words: str, task: str = TASK, **metadata: Any) -> list[Any]:
    return build.rows_of(catalogue.find(task), {"pretrained": words, **metadata})


def test_gold_has_only_the_gold_documents_and_none_has_no_documents(words: str) -> None:
    full, gold, none = (rows(words, **more) for more in ({}, {"context": "gold"}, {"context": "none"}))
    assert [row["id"] for row in gold] == [row["id"] for row in none] == [row["id"] for row in full]
    for full_row, gold_row, none_row in zip(full, gold, none, strict=True):
        assert [document["pid"] for document in gold_row["docs"]] == full_row["gold_pids"]
        assert gold_row["context"] == f"[DOC 0]\n{gold_row['docs'][0]['text']}"
        assert gold_row["answers"][0] in gold_row["context"]
        assert prompts.prompt(gold_row).startswith("Read the numbered documents")
        assert (none_row["docs"], none_row["context"]) == ([], "")
        assert prompts.prompt(none_row) == prompts.join(none_row["instruction"], "", none_row["ask"])
        assert "documents" not in prompts.prompt(none_row)
        assert none_row["length_tokens"] < gold_row["length_tokens"] < full_row["length_tokens"]
        assert gold_row["cluster"] == none_row["cluster"] == full_row["cluster"]


def test_lengths_are_measured_again(words: str) -> None:
    meter = build.meter_for("t", {"pretrained": words})
    for row in rows(words, context="gold"):
        (prompt,) = meter.prompts([prompts.prompt(row)])
        assert row["length_tokens"] == prompt + 32


@pytest.mark.parametrize(("chunk", "budget"), [(40, 300), (2048, 300), (40, 0.3)])
def test_rag_has_chunks_of_the_full_context_in_its_order_within_the_budget(
    words: str, chunk: int, budget: float
) -> None:
    meter = build.meter_for("t", {"pretrained": words})
    full = {row["id"]: row for row in rows(words)}
    retrieved = rows(words, context="rag", retriever="bm25", chunk=chunk, budget=budget)
    hits = 0
    for row in retrieved:
        context = full[row["id"]]["context"]
        tokens = sum(meter.pieces([document["text"] for document in full[row["id"]]["docs"]]))
        most = budget if budget >= 1 else budget * tokens
        offset = 0
        for document in row["docs"]:
            offset = context.index(document["text"], offset) + len(document["text"])
        costs = meter.pieces([document["text"] for document in row["docs"]])
        assert sum(costs) <= most
        assert max(costs) <= max(chunk, most)
        if chunk == 40:
            assert sum(costs) > most - 40
        hits += row["answers"][0] in row["context"]
    # every question and every sentence has the company name: BM25 must retrieve most of them
    assert hits / len(retrieved) > 0.5
    assert len({row["context"] for row in retrieved}) > len({row["cluster"] for row in retrieved})


@pytest.mark.parametrize(
    ("task", "metadata", "message"),
    [
        (TASK, {"context": "golden"}, r"context='golden': expected one of full, gold, none, rag"),
        (
            "lc_kvlookup_ao_4k",
            {"context": "rag"},
            r"lc_kvlookup_ao_4k does not support context=rag: expected one of full, gold, none",
        ),
        ("lc_quality_mc", {"context": "gold"}, r"lc_quality_mc does not support context=gold"),
        (
            TASK,
            {"context": "rag", "retriever": "tfidf"},
            r"not support retriever='tfidf': expected one of bm25, dense, hybrid",
        ),
        (TASK, {"context": "rag", "chunk": 0}, r"chunk=0: expected a positive number of tokens"),
        (TASK, {"context": "rag", "budget": "4k"}, r"budget='4k'"),
        (TASK, {"context": "rag", "budget": 1.5}, r"budget=1.5: expected .* tokens, or a share"),
        (TASK, {"context": "rag", "chunk": 0.5}, r"chunk=0.5: expected a positive number of tokens\.$"),
        (TASK, {"retriever": "bm25"}, r"retriever= requires context=rag, got context=full"),
        (TASK, {"context": "gold", "budget": 100}, r"budget= requires context=rag, got context=gold"),
    ],
)
def test_an_invalid_setting_is_named_in_the_error(task: str, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        contexts.setting(catalogue.find(task), metadata)
    assert "\n" not in str(caught.value)


@given(st.sampled_from(["bm25", "dense", "hybrid"]), st.integers(1, 4096), st.integers(1, 9999))
def test_the_string_of_a_setting_has_all_of_its_fields(retriever: str, chunk: int, budget: int) -> None:
    task = catalogue.find(TASK)
    setting = contexts.setting(task, {"context": "rag", "retriever": retriever, "chunk": chunk, "budget": budget})
    assert str(setting) == f"rag:{retriever}:chunk={chunk}:budget={budget}"
    assert str(contexts.setting(task, {})) == "full"
    assert setting.requires_meter
