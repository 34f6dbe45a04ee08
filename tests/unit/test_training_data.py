"""Training rows: sampling, relabelling of false negatives, statistics and files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.tasks import tokens
from lceval.training import data, figures
from lceval.training.promotion import Match, Promotion, promote, similarity


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path_factory.getbasetemp() / "splits-cache"))


@pytest.fixture
def squad(smollm2: str, data_folder: Path) -> tuple[data.Spec, list[Any], Promotion]:
    """Rows of SQuAD's training split with two seeds and eight questions per context."""
    spec = data.spec(datasets=["squad"], questions=8, seeds=[0, 1], tokenizer=smollm2)
    return spec, *data.rows(spec)


def by_context(rows: Sequence[Any]) -> dict[str, list[Any]]:
    contexts: dict[str, list[Any]] = {}
    for row in rows:
        contexts.setdefault(row["cluster"], []).append(row)
    return contexts


def test_rows_of_several_seeds_are_grouped_by_context_and_have_targets(squad: Any) -> None:
    spec, rows, _ = squad
    contexts = by_context(rows)
    order = [row["cluster"] for row in rows]
    assert [*contexts] == [name for n, name in enumerate(order) if n == 0 or order[n - 1] != name]
    contexts_by_seed: dict[int, set[str]] = {}
    for group in contexts.values():
        assert len({row["context"] for row in group}) == len({row["instruction"] for row in group}) == 1
        assert len({row["question"] for row in group}) == len(group) == 8
        contexts_by_seed.setdefault(group[0]["data_seed"], set()).add(group[0]["context"])
        for row in group:
            assert (row["dataset"], row["output_format"]) == ("squad", "ao")
            assert row["target"] == f"Answer: {row['answers'][0]}"
            assert set(row["gold_pids"]) <= {document["pid"] for document in row["docs"]}
    assert set(contexts_by_seed) == {0, 1}
    assert contexts_by_seed[0].isdisjoint(contexts_by_seed[1])
    assert data.rows(spec)[0] == rows


def test_negatives_match_the_lengths_of_gold_documents(squad: Any, smollm2: str) -> None:
    spec, rows, _ = squad
    meter = tokens.meter_for("t", {"pretrained": smollm2})
    matched = figures.lengths([*by_context(rows).values()], meter)
    assert matched is not None
    assert 0.46 < matched["gold_longer"] < 0.54
    assert matched["p"] > 0.05
    assert 0.93 < matched["mean_ratio"] < 1.07
    assert 0.93 < matched["median_ratio"] < 1.07
    unmatched_rows, _ = data.rows(spec.model_copy(update={"length_matched": False, "seeds": (0,)}))
    unmatched = figures.lengths([*by_context(unmatched_rows).values()], meter)
    assert unmatched is not None
    assert unmatched["gold_longer"] > 0.65  # length alone would identify gold documents


@pytest.mark.parametrize("length_k", [1.5])
def test_a_length_between_those_of_the_tasks_is_possible(length_k: float, smollm2: str, data_folder: Path) -> None:
    spec = data.spec(datasets=["musique"], length_k=length_k, questions=1, tokenizer=smollm2)
    rows, _ = data.rows(spec)
    limit = round(length_k * 1024)
    assert len(rows) >= 20
    assert all(0.98 * limit <= row["length_tokens"] <= limit for row in rows)
    assert rows[0]["cluster"].startswith(f"musique-{limit}t-")


def test_a_limit_keeps_contexts_whole(squad: Any) -> None:
    spec, rows, _ = squad
    some, _ = data.rows(spec.model_copy(update={"limit": 20}))
    assert some == rows[:16]
    one, _ = data.rows(spec.model_copy(update={"limit": 3}))
    assert one == rows[:8]


