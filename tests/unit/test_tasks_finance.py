"""Rows of the finance suite: real samples if available, synthetic records through the hub's loader."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, prompts, tokens
from lceval.tasks.finance import loong, reports
from lceval.tasks.leakage import LeakIndex
from lceval.tasks.parsing import normalize

Rows = list[Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer with one token per word or punctuation mark."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>").save_pretrained(folder)
    return str(folder)


def rows_of(task: str, **metadata: Any) -> Rows:
    return build.rows_of(catalogue.find(task), metadata)


def check(rows: Rows, *, gold: bool = True) -> None:
    assert len({row["id"] for row in rows}) == len(rows)
    fields = set(rows[0])
    for row in rows:
        assert set(row) == fields
        pids = [document["pid"] for document in row["docs"]]
        assert len(set(pids)) == len(pids)
        assert set(row["gold_pids"]) <= set(pids)
        assert bool(row["gold_pids"]) == gold
        assert row["answers"]
        assert all(answer.strip() for answer in row["answers"])
        assert row["question"].strip()
        assert all(document["text"] == document["text"].strip() != "" for document in row["docs"])
        assert prompts.prompt(row).count(row["context"]) == 1
    together = [row["cluster"] for row in rows]
    assert len([1 for one, two in pairwise(together) if one != two]) == len(set(together)) - 1


def one_line(task: str, **metadata: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(task, **metadata)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _lines(folder: Path, pattern: str) -> list[str]:
    (file,) = folder.glob(f"{pattern}.jsonl")
    return file.read_text(encoding="utf-8").splitlines()


# TAT-QA


def test_tatqa_has_every_question_with_its_evidence(data_folder: Path) -> None:
    rows = rows_of("lc_tatqa_ao")
    check(rows)
    assert len(rows) == 1668
    assert len({row["cluster"] for row in rows}) == 278
    assert Counter(row["answer_type"] for row in rows) == {
        "span": 701,
        "arithmetic": 718,
        "multi-span": 217,
        "count": 32,
    }
    records = map(json.loads, _lines(data_folder, "tatqa/*"))
    answer_sources = {
        question["uid"]: question["answer_from"] for record in records for question in record["questions"]
    }
    for row in rows:
        has_table = row["docs"][0]["pid"] in row["gold_pids"]
        assert has_table == ("table" in answer_sources[row["id"]])
        assert answer_sources[row["id"]] == "table" or len(row["gold_pids"]) > has_table


def test_tatqa_renders_a_table_as_rows_between_pipes(data_folder: Path) -> None:
    row = rows_of("lc_tatqa_ao")[0]
    first = row["docs"][0]["text"].split("\n")
    assert first[2:4] == ["| Fixed Price | $ 1,452.4 | $ 1,146.2 | $ 1,036.9 |", "| Other | 44.1 | 56.7 | 70.8 |"]
    assert row["context"].startswith(row["docs"][0]["text"] + "\n\n")


TATQA = {
    "table": {"uid": "t1", "table": [["", "2020", "2019"], ["", "", ""], ["Sales", "$ 12.5", "(3)"]]},
    "paragraphs": [{"uid": "p1", "order": 1, "text": "In millions."}, {"uid": "p2", "order": 2, "text": "Unaudited."}],
    "questions": [
        {
            "uid": f"q{n}",
            "order": n,
            "question": question,
            "answer": answer,
            "derivation": "",
            "answer_type": kind,
            "answer_from": answer_from,
            "rel_paragraphs": paragraphs,
            "req_comparison": False,
            "scale": scale,
        }
        for n, (question, answer, kind, answer_from, paragraphs, scale) in enumerate(
            [
                ("What were sales in 2020?", ["$ 12.5"], "span", "table-text", ["1"], "million"),
                ("By how much did they change?", 15.5, "arithmetic", "table", [], "million"),
                ("Is it audited?", ["Unaudited"], "span", "text", ["2"], ""),
            ]
        )
    ],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder."""
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def put(hub: Path, task: str, records: list[dict[str, Any]], name: str = "") -> None:
    """Write records in the format of the hub repository."""
    described = catalogue.find(task).dataset.hub
    assert described is not None
    (pattern,) = described.files.values()
    file = hub / "hub" / described.repo / (name or pattern)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(file)
    else:
        file.write_text(json.dumps(records), encoding="utf-8")


