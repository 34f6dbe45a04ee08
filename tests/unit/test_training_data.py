"""Training rows: drawn, promoted, measured and kept in a file."""

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
from lceval.errors import UserError
from lceval.tasks import tokens
from lceval.training import data, figures
from lceval.training.promotion import Match, Promotion, likeness, promote


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path_factory.getbasetemp() / "splits-cache"))


@pytest.fixture
def made(smollm2: str, data_folder: Path) -> tuple[data.Spec, list[Any], Promotion]:
    """Two draws of eight questions a context from SQuAD's training side."""
    spec = data.spec(datasets=["squad"], questions=8, seeds=[0, 1], tokenizer=smollm2)
    return spec, *data.rows(spec)


def by_context(rows: Sequence[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row["cluster"], []).append(row)
    return found


def test_rows_of_several_draws_stand_by_context_with_their_replies(made: Any) -> None:
    spec, rows, _ = made
    contexts = by_context(rows)
    order = [row["cluster"] for row in rows]
    assert [*contexts] == [name for n, name in enumerate(order) if n == 0 or order[n - 1] != name]
    draws: dict[int, set[str]] = {}
    for of in contexts.values():
        assert len({row["context"] for row in of}) == len({row["instruction"] for row in of}) == 1
        assert len({row["question"] for row in of}) == len(of) == 8
        draws.setdefault(of[0]["data_seed"], set()).add(of[0]["context"])
        for row in of:
            assert (row["dataset"], row["output_format"]) == ("squad", "ao")
            assert row["target"] == f"Answer: {row['answers'][0]}"
            assert set(row["gold_pids"]) <= {document["pid"] for document in row["docs"]}
    assert set(draws) == {0, 1}
    assert draws[0].isdisjoint(draws[1])
    assert data.rows(spec)[0] == rows


def test_gold_and_other_documents_are_alike_in_length(made: Any, smollm2: str) -> None:
    spec, rows, _ = made
    meter = tokens.meter_for("t", {"pretrained": smollm2})
    length_matched = figures.lengths([*by_context(rows).values()], meter)
    assert length_matched is not None
    assert 0.46 < length_matched["gold_longer"] < 0.54
    assert length_matched["p"] > 0.05
    assert 0.93 < length_matched["mean_ratio"] < 1.07
    assert 0.93 < length_matched["median_ratio"] < 1.07
    usual, _ = data.rows(spec.model_copy(update={"length_matched": False, "seeds": (0,)}))
    without = figures.lengths([*by_context(usual).values()], meter)
    assert without is not None
    assert without["gold_longer"] > 0.65  # what there was to learn from length alone


@pytest.mark.parametrize("length_k", [1.5])
def test_a_length_between_two_tasks_is_kept_too(length_k: float, smollm2: str, data_folder: Path) -> None:
    spec = data.spec(datasets=["musique"], length_k=length_k, questions=1, tokenizer=smollm2)
    rows, _ = data.rows(spec)
    limit = round(length_k * 1024)
    assert len(rows) >= 20
    assert all(0.98 * limit <= row["length_tokens"] <= limit for row in rows)
    assert rows[0]["cluster"].startswith(f"musique-{limit}t-")


def test_a_limit_takes_whole_contexts(made: Any) -> None:
    spec, rows, _ = made
    some, _ = data.rows(spec.model_copy(update={"limit": 20}))
    assert some == rows[:16]
    one, _ = data.rows(spec.model_copy(update={"limit": 3}))
    assert one == rows[:8]


def test_a_report_counts_what_there_is(made: Any, smollm2: str) -> None:
    spec, rows, promotion = made
    meter = tokens.meter_for("t", {"pretrained": smollm2})
    found = figures.report(spec, rows, promotion, meter)
    assert found["rows"] == len(rows) == 8 * found["contexts"]
    assert found["questions_per_context"] == {"least": 8, "mean": 8.0, "most": 8}
    assert found["leaks"]["left"] == 0 < found["leaks"]["kept_out"]
    assert sum(found["depth"]) == pytest.approx(1)
    assert max(found["depth"]) < 0.2  # gold lies everywhere
    read = sum(len(meter._tokenizer(row["target"]).input_ids) for row in rows)
    assert found["tokens"]["targets"] == read
    assert found["tokens"]["one_by_one"] > 5 * found["tokens"]["packed"]
    text = figures.text(found)
    assert "questions  8 to 8 on a context" in text
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
def test_a_field_that_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        data.spec(**{"datasets": ["squad"], **fields})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"datasets": ["sqad"]}, r"no dataset 'sqad'"),
        ({"datasets": ["squality"], "modes": ["sum"]}, r"squality has no mode 'sum' to learn: it has none"),
        (
            {"datasets": ["squad"], "modes": ["mc"]},
            r"squad has no mode 'mc' to learn: it has ao, id, idc, idq, rj, docid",
        ),
        ({"datasets": ["iris"], "length_k": 3, "split": "all"}, r"iris has no length_k=3: it has 2"),
        ({"datasets": ["iris"], "length_k": 2}, r"lc_iris_ao_2k has no split=: only"),
        ({"datasets": ["squad"], "negatives": "worst"}, r"no negatives='worst'"),
        ({"datasets": ["squad"], "split": "dev"}, r"no split='dev'"),
    ],
)
def test_what_there_is_not_is_refused_by_name(fields: dict[str, Any], message: str, smollm2: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        data.rows(data.spec(tokenizer=smollm2, **fields))
    assert "\n" not in str(caught.value)


def test_rows_of_tables_have_their_labels(smollm2: str) -> None:
    spec = data.spec(datasets=["iris"], length_k=2, split="all", tokenizer=smollm2, limit=12)
    rows, promotion = data.rows(spec)
    assert rows
    assert promotion == Promotion(promotion.compared, 0, 0)
    assert all(row["target"] == f"Answer: {row['answers'][0]}" for row in rows)
    found = figures.report(spec, rows, promotion, tokens.meter_for("t", {"pretrained": smollm2}))
    assert found["leaks"] == {"kept_out": None, "left": 0}
    assert found["lengths"] is None


# A pool of our own --------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty towns, each known for one thing, each told of twice in nearly the same words."""
    names = [
        f"{a}{b}a" for a in ("Bro", "Kla", "Dru", "Fe", "Gli", "Sta", "Mo", "Pu") for b in ("ng", "st", "lt", "rk")
    ]
    things = [
        f"{a}{b}ing" for a in ("spo", "cra", "ble", "thu", "wri", "gro", "fla", "ski") for b in ("mp", "nd", "ck", "pt")
    ]
    pad = "It lies by a lake and holds fairs in spring and in autumn, to which people come from all the country. "
    folder = tmp_path / "squad_xquad_en"
    folder.mkdir()
    passages, asked = [], []
    for n, (name, thing) in enumerate(zip(names, things, strict=True)):
        text = f"{name} is a town that has long been known for {thing}. {pad * 3}"[: 120 + 7 * n]
        again = f"{name} is a town that has long been known for it. {pad * 3}"[: 115 + 7 * n]
        passages += [{"pid": f"p{n}", "title": name, "text": text}, {"pid": f"q{n}", "title": name, "text": again}]
        asked.append({"question": f"What is {name} known for?", "answers": [thing], "gold_pids": [f"p{n}"]})
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    (folder / "passages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in passages))
    fill = tmp_path / "2wiki_corpus"
    fill.mkdir()
    more = [
        {"pid": f"w{n}", "title": f"Village {n}", "text": f"Village {n} is small. {pad * 3}"[: 90 + n]}
        for n in range(99)
    ]
    (fill / "passages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in more))
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_near_copies_of_gold_become_gold_and_a_judge_removes_false_ones(pool: Path, smollm2: str) -> None:
    fields: dict[str, Any] = {"datasets": ["squad"], "modes": ["id"], "split": "all", "tokenizer": smollm2}
    plain, nothing = data.rows(data.spec(**fields, promote=None))
    assert nothing == Promotion(0, 0, 0)
    assert {len(row["gold_pids"]) for row in plain} == {1}
    asked: list[Match] = []

    def judge(matches: Sequence[Match]) -> list[bool | None]:
        asked.extend(matches)
        return [match.question.split()[2] in match.passage for match in matches]

    rows, promotion = data.rows(data.spec(**fields, promote=0.8), judge)
    assert promotion.matched == len(asked)
    assert promotion.refused > 0 < promotion.promoted
    assert sum(len(row["gold_pids"]) - 1 for row in rows) == promotion.promoted
    for row in rows:
        number = row["gold_pids"][0][1:]
        assert set(row["gold_pids"][1:]) <= {f"q{number}"}
        named = [f"[DOC {n}]" for n, doc in enumerate(row["docs"]) if doc["pid"] in row["gold_pids"]]
        assert row["target"].startswith(f"Relevant documents: {', '.join(named)}\n")


def test_what_a_judge_gives_no_verdict_on_stays_a_negative(pool: Path, smollm2: str) -> None:
    spec = data.spec(datasets=["squad"], split="all", tokenizer=smollm2, promote=0.8)
    rows, promotion = data.rows(spec, lambda matches: [(False, None, True)[at % 3] for at in range(len(matches))])
    assert promotion.refused > 0 < promotion.unjudged
    assert promotion.refused + promotion.unjudged + promotion.promoted == promotion.matched
    assert sum(len(row["gold_pids"]) - 1 for row in rows) == promotion.promoted


def test_the_command_asks_the_judge_that_it_names(
    pool: Path, smollm2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "data", str(tmp_path / "rows.jsonl"), "--dataset", "squad", "--split", "all"]
    line += ["--tokenizer", smollm2, "--promote", "0.8"]
    assert invoke([*line, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["promotion"]
    assert (alone["judge"], alone["refused"], alone["unjudged"]) == (None, 0, 0)
    assert invoke([*line, "--judge", "rule", "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)["promotion"]
    assert (judged["judge"], judged["matched"]) == ("rule", alone["matched"])
    # Another town's passage, in the same words, says nothing of what was asked.
    assert 0 < judged["promoted"] == judged["matched"] - judged["refused"] < alone["promoted"]
    assert invoke([*line, "--judge", "rule"]) == 0
    assert f"rule: {judged['refused']} refused, 0 unjudged" in capsys.readouterr().out
    assert invoke([*line, "--judge", "oracle"]) == 2
    assert "cannot read the judge's name" in capsys.readouterr().err
    assert invoke([*line[:-1], "0", "--judge", "rule"]) == 2
    assert "--judge confirms what --promote finds" in capsys.readouterr().err


def test_negatives_come_from_the_ranking_that_is_asked_for(pool: Path, smollm2: str) -> None:
    shares = {}
    for negatives in ("bm25", "random"):
        spec = data.spec(
            datasets=["squad"], split="all", negatives=negatives, length_matched=False, promote=None, tokenizer=smollm2
        )
        rows, _ = data.rows(spec)
        others = [{d["pid"] for d in row["docs"]} - {*row["gold_pids"]} for row in rows]
        shares[negatives] = sum(
            f"q{row['gold_pids'][0][1:]}" in of for row, of in zip(rows, others, strict=True)
        ) / len(rows)
    assert shares["bm25"] > 0.9
    assert shares["random"] < 0.5


texts = st.lists(st.sampled_from(["fox", "gnu", "emu", "Oza", "the", "1984", "?"]), max_size=12).map(" ".join)


@given(one=texts, other=texts)
def test_likeness_is_a_share_that_is_full_only_for_the_same_words(one: str, other: str) -> None:
    found = likeness(one, other)
    assert 0 <= found <= 1
    assert found == likeness(other, one)
    assert likeness(one, one) in (0.0, 1.0)
    assert likeness("Fox, emu!", "the fox emu") == 1


def test_the_usual_passages_of_a_context_are_not_near_copies(made: Any) -> None:
    _, rows, promotion = made
    assert promotion.compared > 1000
    assert promotion.promoted <= promotion.compared / 100
    assert promote(rows[:8], threshold=0.05)[1].matched > 0


# The file -----------------------------------------------------------------------------------------


def row(n: int) -> Any:
    return {"cluster": "c", "id": str(n), "source": "s", "licence": "l", "target": f"Answer: {n}\u2028"}


def test_a_file_says_what_it_was_made_from_and_gives_its_rows_back(tmp_path: Path, smollm2: str) -> None:
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


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
        (lambda text: text.replace("Answer: 1", "Answer: 7"), r"was changed after it was written"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", r"was changed after"),
        (lambda text: text.replace("training rows 1", "training rows 0"), r"is not a file of training rows"),
        (lambda text: "{", r"is not a file of training rows"),
        (lambda text: "[]\n", r"is not a file of training rows"),
        (lambda text: "", r"is not a file of training rows"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(damage: Any, message: str, tmp_path: Path, smollm2: str) -> None:
    file = tmp_path / "rows.jsonl"
    data.write(file, data.spec(datasets=["squad"], tokenizer=smollm2), [row(1), row(2)], {})
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=message):
        data.read(file)
    with pytest.raises(UserError, match=r"No such file.*lceval train data"):
        data.read(tmp_path / "none.jsonl")


def test_the_command_writes_the_file_and_says_what_is_in_it(
    pool: Path, smollm2: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pool / "out.jsonl"
    line = f"train data {file} --dataset squad --mode ao --mode idq --split train --seed 0 --seed 1 --questions 2"
    line += f" --negatives bm25 --limit 30 --tokenizer {smollm2}"
    assert invoke([*line.split(), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    header, rows = data.read(file)
    assert said == {"file": str(file), **header["report"]}
    assert len(rows) == said["rows"] <= 30
    assert {row["output_format"] for row in rows} == {"ao", "idq"}
    assert invoke(line.split()) == 0
    assert "on a context" in capsys.readouterr().out
    assert invoke(["train", "data", str(file), "--dataset", "sqad", "--tokenizer", smollm2]) == 2
    assert "no dataset 'sqad'" in capsys.readouterr().err