def test_a_report_counts_rows_tokens_and_leaks(squad: Any, smollm2: str) -> None:
    spec, rows, promotion = squad
    meter = tokens.meter_for("t", {"pretrained": smollm2})
    report = figures.report(spec, rows, promotion, meter)
    assert report["rows"] == len(rows) == 8 * report["contexts"]
    assert report["questions_per_context"] == {"least": 8, "mean": 8.0, "most": 8}
    assert report["leaks"]["left"] == 0 < report["leaks"]["kept_out"]
    assert sum(report["depth"]) == pytest.approx(1)
    assert max(report["depth"]) < 0.2  # gold documents are at all depths
    target_tokens = sum(len(meter._tokenizer(row["target"]).input_ids) for row in rows)
    assert report["tokens"]["targets"] == target_tokens
    assert report["tokens"]["one_by_one"] > 5 * report["tokens"]["packed"]
    text = figures.text(report)
    assert "questions  8 to 8 per context" in text
    assert "; 0 left" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "squad"}, r"dataset='squad': Extra inputs"),
        ({"datasets": []}, r"datasets=\[\]"),
        ({"length_k": 0}, r"length_k=0"),
        ({"limit": 0}, r"limit=0"),
    ],
)
def test_an_invalid_field_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        data.spec(**{"datasets": ["squad"], **fields})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"datasets": ["sqad"]}, r"unknown dataset 'sqad'"),
        ({"datasets": ["squality"], "modes": ["sum"]}, r"squality has no trainable mode 'sum': expected one of none"),
        (
            {"datasets": ["squad"], "modes": ["mc"]},
            r"squad has no trainable mode 'mc': expected one of ao, id, idc, idq, rj, docid",
        ),
        ({"datasets": ["iris"], "length_k": 3, "split": "all"}, r"iris has no length_k=3: expected one of 2"),
        ({"datasets": ["iris"], "length_k": 2}, r"lc_iris_ao_2k does not support split=: only"),
        ({"datasets": ["squad"], "negatives": "worst"}, r"negatives='worst': expected one of"),
        ({"datasets": ["squad"], "split": "dev"}, r"split='dev': expected one of"),
    ],
)
def test_an_unknown_name_is_an_error_that_contains_it(fields: dict[str, Any], message: str, smollm2: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        data.rows(data.spec(tokenizer=smollm2, **fields))
    assert "\n" not in str(caught.value)


def test_the_targets_of_tables_are_their_labels(smollm2: str) -> None:
    spec = data.spec(datasets=["iris"], length_k=2, split="all", tokenizer=smollm2, limit=12)
    rows, promotion = data.rows(spec)
    assert rows
    assert promotion == Promotion(promotion.compared, 0, 0)
    assert all(row["target"] == f"Answer: {row['answers'][0]}" for row in rows)
    report = figures.report(spec, rows, promotion, tokens.meter_for("t", {"pretrained": smollm2}))
    assert report["leaks"] == {"kept_out": None, "left": 0}
    assert report["lengths"] is None


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A synthetic pool of 32 towns, each described by a gold passage and a near-duplicate."""
    names = [
        f"{a}{b}a" for a in ("Bro", "Kla", "Dru", "Fe", "Gli", "Sta", "Mo", "Pu") for b in ("ng", "st", "lt", "rk")
    ]
    things = [
        f"{a}{b}ing" for a in ("spo", "cra", "ble", "thu", "wri", "gro", "fla", "ski") for b in ("mp", "nd", "ck", "pt")
    ]
    pad = "It lies by a lake and holds fairs in spring and in autumn, to which people come from all the country. "
    folder = tmp_path / "squad_xquad_en"
    folder.mkdir()
    passages, questions = [], []
    for n, (name, thing) in enumerate(zip(names, things, strict=True)):
        text = f"{name} is a town that has long been known for {thing}. {pad * 3}"[: 120 + 7 * n]
        duplicate = f"{name} is a town that has long been known for it. {pad * 3}"[: 115 + 7 * n]
        passages += [{"pid": f"p{n}", "title": name, "text": text}, {"pid": f"q{n}", "title": name, "text": duplicate}]
        questions.append({"question": f"What is {name} known for?", "answers": [thing], "gold_pids": [f"p{n}"]})
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in questions))
    (folder / "passages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in passages))
    fillers_folder = tmp_path / "2wiki_corpus"
    fillers_folder.mkdir()
    fillers = [
        {"pid": f"w{n}", "title": f"Village {n}", "text": f"Village {n} is small. {pad * 3}"[: 90 + n]}
        for n in range(99)
    ]
    (fillers_folder / "passages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in fillers))
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_near_duplicates_of_gold_are_relabelled_and_a_judge_rejects_false_positives(pool: Path, smollm2: str) -> None:
    fields: dict[str, Any] = {"datasets": ["squad"], "modes": ["id"], "split": "all", "tokenizer": smollm2}
    unchanged, no_promotion = data.rows(data.spec(**fields, promote=None))
    assert no_promotion == Promotion(0, 0, 0)
    assert {len(row["gold_pids"]) for row in unchanged} == {1}
    judged: list[Match] = []

    def judge(matches: Sequence[Match]) -> list[bool | None]:
        judged.extend(matches)
        return [match.question.split()[2] in match.passage for match in matches]

    rows, promotion = data.rows(data.spec(**fields, promote=0.8), judge)
    assert promotion.matched == len(judged)
    assert promotion.refused > 0 < promotion.promoted
    assert sum(len(row["gold_pids"]) - 1 for row in rows) == promotion.promoted
    for row in rows:
        number = row["gold_pids"][0][1:]
        assert set(row["gold_pids"][1:]) <= {f"q{number}"}
        cited = [f"[DOC {n}]" for n, doc in enumerate(row["docs"]) if doc["pid"] in row["gold_pids"]]
        assert row["target"].startswith(f"Relevant documents: {', '.join(cited)}\n")


def test_a_passage_without_a_verdict_remains_a_negative(pool: Path, smollm2: str) -> None:
    spec = data.spec(datasets=["squad"], split="all", tokenizer=smollm2, promote=0.8)
    rows, promotion = data.rows(spec, lambda matches: [(False, None, True)[at % 3] for at in range(len(matches))])
    assert promotion.refused > 0 < promotion.unjudged
    assert promotion.refused + promotion.unjudged + promotion.promoted == promotion.matched
    assert sum(len(row["gold_pids"]) - 1 for row in rows) == promotion.promoted


def test_the_command_uses_the_judge_of_its_option(
    pool: Path, smollm2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "data", str(tmp_path / "rows.jsonl"), "--dataset", "squad", "--split", "all"]
    line += ["--tokenizer", smollm2, "--promote", "0.8"]
    assert invoke([*line, "--json"]) == 0
    without_judge = json.loads(capsys.readouterr().out)["promotion"]
    assert (without_judge["judge"], without_judge["refused"], without_judge["unjudged"]) == (None, 0, 0)
    assert invoke([*line, "--judge", "rule", "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)["promotion"]
    assert (judged["judge"], judged["matched"]) == ("rule", without_judge["matched"])
    # The passage of another town is similar but not relevant to the question.
    assert 0 < judged["promoted"] == judged["matched"] - judged["refused"] < without_judge["promoted"]
    assert invoke([*line, "--judge", "rule"]) == 0
    assert f"rule: {judged['refused']} refused, 0 unjudged" in capsys.readouterr().out
    assert invoke([*line, "--judge", "oracle"]) == 2
    assert "cannot read the judge's name" in capsys.readouterr().err
    assert invoke([*line[:-1], "0", "--judge", "rule"]) == 2
    assert "--judge confirms what --promote relabels" in capsys.readouterr().err


def test_negatives_come_from_the_chosen_ranking(pool: Path, smollm2: str) -> None:
    shares = {}
    for negatives in ("bm25", "random"):
        spec = data.spec(
            datasets=["squad"], split="all", negatives=negatives, length_matched=False, promote=None, tokenizer=smollm2
        )
        rows, _ = data.rows(spec)
        others = [{d["pid"] for d in row["docs"]} - {*row["gold_pids"]} for row in rows]
        shares[negatives] = sum(
            f"q{row['gold_pids'][0][1:]}" in pids for row, pids in zip(rows, others, strict=True)
        ) / len(rows)
    assert shares["bm25"] > 0.9
    assert shares["random"] < 0.5


texts = st.lists(st.sampled_from(["fox", "gnu", "emu", "Oza", "the", "1984", "?"]), max_size=12).map(" ".join)


@given(one=texts, other=texts)
def test_similarity_is_symmetric_and_1_for_the_same_words(one: str, other: str) -> None:
    value = similarity(one, other)
    assert 0 <= value <= 1
    assert value == similarity(other, one)
    assert similarity(one, one) in (0.0, 1.0)
    assert similarity("Fox, emu!", "the fox emu") == 1


def test_few_negatives_of_a_real_context_are_near_duplicates(squad: Any) -> None:
    _, rows, promotion = squad
    assert promotion.compared > 1000
    assert promotion.promoted <= promotion.compared / 100
    assert promote(rows[:8], threshold=0.05)[1].matched > 0


def row(n: int) -> Any:
    return {"cluster": "c", "id": str(n), "source": "s", "licence": "l", "target": f"Answer: {n}\u2028"}


def test_a_file_records_its_inputs_and_returns_its_rows(tmp_path: Path, smollm2: str) -> None:
    spec = data.spec(datasets=["squad"], tokenizer=smollm2)
    file = tmp_path / "rows.jsonl"
    data.write(file, spec, [row(1), row(2)], {"rows": 2})
    header, rows = data.read(file)
    assert rows == [row(1), row(2)]
    assert header["rows"] == 2
    assert header["inputs"]["spec"]["datasets"] == ["squad"]
    assert header["inputs"]["sources"] == ["s"]
    assert len(header["inputs"]["tokenizer"]) == 64
    before = file.read_bytes()
    data.write(file, spec, [row(1), row(2)], {"rows": 2})
    assert file.read_bytes() == before
    assert [*tmp_path.iterdir()] == [file]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = data.spec(datasets=["squad"], tokenizer=smollm2)
    file = tmp_path / "rows.jsonl"
    data.write(file, spec, [row(1)], {})
    before = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*rows.jsonl \(No space left on device\)"):
        data.write(file, spec, [row(2)], {})
    assert file.read_bytes() == before
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("Answer: 1", "Answer: 7"), r"was modified after it was written"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", r"was modified after"),
        (lambda text: text.replace("training rows 1", "training rows 0"), r"is not a file of training rows"),
        (lambda text: "{", r"is not a file of training rows"),
        (lambda text: "[]\n", r"is not a file of training rows"),
        (lambda text: "", r"is not a file of training rows"),
    ],
)
def test_a_damaged_file_is_an_error(damage: Any, message: str, tmp_path: Path, smollm2: str) -> None:
    file = tmp_path / "rows.jsonl"
    data.write(file, data.spec(datasets=["squad"], tokenizer=smollm2), [row(1), row(2)], {})
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=message):
        data.read(file)
    with pytest.raises(UserError, match=r"No such file.*lceval train data"):
        data.read(tmp_path / "none.jsonl")


def test_the_command_writes_the_file_and_prints_the_report(
    pool: Path, smollm2: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pool / "out.jsonl"
    line = f"train data {file} --dataset squad --mode ao --mode idq --split train --seed 0 --seed 1 --questions 2"
    line += f" --negatives bm25 --limit 30 --tokenizer {smollm2}"
    assert invoke([*line.split(), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    header, rows = data.read(file)
    assert printed == {"file": str(file), **header["report"]}
    assert len(rows) == printed["rows"] <= 30
    assert {row["output_format"] for row in rows} == {"ao", "idq"}
    assert invoke(line.split()) == 0
    assert "per context" in capsys.readouterr().out
    assert invoke(["train", "data", str(file), "--dataset", "sqad", "--tokenizer", smollm2]) == 2
    assert "unknown dataset 'sqad'" in capsys.readouterr().err