def test_tatqa_loads_the_hubs_file_with_answers_of_several_types(hub: Path) -> None:
    put(hub, "lc_tatqa_ao", [TATQA])
    rows = rows_of("lc_tatqa_ao")
    check(rows)
    assert [row["answers"] for row in rows] == [["$ 12.5 million"], ["15.5 million"], ["Unaudited"]]
    assert [row["gold_pids"] for row in rows] == [["t1", "p1"], ["t1"], ["p2"]]
    assert rows[0]["context"] == "|  | 2020 | 2019 |\n| Sales | $ 12.5 | (3) |\n\nIn millions.\n\nUnaudited."
    assert (rows[1]["spans"], rows[1]["scale"], rows[1]["answer_type"]) == (["15.5"], "million", "arithmetic")


@pytest.mark.parametrize("lost", ["table", "paragraphs", "questions"])
def test_an_invalid_tatqa_record_raises(hub: Path, lost: str) -> None:
    put(hub, "lc_tatqa_ao", [{key: value for key, value in TATQA.items() if key != lost}])
    assert "tatqa_dataset_dev.json record 1 is not a TAT-QA context" in one_line("lc_tatqa_ao")


# ConvFinQA


def test_convfinqa_has_the_last_question_and_the_previous_questions(data_folder: Path) -> None:
    rows = rows_of("lc_convfinqa_ao")
    check(rows)
    assert len(rows) == 200
    by_id = {record["id"]: record for record in map(json.loads, _lines(data_folder, "convfinqa/*"))}
    for row in rows:
        record = by_id[row["id"]]
        assert row["question"].startswith(record["questions"][-1])
        assert all(question.strip() in row["question"] for question in record["questions"])
        assert row["answers"][0] in ("yes", "no") or float(row["answers"][0]) == record["answer"]
        # splitting into sentences loses no text of the page
        page_text = " ".join(document["text"] for document in row["docs"] if document["title"] == "text")
        assert page_text.split() == record["text"].split()


def test_convfinqas_gold_documents_are_the_annotated_table_and_sentences(data_folder: Path) -> None:
    records = {record["id"]: record for record in map(json.loads, _lines(data_folder, "convfinqa/*"))}
    whole = 0
    for row in rows_of("lc_convfinqa_ao"):
        gold = [document for document in row["docs"] if document["pid"] in row["gold_pids"]]
        golden, table = records[row["id"]]["golden_text"], records[row["id"]]["golden_table"]
        if len(gold) == len(row["docs"]) > 2:
            whole += 1
            continue
        assert (gold[0]["title"] == "table") == bool(table.strip())
        gold_words = set(normalize(" ".join(document["text"] for document in gold)).split())
        golden_words = set(normalize(golden).split())
        assert len(golden_words & gold_words) >= 0.9 * len(golden_words)
    assert whole <= 1  # one conversation has no evidence annotation


def test_sentences_end_at_full_stops_and_not_at_abbreviations() -> None:
    text = "sales in the u.s . rose to $ 1.2 million . acme inc . paid ( see note 5 ) . no . of staff : 12 ."
    assert reports.sentences(text) == [
        "sales in the u.s . rose to $ 1.2 million .",
        "acme inc . paid ( see note 5 ) .",
        "no . of staff : 12 .",
    ]
    assert reports.sentences("") == []
    assert reports.sentences("no stop at the end") == ["no stop at the end"]


# FinQA and DocFinQA: on the hub only

FINQA = {
    "id": "ACME/2009/page_49.pdf-1",
    "pre_text": ["interest rates rose .", "."],
    "post_text": ["all in millions ."],
    "question": "what was the change in sales?",
    "answers": "-3.5%",
    "table": [["", "2009", "2008"], ["sales", "$ 193", "200"]],
}


