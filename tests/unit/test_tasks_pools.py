"""Passage pools: leakage, hard negatives, depth, hub formats, and real data at several lengths."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, tokens
from lceval.tasks.icr import questions
from lceval.tasks.leakage import LeakIndex
from lceval.tasks.parsing import normalize
from lceval.tasks.request import Request
from lceval.tasks.sources import SourceFile


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path_factory.getbasetemp() / "pools-cache"))


def rows(task: str, tokenizer: str) -> list[Any]:
    return build.rows_of(catalogue.find(task), {"pretrained": tokenizer})


def by_context(built: list[Any]) -> list[list[Any]]:
    clusters: dict[str, list[Any]] = {}
    for row in built:
        clusters.setdefault(row["cluster"], []).append(row)
    return list(clusters.values())


@pytest.mark.parametrize(("dataset", "length"), [("nqopen", 16), ("hotpotpool", 4)])
def test_no_answer_leaks_and_gold_passages_are_complete_and_spread(
    dataset: str, length: int, smollm2: str, data_folder: Path
) -> None:
    built = rows(f"lc_{dataset}_ao_{length}k", smollm2)
    files = catalogue.datasets()[dataset].files[1:]
    lines = [line for file in files for line in (data_folder / file).read_text(encoding="utf-8").splitlines()]
    pool = {record["pid"]: record["text"].strip() for record in map(json.loads, lines)}
    assert len(built) == {"nqopen": 400}.get(dataset, len(built)) >= 60
    for context_rows in by_context(built):
        texts = {document["pid"]: document["text"] for document in context_rows[0]["docs"]}
        assert all(text == pool[pid] for pid, text in texts.items())
        normal = {pid: normalize(text) for pid, text in texts.items()}
        places = []
        for row in context_rows:
            answers = [normalize(answer) for answer in row["answers"]]
            leaking = {pid for pid, text in normal.items() if any(answer in text for answer in answers)}
            assert leaking <= set(row["gold_pids"]) <= set(texts)
            assert leaking
            places += [[*texts].index(pid) for pid in row["gold_pids"]]
        for segment, place in enumerate(sorted(places)):
            assert len(texts) * segment // len(places) <= place < len(texts) * (segment + 1) // len(places)
        assert all(0.98 * length * 1024 <= row["length_tokens"] <= length * 1024 for row in context_rows)
        assert {row["context"] for row in context_rows} == {context_rows[0]["context"]}


@pytest.mark.parametrize("task", ["lc_musique_ao_4k", "lc_squad_ao_2k", "lc_nqopen_rj_2k"])
def test_other_pools_and_modes_meet_their_length(task: str, smollm2: str, data_folder: Path) -> None:
    built = rows(task, smollm2)
    limit = int(task.rpartition("_")[2][:-1]) * 1024
    assert len(built) >= 24
    assert all(0.98 * limit <= row["length_tokens"] <= limit for row in built)


def test_the_distractors_of_the_source_and_bm25_negatives_come_first(smollm2: str, data_folder: Path) -> None:
    task = catalogue.find("lc_hotpotpool_ao_4k")
    meter = tokens.meter_for("t", {"pretrained": smollm2})
    request = Request(task.name, task.dataset, "ao", meter, 4096, 1234)
    built = build.row_builder(task.dataset)(request).build()
    lines = (data_folder / "hotpotqa/questions.jsonl").read_text(encoding="utf-8").splitlines()
    distractors = {record["question"].strip(): set(record["distractor_pids"]) for record in map(json.loads, lines)}
    shares = []
    for context_rows in by_context(built):
        gold = {pid for row in context_rows for pid in row["gold_pids"]}
        fillers = [document["pid"] for document in context_rows[0]["docs"] if document["pid"] not in gold]
        expected = set().union(*(distractors[row["question"]] for row in context_rows))
        shares.append(sum(pid in expected for pid in fillers) / len(fillers))
    # 20 hard negatives per context; a 4k context has room for slightly more
    assert min(shares) > 0.5


# Synthetic pools ----------------------------------------------------------------------------------


def source(name: str, records: list[dict[str, Any]]) -> SourceFile:
    return SourceFile(name, records, "0" * 64)


def test_unusable_questions_are_left_out() -> None:
    texts = ["The river Oza is 40 km long.", "Nothing of note.", "Yes, it was a frigate."]
    records = [
        {"question": "How long is the Oza?", "answers": ["40 km"], "gold_pids": ["p0"]},
        {"question": "How long is the Oza?", "answers": ["40 km"], "gold_pids": ["p0"]},
        {"question": "Which river?", "answers": ["Danube"], "gold_pids": ["p0"]},
        {"question": "What?", "answers": ["the"], "gold_pids": ["p0"]},
        {"question": "Was it?", "answers": ["yes"], "gold_pids": ["p2"]},
    ]
    numbers = {f"p{n}": n for n in range(3)}
    usable = questions.usable_questions("x", source("q", records), numbers, LeakIndex(texts))
    assert [question.id for question in usable] == ["x-00000"]
    with pytest.raises(UserError, match=r"gold_pids=\['p9'\]"):
        questions.usable_questions("x", source("q", [{**records[0], "gold_pids": ["p9"]}]), numbers, LeakIndex(texts))


def numbers(count: int, seed: int) -> list[str]:
    """Random words that occur nowhere else."""
    rng = random.Random(seed)
    return ["".join(rng.choices("bcdfghjklmnpqrstvwxz", k=6)) for _ in range(count)]


def facts(count: int) -> list[tuple[str, str, str, str]]:
    """Distinct tuples of title, passage, question and answer."""
    names, things = numbers(count, 1), numbers(count, 2)
    padding = "The town lies by a lake and is known for its fairs, which are held every spring and autumn. " * 9
    return [
        # of many lengths, so that some selection fits
        (name, f"{name} is known for {thing}. {padding[: 200 + 13 * n]}", f"What is {name} known for?", thing)
        for n, (name, thing) in enumerate(zip(names, things, strict=True))
    ]


def hub_record(dataset: str, pool: list[tuple[str, str, str, str]], n: int) -> dict[str, Any]:
    title, text, question, answer = pool[n]
    other = pool[(n + 1) % len(pool)]
    if dataset == "squad":
        return {
            "id": str(n),
            "title": title,
            "context": text,
            "question": question,
            "answers": {"text": [answer, answer], "answer_start": [0, 0]},
        }
    if dataset == "hotpotpool":
        return {
            "id": str(n),
            "question": question,
            "answer": answer,
            "type": "bridge",
            "level": "hard",
            "supporting_facts": {"title": [title], "sent_id": [0]},
            "context": {"title": [title, other[0]], "sentences": [[text], [other[1]]]},
        }
    return {
        "id": f"2hop__{n}",
        "paragraphs": [
            {"idx": 0, "title": other[0], "paragraph_text": other[1], "is_supporting": False},
            {"idx": 1, "title": title, "paragraph_text": text, "is_supporting": True},
        ],
        "question": question,
        "question_decomposition": [],
        "answer": answer,
        "answer_aliases": [answer.upper()],
        "answerable": True,
    }


def hub_copy(folder: Path, dataset: str, records: list[dict[str, Any]]) -> Path:
    """A local copy of the dataset's hub repository."""
    hub = catalogue.datasets()[dataset].hub
    assert hub is not None
    file = folder / "hub" / hub.repo / hub.files["validation"]
    file.parent.mkdir(parents=True)
    if file.suffix == ".parquet":
        Dataset.from_list(records).to_parquet(file)
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize("dataset", ["squad", "hotpotpool", "musique"])
def test_a_copy_of_the_hubs_files_becomes_a_pool(
    dataset: str, smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = facts(60)
    hub_copy(tmp_path, dataset, [hub_record(dataset, pool, n) for n in range(60)])
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    built = rows(f"lc_{dataset}_ao_2k", smollm2)
    assert len(built) >= 20
    answers = {question: answer for _, _, question, answer in pool}
    for row in built:
        assert row["answers"][0] == answers[row["question"]]
        (gold,) = [document for document in row["docs"] if document["pid"] in row["gold_pids"]]
        assert row["answers"][0] in gold["text"]
        assert catalogue.datasets()[dataset].hub.repo in row["source"]  # type: ignore[union-attr]


@pytest.mark.parametrize("dataset", ["squad", "hotpotpool", "musique"])
def test_an_invalid_hub_record_raises_with_its_location(
    dataset: str, smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = hub_record(dataset, facts(2), 0)
    del record["question"]
    hub_copy(tmp_path, dataset, [record])
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    with pytest.raises(UserError, match=r"record 1: invalid question=None: expected a string") as caught:
        rows(f"lc_{dataset}_ao_2k", smollm2)
    assert "\n" not in str(caught.value)


def test_the_same_seed_gives_byte_identical_rows(smollm2: str, data_folder: Path) -> None:
    task = catalogue.find("lc_musique_ao_2k")
    meter = tokens.meter_for("t", {"pretrained": smollm2})
    first, again, other = (
        json.dumps(build.row_builder(task.dataset)(Request(task.name, task.dataset, "ao", meter, 2048, seed)).build())
        for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other
