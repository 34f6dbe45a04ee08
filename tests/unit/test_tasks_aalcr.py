"""AA-LCR on hand-made files in the layout of its repository."""

from __future__ import annotations

import csv
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lceval.core.errors import UserError
from lceval.judge.backends.rule import RuleJudge
from lceval.judge.rubrics import Case, load, render
from lceval.judge.scores import rubric_of
from lceval.tasks import build, catalogue

TASK = "lc_aalcr_ao"
NAMES = ["b.txt", "a.txt", "é.txt"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local copy of the repository: two questions on one set of documents, one on another."""
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "hub" / "ArtificialAnalysis" / "AA-LCR"
    (copy / "extracted_text").mkdir(parents=True)
    questions = [
        ("set1", "Who?", "Ann", NAMES),
        ("set2", "How many?", "12", ["a.txt"]),
        ("set1", "When?", "1901", NAMES),
    ]
    with (copy / "AA-LCR_Dataset.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["document_category", "document_set_id", "question_id", "question", "answer", "data_source_filenames"]
        )
        for number, (documents, question, answer, names) in enumerate(questions, start=1):
            writer.writerow(["Legal", documents, number, question, answer, ";".join(names)])
    with zipfile.ZipFile(copy / "extracted_text" / "AA-LCR_extracted-text.zip", "w") as archive:
        for name in NAMES:
            # Made on a system that decomposes accents.
            archive.writestr(f"lcr/Legal/set1/{unicodedata.normalize('NFD', name)}", f"Text of {name}\n")
        archive.writestr("lcr/Legal/set2/a.txt", "Another text.")
    return copy


def rows() -> list[Any]:
    return build.rows_of(catalogue.find(TASK), {})


def test_a_question_has_its_documents_in_the_order_of_the_benchmark(repository: Path) -> None:
    built = rows()
    assert [row["id"] for row in built] == ["1", "3", "2"]
    assert [document["title"] for document in built[0]["docs"]] == NAMES
    assert built[0]["context"] == "[DOC 0]\nText of b.txt\n\n[DOC 1]\nText of a.txt\n\n[DOC 2]\nText of é.txt"
    assert built[0]["cluster"] == built[1]["cluster"] != built[2]["cluster"]
    assert built[2]["answers"] == ["12"]


def test_a_document_that_is_not_in_the_archive_is_named(repository: Path) -> None:
    table = repository / "AA-LCR_Dataset.csv"
    table.write_text(table.read_text().replace("a.txt,", "").replace("12,a.txt", "12,c.txt"))
    with pytest.raises(UserError, match=r"record 2: lcr/Legal/set2/c\.txt is not in the archive"):
        rows()


def test_a_missing_or_damaged_archive_is_named(repository: Path) -> None:
    archive = repository / "extracted_text" / "AA-LCR_extracted-text.zip"
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(UserError, match=r"is damaged .*: download it again"):
        rows()
    archive.unlink()
    with pytest.raises(UserError, match=r"missing extracted_text/AA-LCR_extracted-text.zip in .*lceval data fetch"):
        rows()


@pytest.mark.parametrize(("answer", "verdict"), [("It was Ann.", "correct"), ("Nobody knows.", "incorrect")])
def test_a_judge_compares_the_answer_with_the_reference(answer: str, verdict: str) -> None:
    name = rubric_of(TASK)
    assert name == "equality"
    rubric, case = load(name), Case("Who?", ("Ann",), answer)
    assert f'"{verdict}"' in RuleJudge().ask(rubric, case, render(rubric, case)).text