def test_finqa_loads_the_hubs_records(hub: Path) -> None:
    second = {**FINQA, "id": "ACME/2009/page_49.pdf-2", "question": "did sales fall?", "answers": "yes"}
    empty = {**FINQA, "id": "ACME/2009/page_49.pdf-3", "answers": ""}
    other = {**FINQA, "id": "ACME/2010/page_1.pdf-1", "post_text": []}
    put(hub, "lc_finqa_ao", [FINQA, other, second, empty])
    rows = rows_of("lc_finqa_ao")
    check(rows, gold=False)
    assert [row["id"][-5:] for row in rows] == ["pdf-1", "pdf-2", "pdf-1"]
    page = rows[0]["cluster"]
    assert rows[0] == {
        "id": "ACME/2009/page_49.pdf-1",
        "question": "what was the change in sales?",
        "answers": ["-3.5%"],
        "docs": [
            {"pid": f"{page}-before", "title": "before", "text": "interest rates rose ."},
            {"pid": f"{page}-table", "title": "table", "text": "|  | 2009 | 2008 |\n| sales | $ 193 | 200 |"},
            {"pid": f"{page}-after", "title": "after", "text": "all in millions ."},
        ],
        "gold_pids": [],
        "cluster": page,
        "length_tokens": None,
        "source": rows[0]["source"],
        "licence": "MIT",
        "instruction": prompts.instruction("report", "number"),
        "context": "interest rates rose .\n\n|  | 2009 | 2008 |\n| sales | $ 193 | 200 |\n\nall in millions .",
        "ask": "Question: what was the change in sales?",
        "reply_prefix": "Answer:",
        "context_setting": "full",
    }
    assert rows[0]["source"].startswith("dreamerdeo/finqa/default/finqa-test.parquet sha256:")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("question", ": invalid question=None"),
        ("table", " has no table"),
        ("pre_text", " has no pre_text"),
    ],
)
def test_an_invalid_finqa_record_raises(hub: Path, lost: str, message: str) -> None:
    put(hub, "lc_finqa_ao", [FINQA, {key: value for key, value in FINQA.items() if key != lost}])
    assert f"finqa-test.parquet record 2{message}" in one_line("lc_finqa_ao")


DOCFINQA = {
    "Context": "A long filing.\nSales were 200.",
    "Question": "what were sales?",
    "Program": "",
    "Answer": "200",
}


def test_docfinqa_loads_the_hubs_records_and_groups_the_questions_of_a_filing(hub: Path) -> None:
    other = {**DOCFINQA, "Context": "Another filing."}
    again = {**DOCFINQA, "Question": "did they rise?", "Answer": "yes"}
    prose = {**DOCFINQA, "Question": "why?", "Answer": "because of the rates"}
    put(hub, "lc_docfinqa_ao", [DOCFINQA, other, again, prose])
    rows = rows_of("lc_docfinqa_ao")
    check(rows, gold=False)
    assert [row["id"] for row in rows] == ["docfinqa-0001", "docfinqa-0003", "docfinqa-0002"]
    assert {key: rows[0][key] for key in ("question", "answers", "context", "licence", "ask")} == {
        "question": "what were sales?",
        "answers": ["200"],
        "context": "A long filing.\nSales were 200.",
        "licence": "MIT",
        "ask": "Question: what were sales?",
    }


def test_docfinqa_accepts_numeric_answers(hub: Path) -> None:
    put(hub, "lc_docfinqa_ao", [{**DOCFINQA, "Answer": 0.25}, {**DOCFINQA, "Answer": 3.0, "Question": "how many?"}])
    assert [row["answers"] for row in rows_of("lc_docfinqa_ao")] == [["0.25"], ["3"]]


@pytest.mark.parametrize("lost", ["Context", "Question", "Answer"])
def test_an_invalid_docfinqa_record_raises(hub: Path, lost: str) -> None:
    put(hub, "lc_docfinqa_ao", [{key: value for key, value in DOCFINQA.items() if key != lost}])
    assert f"record 1: invalid {lost}=None" in one_line("lc_docfinqa_ao")


