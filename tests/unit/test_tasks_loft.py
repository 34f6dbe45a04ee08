"""LOFT's metrics, on synthetic cases and the example predictions of its repository."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.tasks.icr import loft

IDS = st.lists(st.sampled_from("abcdefg"), unique=True, max_size=7)


@given(IDS, st.lists(st.sampled_from("abcdefg"), unique=True, min_size=1), st.integers(1, 5))
def test_mrecall_is_one_if_the_first_k_contain_the_maximum_number_of_golds(
    ranked: list[str], golds: list[str], k: int
) -> None:
    hits = len([one for one in ranked[:k] if one in golds])
    assert loft.recall_at(ranked, golds, k) == hits / len(golds)
    assert loft.mrecall_at(ranked, golds, k) == float(hits == min(k, len(golds)))


def test_a_repeated_id_counts_once() -> None:
    assert loft.recall_at(["a", "a", "b"], ["a", "b"], 2) == 1 / 2
    assert loft.mrecall_at(["a", "a"], ["a", "b"], 2) == 0


@pytest.mark.parametrize(
    ("outputs", "golds", "subspan", "exact"),
    [
        (["Spain"], ["Spain", "Taíno"], 1, 1),
        (["the kingdom of Spain"], ["Spain"], 1, 0),
        (["Spain"], ["the kingdom of Spain"], 0, 0),
        # only the first answer counts
        (["France", "Spain"], ["Spain"], 0, 0),
        (["TAÍNO."], ["taíno"], 1, 1),
        # an accent is a separate character
        (["Taino"], ["Taíno"], 0, 0),
        ([unicodedata.normalize("NFC", "Taíno")], [unicodedata.normalize("NFD", "Taíno")], 1, 1),
        ([], ["Spain"], 0, 0),
        ([""], ["Spain"], 0, 0),
        (["Spain"], ["the"], 0, 0),
    ],
)
def test_answer_metrics_accept_any_gold(outputs: list[str], golds: list[str], subspan: float, exact: float) -> None:
    scored = loft.answer_metrics(outputs, golds)
    assert (scored["subspan_em"], scored["em"]) == (subspan, exact)
    assert scored["em"] <= scored["f1"] <= 1


@pytest.mark.parametrize(
    ("outputs", "golds", "subspan"),
    [
        (["Lament", "Firecrest"], ["Firecrest (novel)", "Lament for Leto"], 1),
        (["Firecrest (novel) by Victor Canning", "Lament for Leto"], ["Firecrest (novel)", "Lament for Leto"], 1),
        (["Firecrest"], ["Firecrest (novel)", "Lament for Leto"], 0),
        # one answer cannot match two golds
        (["Firecrest and Lament for Leto", "no other"], ["Firecrest", "Lament for Leto"], 0),
        # the first answer matches both golds, the second only the first: a matching exists, but not the greedy one
        (["Dune", "Dune Messiah"], ["Dune Messiah", "Dune"], 1),
        (["Dune", "Dune II", "more"], ["Dune II", "Dune"], 1),
        # what normalises to nothing would be a substring of everything
        (["the", "..."], ["Dune", "Emma"], 0),
        ([], ["Dune"], 0),
    ],
)
def test_set_metrics_require_every_gold(outputs: list[str], golds: list[str], subspan: float) -> None:
    assert loft.set_metrics(outputs, golds)["subspan_em"] == subspan


def test_the_matching_is_optimal_where_a_greedy_one_fails() -> None:
    # greedily, "ab" takes "ab c", the only match of the other gold
    assert loft.set_metrics(["ab c", "ab"], ["ab", "ab c d"])["subspan_em"] == 1


@pytest.mark.parametrize(
    ("outputs", "answers", "expected"),
    [
        ([["a"]], [["a", 1], ["b", 1]], [(["a"], ["a", "b"])]),
        ([["x"]], ["x", "y"], [(["x"], ["x", "y"])]),
        ([["a"], ["b"]], [["a", 1], ["b", 1]], [(["a"], ["a"]), (["b"], ["b"])]),
        ([["x"], ["y"]], [["x", "X"], ["y"]], [(["x"], ["x", "X"]), (["y"], ["y"])]),
        ([[7]], ["7"], [(["7"], ["7"])]),
    ],
)
def test_turns_are_paired_with_their_answers(outputs: Any, answers: Any, expected: Any) -> None:
    assert loft.turns(outputs, answers) == expected


def test_different_numbers_of_turns_raise() -> None:
    with pytest.raises(ValueError, match="2 turns of outputs and 1 of answers"):
        loft.turns([["x"], ["y"]], ["x"])


def example(folder: Path, name: str) -> list[tuple[list[str], list[str]]]:
    files = [folder / f"loft/example_{name}_{kind}.jsonl" for kind in ("preds", "queries")]
    predictions, queries = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files
    )
    golds = {query["qid"]: query["answers"] for query in queries}
    return [turn for line in predictions for turn in loft.turns(line["model_outputs"], golds[line["qid"]])]


@pytest.mark.parametrize(
    ("name", "scorer", "expected"),
    [
        # counted by hand in the ten predictions: all ids right; one answer wrong; two hits, of 3 and 3 golds,
        # one of them first; one query of ten with all its golds
        ("retrieval_nq", "loft_retrieval", {"recall_1": 10, "recall_5": 10, "mrecall_1": 10, "mrecall_5": 10}),
        ("retrieval_quest", "loft_retrieval", {"recall_1": 1 / 3, "recall_5": 2 / 3, "mrecall_1": 1, "mrecall_5": 0}),
        ("rag_nq", "loft_rag", {"subspan_em": 9, "em": 9}),
        ("rag_quest", "loft_rag_multi", {"subspan_em": 1, "em": 1, "coverage": 1}),
    ],
)
def test_scores_of_the_example_predictions(
    name: str, scorer: str, expected: dict[str, float], data_folder: Path
) -> None:
    scored = [loft.SCORERS[scorer](*turn) for turn in example(data_folder, name)]
    assert len(scored) == 10
    sums = {metric: sum(score[metric] for score in scored) for metric in expected}
    assert sums == pytest.approx(expected)
