"""Parsing of realistic model outputs: cited documents, quotes, answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.tasks import parsing, scoring

DOCS = [
    {"pid": "a", "title": "", "text": "The harbour of Rena was dredged in 1954, as document 3 says."},
    {"pid": "b", "title": "", "text": "Ole Vinter built the Lindmark bridge."},
    {"pid": "c", "title": "", "text": "Rain fell for nine days."},
]
DOC = {"docs": DOCS, "gold_pids": ["a", "b"], "answers": ["Ole Vinter"]}


@pytest.mark.parametrize(
    ("text", "document_ids"),
    [
        ("Relevant documents: [DOC 3], [DOC 5]", [3, 5]),
        ("[DOC 3][DOC 4]", [3, 4]),
        ("[DOC 3, DOC 4] and [DOC 3]", [3, 4]),
        ("[DOC 1, 2; 7]", [1, 2, 7]),
        ("Document 3", [3]),
        ("**Documents 3 and 5** are relevant", [3, 5]),
        ("see doc #12.", [12]),
        ("[Doc: 4]", [4]),
        ("[DOC_6]", [6]),
        ("documents 2, 3", [2, 3]),
        ("[DOC -1]", []),
        ("[DOC -1], [DOC 2]", [2]),
        ("Relevant documents: [DOC 0, 1, and 2]", [0, 1, 2]),
        ("Documents 1, 2, or 4", [1, 2, 4]),
        ("[DOC 3,\nDOC 5]", [3, 5]),
        ("Relevant documents:\n1. [DOC 2]\n2. [DOC 5]", [2, 5]),
        ("Relevant documents:\n1) Document 2\n2) Document 5", [2, 5]),
        ("Review of documents: 2019 figures are in [DOC 4].", [4]),
        ("Based on the documents: 2019 figures fell.", None),
        ("Relevant documents: [3], [5]", [3, 5]),
        ("[3] and [5], as document 7 says", [3, 5]),
        ("[DOC-3]", [3]),
        ("[DOC-12, DOC-0]", [12, 0]),
        ("[DOC-1]", []),
        (f"[DOC {'1' * 5000}], [DOC 2]", [10**9, 2]),
        ("I read 3 documents and found nothing", None),
        ("the doctor said 5", None),
        ("Documentation 5", None),
        ("", None),
    ],
)
def test_citations_are_parsed_in_the_usual_spellings(text: str, document_ids: list[int] | None) -> None:
    assert parsing.document_ids(text) == document_ids


@given(st.lists(st.integers(0, 999), min_size=1))
def test_the_required_format_is_parsed(numbers: list[int]) -> None:
    text = "Relevant documents: " + ", ".join(f"[DOC {number}]" for number in numbers)
    assert parsing.document_ids(text) == list(dict.fromkeys(numbers))


def test_only_citations_before_the_last_answer_and_outside_thinking_count() -> None:
    text = "<think>[DOC 9]</think>[DOC 0]\nThe answer is: maybe\n[DOC 1]\nThe answer is: Ole [DOC 7]"
    assert parsing.document_ids(parsing.before_answer(text)) == [0, 1]
    assert parsing.document_ids(parsing.before_answer("[DOC 4] and no answer")) == [4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[DOC 1] "Ole Vinter built"', [(1, "Ole Vinter built")]),
        ("[DOC 1] “Ole Vinter” and “the bridge”", [(1, "Ole Vinter"), (1, "the bridge")]),
        ("[DOC 0]: The harbour\n[DOC 2]\nRain fell", [(0, "The harbour"), (2, "Rain fell")]),
        ("[DOC -1]", []),
        ("[DOC 1, 2] both", []),
        ("no tags", []),
    ],
)
def test_quotes_belong_to_the_tag_before_them(text: str, expected: list[Any]) -> None:
    assert [tuple(quote) for quote in parsing.quotes(text)] == expected


@pytest.mark.parametrize(
    ("cited", "gold", "scores"),
    [
        ([0, 1], {0, 1}, (1, 1, 1, 1, 1)),
        ([0], {0, 1}, (1, 0.5, 2 / 3, 0, 1)),
        ([0, 2, 3], {0}, (1 / 3, 1, 0.5, 0, 1)),
        ([5], {0}, (0, 0, 0, 0, 1)),
        ([], {0}, (0, 0, 0, 0, 1)),
        (None, {0}, (0, 0, 0, 0, 0)),
        ([], set(), (1, 1, 1, 1, 1)),
        ([3], set(), (0, 0, 0, 0, 1)),
        (None, set(), (0, 0, 0, 0, 0)),
    ],
)
def test_citations_are_scored_as_sets(cited: Any, gold: set[int], scores: tuple[float, ...]) -> None:
    assert tuple(scoring.citation_metrics(cited, gold).values()) == pytest.approx(scores)


def test_a_cited_answer_is_scored_with_its_documents() -> None:
    metrics = scoring.cited_results(DOC, ["Relevant documents: [DOC 0], [DOC 2]\nThe answer is: Ole Vinter"])
    assert (metrics["subem"], metrics["parse_rate"]) == (1, 1)
    assert (metrics["ids_precision"], metrics["ids_recall"], metrics["ids_exact"]) == (0.5, 0.5, 0)


def test_only_verbatim_copies_of_exactly_the_gold_documents_count() -> None:
    whole = f"[DOC 0] {DOCS[0]['text']}\n[DOC 1] {DOCS[1]['text']}\nThe answer is: Ole Vinter"
    assert scoring.copied_results(DOC, [whole])["content"] == 1
    assert scoring.copied_results(DOC, [whole])["ids_exact"] == 1
    assert scoring.copied_results(DOC, [whole.replace("dredged", "drained")])["content"] == 0
    assert scoring.copied_results(DOC, [whole.replace("\nThe", f"\n[DOC 2] {DOCS[2]['text']}\nThe")])["content"] == 0
    assert scoring.copied_results(DOC, ["The answer is: Ole Vinter"])["content"] == 0


def test_quotes_count_if_they_are_in_the_gold_document_they_cite() -> None:
    output = '[DOC 1] "Ole Vinter built"\n[DOC 0] "nine days"\nThe answer is: Ole Vinter'
    metrics = scoring.quoted_results(DOC, [output])
    assert (metrics["quotes"], metrics["ids_exact"], metrics["subem"]) == (0.5, 1, 1)
    assert scoring.quoted_results(DOC, ["The answer is: Ole Vinter"])["quotes"] == 0


def test_recall_and_mrecall_at_k() -> None:
    assert scoring.recall_at([2, 0, 9], {0, 1}, 1) == 0
    assert scoring.recall_at([2, 0, 9], {0, 1}, 2) == 0.5
    assert scoring.mrecall_at([0, 9], {0, 1}, 1) == 1
    assert scoring.mrecall_at([0, 9, 1], {0, 1}, 2) == 0
    assert scoring.mrecall_at([0, 9, 1], {0, 1}, 3) == 1
    assert scoring.retrieved_results(DOC, ["[DOC 1], [DOC 0]"])["mrecall_5"] == 1
    assert scoring.retrieved_results(DOC, ["nothing of use"])["ids_rate"] == 0


def test_references_match_regardless_of_case() -> None:
    doc = {"answers": ["QX1", "4711"]}
    metrics = scoring.listed_results(doc, ["I think 4711.\nAnswer: qx1, 99"])
    assert (metrics["recall"], metrics["recall_raw"], metrics["all_found"], metrics["parse_rate"]) == (0.5, 1, 0, 1)


@pytest.mark.parametrize("tag", ["[DOC 0]", "Document 0:", "[0]"])
def test_a_copy_may_contain_a_line_that_looks_like_a_tag(tag: str) -> None:
    text = "Minutes of 3 May.\nDocument 7 was read aloud by Ole.\nThe chair closed."
    doc = {
        "docs": [{"pid": "m", "title": "", "text": text}, DOCS[1]],
        "gold_pids": ["m"],
        "answers": ["Ole"],
    }
    metrics = scoring.copied_results(doc, [f"{tag} {text}\nThe answer is: Ole"])
    assert (metrics["content"], metrics["ids_exact"], metrics["ids_precision"]) == (1, 1, 1)
    # A copy that stops before the line is no copy.
    metrics = scoring.copied_results(doc, [f"{tag} Minutes of 3 May.\nThe answer is: Ole"])
    assert metrics["content"] == 0