# FinanceBench


def test_financebench_has_whole_filings_with_gold_evidence_pages(data_folder: Path) -> None:
    rows = rows_of("lc_financebench_ao")
    check(rows)
    assert len(rows) == 52
    assert len({row["cluster"] for row in rows}) == 20
    for row in rows:
        numbers = [int(document["pid"].rpartition("-p")[2]) for document in row["docs"]]
        assert numbers == sorted(numbers)
        assert all(document["pid"].startswith(f"{row['cluster']}-p") for document in row["docs"])
        assert all(document["text"].startswith(document["title"] + "\n") for document in row["docs"])
    pages = sum(len({document["pid"] for document in row["docs"]}) for row in {r["cluster"]: r for r in rows}.values())
    assert pages == 1163  # 1,165, two of them blank


def test_context_gold_is_the_oracle_and_none_is_closed_book(data_folder: Path) -> None:
    oracle, closed = (rows_of("lc_financebench_ao", context=kind) for kind in ("gold", "none"))
    assert Counter(len(row["docs"]) for row in oracle) == {1: 49, 2: 2, 3: 1}
    assert all([document["pid"] for document in row["docs"]] == row["gold_pids"] for row in oracle)
    assert {row["context"] for row in closed} == {""}
    assert {row["instruction"] for row in closed} == {prompts.instruction("none", "short")}


@pytest.fixture(scope="module")
def multi(data_folder: Path, words: str) -> Rows:
    return rows_of("lc_financebenchmulti_ao_8k", pretrained=words)


def test_financebenchmulti_meets_the_length(multi: Rows, words: str) -> None:
    check(multi)
    meter = tokens.meter_for("t", {"pretrained": words})
    for row in multi:
        (prompt,) = meter.prompts([prompts.prompt(row)])
        assert row["length_tokens"] == prompt + catalogue.new_tokens("short")
        assert 0.98 * 8192 <= row["length_tokens"] <= 8192
    assert len(multi) == 52


def test_financebenchmulti_fills_with_the_same_filing_first(multi: Rows, data_folder: Path) -> None:
    records = map(json.loads, _lines(data_folder, "financebench/document_pages"))
    pages = Counter(record["doc_name"] for record in records)
    alone = mixed = 0
    for row in multi:
        filing = row["gold_pids"][0].rpartition("-p")[0]
        filings = [document["pid"].rpartition("-p")[0] for document in row["docs"]]
        if pages[filing] > 100:
            # the last page may be of another filing, as the one that fits best
            assert filings.count(filing) >= len(filings) - 1
            alone += 1
        elif pages[filing] < 10:
            assert len(set(filings)) > 1
            mixed += 1
    assert alone
    assert mixed


def test_no_other_page_of_financebenchmulti_contains_the_answer(multi: Rows) -> None:
    checked = 0
    for row in multi:
        (answer,) = row["answers"]
        if normalize(answer) in ("yes", "no"):
            continue
        leaking = LeakIndex([document["text"] for document in row["docs"]]).containing([normalize(answer)])
        assert {row["docs"][index]["pid"] for index in leaking} <= set(row["gold_pids"])
        checked += 1
    assert checked == 51


def test_the_evidence_of_financebenchmulti_is_at_every_depth(multi: Rows) -> None:
    depths = []
    for row in multi:
        pids = [document["pid"] for document in row["docs"]]
        depths += [pids.index(pid) / (len(pids) - 1) for pid in row["gold_pids"]]
    assert min(depths) == 0
    assert max(depths) == 1
    assert 0.35 < sum(depths) / len(depths) < 0.65


def test_the_seed_determines_the_pages_of_financebenchmulti(multi: Rows, words: str) -> None:
    again = rows_of("lc_financebenchmulti_ao_8k", pretrained=words)
    other = rows_of("lc_financebenchmulti_ao_8k", pretrained=words, data_seed=7)
    assert again == multi
    assert [row["docs"] for row in other] != [row["docs"] for row in multi]
    assert [row["id"] for row in other] == [row["id"] for row in multi]


