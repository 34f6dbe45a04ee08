"""Target replies: the tasks' parsing and scoring give them full scores, in every output format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, lm_eval_config, prompts, scoring, tokens
from lceval.tasks.parsing import quotes
from lceval.training import formats

SCORERS: dict[str, Callable[..., dict[str, Any]]] = {
    output_format: lm_eval_config.task_config(catalogue.find(f"lc_squad_{output_format}_2k"))["process_results"]
    for output_format in ("ao", "id", "idc", "idq", "rj", "docid")
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path_factory.getbasetemp() / "splits-cache"))


@pytest.mark.parametrize("dataset", ["nqopen", "hotpotpool", "musique", "squad"])
def test_targets_of_real_rows_have_full_scores_in_every_output_format(
    dataset: str, smollm2: str, data_folder: Path
) -> None:
    task = catalogue.find(f"lc_{dataset}_ao_{1 if dataset == 'squad' else 2}k")
    meter = tokens.meter_for("t", {"pretrained": smollm2})
    rows = build.rows_of(task, {"pretrained": smollm2, "split": "train"})
    assert rows
    for row in rows[:100]:
        for output_format, score in SCORERS.items():
            target = formats.target(row, output_format, lambda text: meter.pieces([text])[0])
            metrics = score(row, [target])
            if output_format == "docid":  # no single best document among several gold ones
                metrics = {"mrecall_5": metrics["mrecall_5"], "ids_exact": metrics["ids_exact"]}
            assert {*metrics.values()} == {1.0}, (output_format, metrics, target)
            if output_format in ("idq", "rj"):
                cited = quotes(target.rpartition("\n")[0])
                assert all(meter.pieces([quote])[0] <= formats.QUOTE_TOKENS for _, quote in cited)
                assert len(cited) >= len(row["gold_pids"])
            assert target.rpartition("\n")[2].startswith(prompts.reply_prefix(output_format))


def row(texts: list[str], gold: list[int], question: str, answers: list[str]) -> Any:
    docs = [{"pid": f"p{n}", "title": "", "text": text} for n, text in enumerate(texts)]
    return {"docs": docs, "gold_pids": [f"p{n}" for n in gold], "question": question, "answers": answers}


WORDS = st.sampled_from(
    [
        "fox",
        "a",
        "1984",
        'the "quoted" word',
        "“curly” words",
        "end.",
        "document 7",
        "DOC 3",
        "it's",
        "Answer: no",
        "x\ny",
    ]
)


@given(
    texts=st.lists(st.lists(WORDS, min_size=1, max_size=40).map(" ".join), min_size=1, max_size=5),
    at=st.integers(0, 200),
    gold=st.integers(0, 31),
    question=st.lists(WORDS, min_size=1, max_size=5).map(" ".join),
)
def test_targets_parse_correctly_whatever_the_documents_contain(
    texts: list[str], at: int, gold: int, question: str
) -> None:
    golds = [n for n in range(len(texts)) if gold >> n & 1]
    if golds:
        words = texts[golds[0]].split(" ")
        texts[golds[0]] = " ".join([*words[: at % (len(words) + 1)], "Oza Ngorongoro", *words[at % (len(words) + 1) :]])
    example = row(texts, golds, question, ["the", "Oza\nNgorongoro"])
    for output_format in ("ao", "id", "idq", "rj"):
        target = formats.target(example, output_format)
        metrics = SCORERS[output_format](example, [target])
        expected = dict.fromkeys(metrics, 1.0)
        if output_format == "idq" and not golds:
            expected["quotes"] = 0.0  # no quotes
        assert metrics == expected, target


def test_a_quote_is_the_answers_sentence_or_a_part_of_it() -> None:
    text = "It rose early. In May the river Oza, which is 40 km long, burst its banks at Tam. Nobody was hurt."
    example = row(["Nothing.", text], [1], "How long is the Oza?", ["40 km"])
    assert formats.target(example, "idq") == (
        '[DOC 1] "In May the river Oza, which is 40 km long, burst its banks at Tam."\nThe answer is: 40 km'
    )
    truncated = formats.target(example, "idq", lambda text: 5 * len(text.split()))
    assert truncated == '[DOC 1] "which is 40 km long, burst"\nThe answer is: 40 km'
    other = row([text, "Oza is a town. The town of Tam lies on the Oza."], [0, 1], "Where does the town lie?", ["Tam"])
    assert '[DOC 1] "The town of Tam lies on the Oza."' in formats.target(other, "idq")


def test_the_four_steps_cite_and_quote_the_gold_document() -> None:
    example = row(["Nothing.", "The Oza is 40 km long."], [1], "How long is the Oza?", ["40 km"])
    assert formats.target(example, "rj").splitlines() == [
        'Question analysis: it asks for a length or a time: "How long is the Oza?"',
        "Document review: of the 2 documents [DOC 1] bears on it.",
        'Reasoning: [DOC 1] says: "The Oza is 40 km long." So it is 40 km.',
        "The answer is: 40 km",
    ]


@pytest.mark.parametrize("output_format", ["id", "idc", "idq", "rj"])
def test_without_a_gold_document_in_context_none_is_cited(output_format: str) -> None:
    example = row(["Nothing."], [], "Which?", ["Oza"])
    target = formats.target(example, output_format)
    assert "[DOC -1]" in target
    scores = SCORERS[output_format](example, [target])
    assert scores["ids_exact"] == scores["subem"] == 1


@pytest.mark.parametrize(("task", "metric"), [("lc_iris_ao_2k", "acc"), ("lc_diabetes_ao_4k", "skill")])
def test_targets_of_tables_have_full_scores(task: str, metric: str, smollm2: str) -> None:
    tabular = catalogue.find(task)
    score = lm_eval_config.task_config(tabular)["process_results"]
    for example in build.rows_of(tabular, {"pretrained": smollm2})[:20]:
        assert score(example, [formats.target(example, tabular.output_format)])[metric] == 1


def test_a_list_contains_all_answers() -> None:
    example = {**row([], [], "Which?", ["11", "22 33"]), "gold": 0}
    assert formats.target(example, "list") == "Answer: 11, 22 33"
    assert scoring.listed_results(example, ["Answer: 11, 22 33"])["all_found"] == 1


def test_an_output_format_without_a_target_is_an_error() -> None:
    with pytest.raises(UserError, match=r"output format 'sum': expected one of ao, "):
        formats.target(row([], [], "?", ["x"]), "sum")
