"""Train and test sides of a pool, and how many questions share a context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.errors import UserError
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
    seen = []
    for split in ("train", "test"):
        made = rows(task, smollm2, split=split)
        assert {row["context_setting"] for row in made} == {f"full:split={split}"}
        docs = {document["pid"]: document for row in made for document in row["docs"]}.values()
        seen.append(
            {
                "pids": {document["pid"] for document in docs},
                "titles": {normalize(document["title"].replace("_", " ")) for document in docs} - {""},
                "texts": {normalize(document["text"]) for document in docs},
                "questions": {normalize(row["question"]) for row in made},
            }
        )
    train, test = seen
    for kind in train:
        assert train[kind]
        assert test[kind]
        assert train[kind].isdisjoint(test[kind]), kind


def test_squads_test_side_has_three_hundred_questions_at_1k(smollm2: str, data_folder: Path) -> None:
    assert len(rows("lc_squad_ao_1k", smollm2, split="test")) >= 300


@pytest.mark.parametrize("dataset", POOLS)
def test_about_a_third_of_the_documents_is_for_testing(dataset: str, data_folder: Path) -> None:
    questions, *pools = (
        [json.loads(line) for line in (data_folder / file).read_text(encoding="utf-8").splitlines()]
        for file in catalogue.datasets()[dataset].files
    )
    passages = [passage for pool in pools for passage in pool]
    side = sides(passages, questions)
    asked = [side[question["gold_pids"][0]] for question in questions]
    assert 0.25 < [*side.values()].count("test") / len(side) < 0.4
    assert 0.25 < asked.count("test") / len(asked) < 0.4
    assert all(len({side[pid] for pid in question["gold_pids"]}) == 1 for question in questions)


titles = st.sampled_from([f"article {n}" for n in range(30)])
pools_of_passages = st.lists(st.tuples(titles, st.integers(0, 40)), min_size=1, max_size=60)


@given(pool=pools_of_passages, asked=st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=3), max_size=15))
def test_nothing_that_belongs_together_is_torn_apart(pool: list[tuple[str, int]], asked: list[list[int]]) -> None:
    passages = [{"pid": str(n), "title": t, "text": f"words {w}"} for n, (t, w) in enumerate(pool)]
    questions = [
        {"question": f"q{n % 7}", "gold_pids": [str(gold % len(pool)) for gold in golds]}
        for n, golds in enumerate(asked)
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


def test_a_document_keeps_its_side_when_others_come() -> None:
    passages = [{"pid": str(n), "title": f"t{n % 300}", "text": f"words {n}"} for n in range(900)]
    side = sides(passages, [])
    assert sides(passages[:500], []).items() <= side.items()
    assert abs([*side.values()].count("test") / 900 - TEST_SHARE) < 0.1
    nameless = [{"pid": str(n), "title": "", "text": f"words {n}"} for n in range(50)]
    assert len(set(sides(nameless, []).values())) == 2


@pytest.mark.parametrize("number", [2, 12])
def test_as_many_questions_share_a_context_as_are_asked_for(number: int, smollm2: str, data_folder: Path) -> None:
    made = rows("lc_squad_ao_2k", smollm2, questions=number, split="train")
    clusters: dict[str, list[Any]] = {}
    for row in made:
        clusters.setdefault(row["cluster"], []).append(row)
    assert len(clusters) >= 20
    for of in clusters.values():
        assert len({row["question"] for row in of}) == len(of) == number
        assert len({row["context"] for row in of}) == 1
        golds = {pid for row in of for pid in row["gold_pids"]}
        normal = {document["pid"]: normalize(document["text"]) for document in of[0]["docs"]}
        assert len(golds) == number or number > 4
        assert len(normal) == len(of[0]["docs"])
        for row in of:
            assert 0.98 * 2048 <= row["length_tokens"] <= 2048
            holders = {pid for pid, text in normal.items() if any(normalize(a) in text for a in row["answers"])}
            assert holders
            assert holders <= set(row["gold_pids"])


def test_at_1k_eight_questions_share_a_context(smollm2: str, data_folder: Path) -> None:
    made = rows("lc_squad_ao_1k", smollm2, questions=8, split="test")
    assert len(made) == 8 * len({row["cluster"] for row in made}) >= 240


def test_the_usual_draw_may_be_named_and_is_the_same(smollm2: str, data_folder: Path) -> None:
    named = rows("lc_musique_ao_2k", smollm2, split="all", questions=4, negatives="bm25", length_matched=False)
    assert named == rows("lc_musique_ao_2k", smollm2)
    assert named[0]["context_setting"] == "full"
    for more in ({"split": "train"}, {"questions": 3}):
        assert rows("lc_musique_ao_2k", smollm2, **more) != named


@pytest.mark.parametrize(
    ("task", "metadata", "message"),
    [
        (
            "lc_filings_ao_1k",
            {"split": "test"},
            r"lc_filings_ao_1k has no split=: only hotpotpool, musique, nqopen, squ",
        ),
        ("lc_quality_mc", {"questions": 2}, r"lc_quality_mc has no questions=: only"),
        ("lc_iris_ao_2k", {"length_matched": True}, r"lc_iris_ao_2k has no length_matched=: only"),
        ("lc_squad_ao_2k", {"split": "dev"}, r"has no split='dev': it has all, train, test"),
        ("lc_squad_ao_2k", {"questions": 0}, r"questions=0: expected a number from 1 to 64"),
        ("lc_squad_ao_2k", {"questions": True}, r"questions=True: expected a number"),
        ("lc_squad_ao_2k", {"negatives": "worst"}, r"no negatives='worst': it has bm25, dense, hybrid, random"),
        ("lc_squad_ao_2k", {"length_matched": "yes"}, r"length_matched='yes': expected true or false"),
    ],
)
def test_a_draw_that_makes_no_sense_is_refused_by_name(task: str, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        contexts.setting(catalogue.find(task), metadata)
    assert "\n" not in str(caught.value)


def test_the_draw_is_part_of_what_a_table_calls_the_context(smollm2: str, data_folder: Path) -> None:
    task = catalogue.find("lc_squad_ao_2k")
    chosen = contexts.setting(task, {"context": "rag", "chunk": 64, "budget": 256, "split": "test", "questions": 8})
    assert str(chosen) == "rag:bm25:chunk=64:budget=256:split=test:questions=8"
    made = rows("lc_squad_ao_2k", smollm2, context="gold", split="test", length_matched=True)
    assert {row["context_setting"] for row in made} == {"gold:split=test:length_matched"}