FILING = {"id": "q1", "question": "What is it?", "answer": "Customer deposits", "doc_name": "ACME_10K"}


@pytest.fixture
def filings(hub: Path) -> Any:
    """A function that writes questions on pages of two small filings."""

    def write(questions: list[dict[str, Any]]) -> None:
        folder = hub / "financebench"
        folder.mkdir(parents=True)
        texts = {"ACME_10K": ["Cover", "The largest is customer deposits.", " "], "OTHER_10K": ["Other", "Deposits"]}
        pages = [
            {"doc_name": name, "page_num": n, "text": text} for name, of in texts.items() for n, text in enumerate(of)
        ]
        for name, records in (("questions", questions), ("document_pages", pages)):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")

    return write


def test_financebench_has_only_questions_with_available_pages(filings: Any) -> None:
    absent = {**FILING, "id": "q2", "doc_name": "GONE_10K", "gold_pages": [["GONE_10K", 0]]}
    filings([{**FILING, "gold_pages": [["ACME_10K", 1], ["ACME_10K", 1]]}, absent])
    (row,) = rows_of("lc_financebench_ao")
    assert row["gold_pids"] == ["ACME_10K-p1"]
    assert [document["pid"] for document in row["docs"]] == ["ACME_10K-p0", "ACME_10K-p1"]
    assert row["docs"][1] == {
        "pid": "ACME_10K-p1",
        "title": "ACME_10K page 1",
        "text": "ACME_10K page 1\nThe largest is customer deposits.",
    }


def test_financebench_raises_without_gold_pages_or_questions(filings: Any) -> None:
    filings([FILING])
    assert "financebench/questions.jsonl id='q1': invalid gold_pages=None" in one_line("lc_financebench_ao")


def test_financebench_raises_without_a_usable_question(filings: Any) -> None:
    filings([{**FILING, "doc_name": "GONE_10K", "gold_pages": [["GONE_10K", 0]]}])
    assert "lc_financebench_ao has no rows" in one_line("lc_financebench_ao")


# Loong: on the hub only

LOONG = {
    "level": 3,
    "set": 1,
    "length": 45181,
    "type": "financial",
    "language": "en",
    "question": "Group the companies by sales.",
    "instruction": "Please read.",
    "prompt_template": "{docs}\n\n{instruction}\n\n{question}",
    "doc": ["Acme, Inc.", "Widget Corp."],
    "answer": '{"high": [],   "low": ["Acme, Inc."]}',
    "shuffle_doc": True,
    "id": "id-1",
    "docs": "\u300aWidget Corp.\u300b\nSales: 7.\n\nNotes.\n\n\n\u300aAcme, Inc.\u300b\nSales: 3.\n\n",
}
LOONG_FILE = "data/financial-00000-of-00001.parquet"


def test_loong_loads_the_hubs_records(hub: Path) -> None:
    simple = {**LOONG, "id": "id-2", "level": 1, "question": "What are the sales of Acme?", "answer": "$3"}
    chinese = {**LOONG, "id": "id-3", "language": "zh"}
    put(hub, "lc_loong_ao", [LOONG, simple, chinese], LOONG_FILE)
    rows = rows_of("lc_loong_ao")
    check(rows, gold=False)
    name = rows[0]["cluster"]
    assert rows[0] == {
        "id": "id-1",
        "question": "Group the companies by sales.",
        "answers": ['{"high": [], "low": ["Acme, Inc."]}'],
        "docs": [
            {"pid": f"{name}-0", "title": "Widget Corp.", "text": "Widget Corp.\nSales: 7.\n\nNotes."},
            {"pid": f"{name}-1", "title": "Acme, Inc.", "text": "Acme, Inc.\nSales: 3."},
        ],
        "gold_pids": [],
        "cluster": name,
        "length_tokens": None,
        "source": rows[0]["source"],
        "licence": "Apache-2.0",
        "instruction": prompts.instruction("documents", "judged"),
        "context": "[DOC 0]\nWidget Corp.\nSales: 7.\n\nNotes.\n\n[DOC 1]\nAcme, Inc.\nSales: 3.",
        "ask": "Question: Group the companies by sales.",
        "reply_prefix": "",
        "context_setting": "full",
        "level": 3,
        "set": 1,
    }
    assert [(row["id"], row["level"], row["answers"]) for row in rows[1:]] == [("id-2", 1, ["$3"])]


