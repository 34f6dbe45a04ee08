"""Train and test splits of a pool, and the number of questions per context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, contexts
from lceval.tasks.icr.splits import TEST_SHARE, sides
from lceval.tasks.parsing import normalize

POOLS = ["nqopen", "hotpotpool", "musique", "squad"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path_factory.getbasetemp() / "splits-cache"))


def rows(task: str, tokenizer: str, **metadata: Any) -> list[Any]:
    return build.rows_of(catalogue.find(task), {"pretrained": tokenizer, **metadata})


@pytest.mark.parametrize("dataset", POOLS)
def test_train_and_test_share_no_source_document_no_passage_and_no_question(
    dataset: str, smollm2: str, data_folder: Path
) -> None:
    task = f"lc_{dataset}_ao_{1 if dataset == 'squad' else 2}k"
    of_split = []
    for split in ("train", "test"):
        built = rows(task, smollm2, split=split)
        assert {row["context_setting"] for row in built} == {f"full:split={split}"}
        docs = {document["pid"]: document for row in built for document in row["docs"]}.values()
        of_split.append(
            {
                "pids": {document["pid"] for document in docs},
                "titles": {normalize(document["title"].replace("_", " ")) for document in docs} - {""},
                "texts": {normalize(document["text"]) for document in docs},
                "questions": {normalize(row["question"]) for row in built},
            }
        )
    train, test = of_split
    for kind in train:
        assert train[kind]
        assert test[kind]
        assert train[kind].isdisjoint(test[kind]), kind


def test_squads_test_split_has_three_hundred_questions_at_1k(smollm2: str, data_folder: Path) -> None:
    assert len(rows("lc_squad_ao_1k", smollm2, split="test")) >= 300


@pytest.mark.parametrize("dataset", POOLS)
def test_about_a_third_of_the_documents_is_in_the_test_split(dataset: str, data_folder: Path) -> None:
    questions, *pools = (
        [json.loads(line) for line in (data_folder / file).read_text(encoding="utf-8").splitlines()]
        for file in catalogue.datasets()[dataset].files
    )
    passages = [passage for pool in pools for passage in pool]
    side = sides(passages, questions)
    question_sides = [side[question["gold_pids"][0]] for question in questions]
    assert 0.25 < [*side.values()].count("test") / len(side) < 0.4
    assert 0.25 < question_sides.count("test") / len(question_sides) < 0.4
    assert all(len({side[pid] for pid in question["gold_pids"]}) == 1 for question in questions)


titles = st.sampled_from([f"article {n}" for n in range(30)])
pools_of_passages = st.lists(st.tuples(titles, st.integers(0, 40)), min_size=1, max_size=60)


@given(pool=pools_of_passages, gold_indices=st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=3), max_size=15))
def test_connected_passages_are_in_the_same_split(pool: list[tuple[str, int]], gold_indices: list[list[int]]) -> None:
    passages = [{"pid": str(n), "title": t, "text": f"words {w}"} for n, (t, w) in enumerate(pool)]
    questions = [
        {"question": f"q{n % 7}", "gold_pids": [str(gold % len(pool)) for gold in golds]}
        for n, golds in enumerate(gold_indices)
    ]
    side = sides(passages, questions)
    assert set(side) == {passage["pid"] for passage in passages}
    for key in ("title", "text"):
        for value in {passage[key] for passage in passages}:
            assert len({side[p["pid"]] for p in passages if p[key] == value}) == 1
    for text in {question["question"] for question in questions}:
        assert len({side[pid] for q in questions if q["question"] == text for pid in q["gold_pids"]}) == 1
    assert side == sides(passages[::-1], questions[::-1])
    without = sides(passages[: len(passages) // 2], [])
    if not questions and len({passage["text"] for passage in passages}) == len(passages):
        assert without.items() <= side.items()


def test_a_document_keeps_its_split_when_the_pool_grows() -> None:
    passages = [{"pid": str(n), "title": f"t{n % 300}", "text": f"words {n}"} for n in range(900)]
    side = sides(passages, [])
    assert sides(passages[:500], []).items() <= side.items()
    assert abs([*side.values()].count("test") / 900 - TEST_SHARE) < 0.1
    nameless = [{"pid": str(n), "title": "", "text": f"words {n}"} for n in range(50)]
    assert len(set(sides(nameless, []).values())) == 2


@pytest.mark.parametrize("number", [2, 12])
def test_a_context_has_the_requested_number_of_questions(number: int, smollm2: str, data_folder: Path) -> None:
    built = rows("lc_squad_ao_2k", smollm2, questions=number, split="train")
    clusters: dict[str, list[Any]] = {}
    for row in built:
        clusters.setdefault(row["cluster"], []).append(row)
    assert len(clusters) >= 20
    for context_rows in clusters.values():
        assert len({row["question"] for row in context_rows}) == len(context_rows) == number
        assert len({row["context"] for row in context_rows}) == 1
        golds = {pid for row in context_rows for pid in row["gold_pids"]}
        normal = {document["pid"]: normalize(document["text"]) for document in context_rows[0]["docs"]}
        assert len(golds) == number or number > 4
        assert len(normal) == len(context_rows[0]["docs"])
        for row in context_rows:
            assert 0.98 * 2048 <= row["length_tokens"] <= 2048
            leaking = {pid for pid, text in normal.items() if any(normalize(a) in text for a in row["answers"])}
            assert leaking
            assert leaking <= set(row["gold_pids"])


def test_at_1k_eight_questions_share_a_context(smollm2: str, data_folder: Path) -> None:
    built = rows("lc_squad_ao_1k", smollm2, questions=8, split="test")
    assert len(built) == 8 * len({row["cluster"] for row in built}) >= 240


def test_explicit_default_settings_give_the_same_rows(smollm2: str, data_folder: Path) -> None:
    explicit = rows("lc_musique_ao_2k", smollm2, split="all", questions=4, negatives="bm25", length_matched=False)
    assert explicit == rows("lc_musique_ao_2k", smollm2)
    assert explicit[0]["context_setting"] == "full"
    for more in ({"split": "train"}, {"questions": 3}):
        assert rows("lc_musique_ao_2k", smollm2, **more) != explicit


@pytest.mark.parametrize(
    ("task", "metadata", "message"),
    [
        (
            "lc_filings_ao_1k",
            {"split": "test"},
            r"lc_filings_ao_1k does not support split=: only .*hotpotpool, musique, nqopen, squ",
        ),
        ("lc_quality_mc", {"questions": 2}, r"lc_quality_mc does not support questions=: only"),
        ("lc_iris_ao_2k", {"length_matched": True}, r"lc_iris_ao_2k does not support length_matched=: only"),
        ("lc_squad_ao_2k", {"split": "dev"}, r"not support split='dev': expected one of all, train, test"),
        ("lc_squad_ao_2k", {"questions": 0}, r"questions=0: expected a number from 1 to 64"),
        ("lc_squad_ao_2k", {"questions": True}, r"questions=True: expected a number"),
        (
            "lc_squad_ao_2k",
            {"negatives": "worst"},
            r"not support negatives='worst': expected one of bm25, dense, hybrid, random",
        ),
        ("lc_squad_ao_2k", {"length_matched": "yes"}, r"length_matched='yes': expected true or false"),
    ],
)
def test_an_invalid_pool_setting_is_named_in_the_error(task: str, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        contexts.setting(catalogue.find(task), metadata)
    assert "\n" not in str(caught.value)


def test_pool_settings_are_part_of_the_context_setting(smollm2: str, data_folder: Path) -> None:
    task = catalogue.find("lc_squad_ao_2k")
    chosen = contexts.setting(task, {"context": "rag", "chunk": 64, "budget": 256, "split": "test", "questions": 8})
    assert str(chosen) == "rag:bm25:chunk=64:budget=256:split=test:questions=8"
    built = rows("lc_squad_ao_2k", smollm2, context="gold", split="test", length_matched=True)
    assert {row["context_setting"] for row in built} == {"gold:split=test:length_matched"}