def test_loong_can_be_restricted_to_levels(hub: Path) -> None:
    put(hub, "lc_loong_ao", [LOONG, {**LOONG, "id": "id-2", "level": 1}], LOONG_FILE)
    task = catalogue.find("lc_loong_ao")
    for levels, ids in (([1], ["id-2"]), ([1, 3], ["id-1", "id-2"])):
        some = dataclasses.replace(task, dataset=dataclasses.replace(task.dataset, options={"levels": levels}))
        assert [row["id"] for row in build.rows_of(some, {})] == ids
    none = dataclasses.replace(task, dataset=dataclasses.replace(task.dataset, options={"levels": [5]}))
    with pytest.raises(UserError, match=r"levels=\[5\]: expected some of 1, 2, 3, 4"):
        build.rows_of(none, {})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"docs": None}, "docs=None"),
        ({"level": None}, "level=None"),
        ({"answer": ""}, ": no answer"),
        ({"docs": " "}, ": no docs"),
    ],
)
def test_an_invalid_loong_record_raises(hub: Path, damage: dict[str, Any], message: str) -> None:
    put(hub, "lc_loong_ao", [{**LOONG, **damage}], LOONG_FILE)
    assert message in one_line("lc_loong_ao")


def test_reports_without_a_heading_are_one_document() -> None:
    (only,) = loong.reports("Table of contents\nSales: 3.", "x")
    assert only == {"pid": "x-0", "title": "", "text": "Table of contents\nSales: 3."}
    # such brackets within a line are not a heading
    assert len(loong.reports("\u300aAcme\u300b\nsee \u300aNotes\u300b below", "x")) == 1


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("-$0.04", "-$0.04"),
        ("170,000", "170,000"),
        ("12", "12"),
        ({"low": ["A", "B"]}, '{"low": ["A", "B"]}'),
        (["A", "B"], '["A", "B"]'),
        ('{\n "low": ["\u00c9tat"]}', '{"low": ["\u00c9tat"]}'),
        ("{not json", "{not json"),
        ({}, ""),
        (None, ""),
    ],
)
def test_loongs_answers_are_rendered_on_one_line(answer: object, line: str) -> None:
    assert loong.compact(answer) == line


def test_every_answer_of_loong_can_be_rendered(data_folder: Path) -> None:
    records = [json.loads(line) for line in _lines(data_folder, "loong/*")]
    lines = [loong.compact(record["answer"]) for record in records]
    assert len(lines) == 295
    assert all(lines)
    parsed = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(parsed) == 90  # 89 objects, and one text


# All datasets


@pytest.mark.parametrize("task", ["lc_finqa_ao", "lc_docfinqa_ao", "lc_loong_ao"])
def test_without_a_copy_or_a_network_the_error_names_both_remedies(
    hub: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr("lceval.tasks.sources._commit", lambda hub: hub.revision)
    message = one_line(task)
    assert "from the hub (no route to the hub)" in message
    assert "lceval data fetch" in message


@pytest.mark.parametrize("task", ["lc_convfinqa_ao", "lc_financebench_ao"])
def test_without_the_local_files_the_error_names_them(hub: Path, task: str) -> None:
    assert f"{catalogue.find(task).dataset.files[0]}" in one_line(task)


def test_datasets_that_do_not_fit_an_8k_model_are_not_in_the_group() -> None:
    members = set(catalogue.groups()["lc_finance"])
    assert {"lc_tatqa_ao", "lc_convfinqa_ao", "lc_financebenchmulti_ao_8k"} <= members
    assert not {"lc_docfinqa_ao", "lc_finqa_ao", "lc_financebench_ao", "lc_loong_ao"} & members
