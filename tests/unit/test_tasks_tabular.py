"""The tabular suite: selection and number of examples, questions and scoring."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, prompts, rows, tokens
from lceval.tasks.request import Request
from lceval.tasks.tabular import scoring, tables

TABLES = ["iris", "wine", "cancer", "diabetes"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer(pattern: str, template: str | None = None) -> tokens.TokenMeter:
    """One token for each match of a pattern and each segment between matches."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    fast.chat_template = template
    return tokens.TokenMeter(fast)


WORDS = r" ?[A-Za-z]+|[0-9]|\s|[^\sA-Za-z0-9]"  # tokens: a digit, a word with its space, a mark
METERS = {
    "words": tokenizer(WORDS),
    "words in a template": tokenizer(WORDS, CHAT_TEMPLATE),
    "lines": tokenizer(r"\n"),
    "characters": tokenizer(r"[\s\S]"),
}


def request_for(task: str, meter: str = "words", seed: int = 1234, **metadata: Any) -> build.Request:
    known = catalogue.find(task)
    assert known.length_k is not None
    limit = known.length_k * 1024
    return Request(task, known.dataset, known.output_format, METERS[meter], limit, seed, metadata)


def built(task: str, meter: str = "words", seed: int = 1234, **metadata: Any) -> list[Any]:
    return tables.rows(request_for(task, meter, seed, **metadata)).build()


def table_of(name: str, seed: int = 1234) -> tables.DataTable:
    return tables.load(catalogue.datasets()[name].options, seed)


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Selection of rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_the_nearest_rows_are_those_of_scikit_learn(name: str) -> None:
    table = table_of(name)
    training, held_out = list(table.training), list(table.held_out)
    scaler = StandardScaler().fit(table.features[training])
    scaled = scaler.transform(table.features)
    reference = NearestNeighbors(n_neighbors=len(training), algorithm="brute").fit(scaled[training])
    distances, _ = reference.kneighbors(scaled[held_out])
    every = tables.nearest(table)
    assert list(every) == held_out
    for number, expected in zip(held_out, distances, strict=True):
        assert sorted(every[number]) == training
        distances = np.linalg.norm(scaled[every[number]] - scaled[number], axis=1)
        assert np.allclose(distances, expected, rtol=1e-4, atol=1e-4)


def test_ties_keep_the_order_of_the_table() -> None:
    features = np.array([[0.0, 5.0], [1.0, 5.0], [1.0, 5.0], [-1.0, 5.0], [1.0, 5.0]])
    table = tables.DataTable(
        name="ties",
        columns=("a", "constant"),
        features=features,
        targets=np.zeros(5),
        classes=("x",),
        digits=3,
        held_out=(0,),
        training=(1, 2, 3, 4),
    )
    assert tables.nearest(table) == {0: [1, 2, 3, 4]}


@pytest.mark.parametrize("name", TABLES)
def test_held_out_rows_are_no_examples_and_the_split_is_stratified(name: str) -> None:
    dataset, table = catalogue.datasets()[name], table_of(name)
    assert len(table.held_out) == dataset.options["held_out"] == int(dataset.count)
    assert sorted(table.held_out + table.training) == list(range(len(table.targets)))
    orders = [tables.nearest(table), tables.random_order(table, 1)]
    assert all(sorted(order) == list(table.training) for of in orders for order in of.values())
    if table.classes:
        targets = Counter(table.target(number) for number in table.held_out)
        every = Counter(table.target(number) for number in range(len(table.targets)))
        share = len(table.held_out) / len(table.targets)
        assert all(abs(targets[of] - share * count) <= 1 for of, count in every.items())


def test_the_nearest_example_is_last_and_random_examples_differ_between_questions() -> None:
    table = table_of("iris")
    near = built("lc_iris_ao_2k")
    order = tables.nearest(table)
    for row, number in zip(near, table.held_out, strict=True):
        examples = [document["pid"] for document in row["docs"]]
        assert examples == [f"iris-{other}" for other in reversed(order[number][: len(examples)])]
    random_rows = built("lc_iris_ao_2k", retriever="random")
    assert len({row["context"] for row in random_rows}) == len(random_rows)
    assert [(row["id"], row["question"], row["answers"]) for row in random_rows] == [
        (row["id"], row["question"], row["answers"]) for row in near
    ]
    # the nearest row has the correct class far more often than an average row
    last = [fmean(row["docs"][-1]["text"].endswith(row["answers"][0]) for row in of) for of in (near, random_rows)]
    assert last[0] > 0.8 > 0.6 > last[1]


@pytest.mark.parametrize("retriever", ["knn", "random"])
def test_the_seed_determines_the_rows(retriever: str) -> None:
    first, again, other = (json.dumps(built("lc_iris_ao_2k", seed=seed, retriever=retriever)) for seed in (-1, -1, 2))
    assert first == again
    assert first != other


def test_a_longer_task_has_the_same_questions_and_more_examples() -> None:
    short, long = (built(f"lc_diabetes_ao_{k}k") for k in (4, 8))
    for less, more in zip(short, long, strict=True):
        assert (less["id"], less["question"]) == (more["id"], more["question"])
        count = len(less["docs"])
        assert less["docs"] == more["docs"][-count:]
        assert len(more["docs"]) > count


def test_the_retriever_is_part_of_the_cache_key() -> None:
    inputs = [tables.rows(request_for("lc_iris_ao_2k", retriever=of)).inputs for of in ("knn", "random")]
    assert inputs[0] != inputs[1]
    assert inputs[0] == tables.rows(request_for("lc_iris_ao_2k")).inputs
    assert inputs[0] != tables.rows(request_for("lc_wine_ao_8k")).inputs


# Number of examples, questions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "meter", "retriever"),
    [
        *product(["lc_iris_ao_2k"], ["words", "words in a template"], ["knn", "random"]),
        ("lc_wine_ao_8k", "words in a template", "knn"),
        ("lc_cancer_ao_8k", "words", "random"),
        ("lc_diabetes_ao_4k", "words in a template", "random"),
    ],
)
def test_every_row_meets_the_length(task: str, meter: str, retriever: str) -> None:
    request = request_for(task, meter, retriever=retriever)
    _, limit = request.meter_and_limit
    task_rows = tables.rows(request).build()
    reply = catalogue.new_tokens(request.output_format)
    assert reply > 0
    counted = METERS[meter].prompts([prompts.prompt(row) for row in task_rows])
    assert [row["length_tokens"] for row in task_rows] == [count + reply for count in counted]
    for row in task_rows:
        assert set(row) >= set(rows.Row.__required_keys__)
        assert 0.98 * limit <= row["length_tokens"] <= limit
        assert row["context"].split("\n") == [document["text"] for document in row["docs"]]
        assert row["gold_pids"] == []
    assert len({frozenset(row) for row in task_rows}) == 1
    assert len({row["id"] for row in task_rows}) == len({row["cluster"] for row in task_rows}) == len(task_rows)


def test_a_question_has_the_format_of_the_examples_and_lists_the_classes() -> None:
    row = built("lc_iris_ao_2k")[0]
    table = table_of("iris")
    number = int(row["id"].removeprefix("iris-"))
    names = ("sepal length", "sepal width", "petal length", "petal width")
    features = "; ".join(f"{name}: {value:g}" for name, value in zip(names, table.features[number], strict=True))
    assert row["question"] == f"{features} -> setosa, versicolor or virginica?"
    assert row["answers"] == [("setosa", "versicolor", "virginica")[int(table.targets[number])]]
    assert row["classes"] == ["setosa", "versicolor", "virginica"]
    assert row["source"] == table.identity
    assert row["licence"] == "CC BY 4.0"
    assert prompts.prompt(row) == (
        "Below are rows of a table, one a line, each with its target. Predict the target of the last row. "
        'Give only the target, on one line that begins with "Answer:".\n\n'
        f"{row['context']}\n\nQuestion: {row['question']}"
    )
    first = row["docs"][0]
    assert first["text"] == table.line(int(first["pid"].removeprefix("iris-")))


def test_a_regression_row_has_the_fields_of_its_scorer() -> None:
    table = table_of("diabetes")
    known = [table.targets[number] for number in table.training]
    row = built("lc_diabetes_ao_4k")[0]
    assert row["question"].endswith(" -> ?")
    assert row["answers"] == [f"{row['target']:g}"]
    assert row["deviation"] == pytest.approx(np.mean(np.abs(np.array(known) - np.median(known))))
    assert row["farthest"] == max(abs(value - row["target"]) for value in known)


@pytest.mark.parametrize(("name", "columns"), [("iris", 4), ("wine", 13), ("cancer", 10), ("diabetes", 10)])
def test_a_line_has_every_column_rounded_without_scientific_notation(name: str, columns: int) -> None:
    table = table_of(name)
    digits = catalogue.datasets()[name].options["digits"]
    for number in range(len(table.targets)):
        features, target = table.line(number).split(" -> ")
        cells = dict(cell.split(": ") for cell in features.split("; "))
        assert len(cells) == columns
        assert target == table.target(number)
        for cell, value in zip(cells.values(), table.features[number], strict=True):
            assert "e" not in cell
            assert len(cell.replace(".", "").lstrip("0")) <= digits
            assert float(cell) == pytest.approx(value, rel=0.5 * 10 ** (1 - digits) + 1e-9)


@pytest.mark.parametrize(
    ("meter", "message"),
    [
        ("lines", r"lc_iris_ao_2k requires 2048 tokens, and all 90 training rows of iris are \d+ .* a shorter task"),
        ("characters", r"lc_iris_ao_2k cannot reach 2048 tokens .* within 2% .* a longer task"),
    ],
)
def test_a_length_that_whole_rows_cannot_reach_raises(meter: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        built("lc_iris_ao_2k", meter)
    one_line(caught)


# Settings of a run --------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folder of the tokenizer."""
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    METERS["words"]._tokenizer.save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def test_zero_shot_has_no_examples_and_lists_the_classes(words: str) -> None:
    run = {"pretrained": words}
    full = build.rows_of(catalogue.find("lc_iris_ao_2k"), run)
    none = build.rows_of(catalogue.find("lc_iris_ao_2k"), {**run, "context": "none"})
    assert [row["question"] for row in none] == [row["question"] for row in full]
    for row in none:
        assert (row["docs"], row["context"]) == ([], "")
        assert "rows of a table" not in prompts.prompt(row)
        assert prompts.prompt(row).endswith("-> setosa, versicolor or virginica?")


@pytest.mark.parametrize(
    ("task", "metadata", "message"),
    [
        (
            "lc_iris_ao_2k",
            {"retriever": "bm25"},
            "lc_iris_ao_2k does not support retriever='bm25' .* expected one of knn, random",
        ),
        ("lc_iris_ao_2k", {"retriever": ["knn"]}, r"not support retriever=\['knn'\] .* expected one of knn, random"),
        (
            "lc_iris_ao_2k",
            {"context": "none", "retriever": "knn"},
            "retriever= requires context=full, got context=none",
        ),
        ("lc_iris_ao_2k", {"context": "rag"}, "lc_iris_ao_2k does not support context=rag: expected one of full, none"),
        ("lc_diabetes_ao_4k", {"context": "none"}, "lc_diabetes_ao_4k does not support context=none"),
        ("lc_iris_ao_2k", {"retriever": "knn", "chunk": 100}, "chunk= requires context=rag"),
    ],
)
def test_an_unsupported_setting_raises(words: str, task: str, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build.rows_of(catalogue.find(task), {"pretrained": words, **metadata})
    one_line(caught)


# Scores -------------------------------------------------------------------------------------------

IRIS = {"answers": ["setosa"], "classes": ["setosa", "versicolor", "virginica"]}
DISEASE = {"answers": ["100"], "target": 100.0, "deviation": 50.0, "farthest": 240.0}


class Reply(str):
    """A reply with telemetry."""

    meta: dict[str, Any]


@pytest.mark.parametrize(
    ("output", "acc", "parsed"),
    [
        ("Answer: setosa", 1, 1),
        ("\n\nAnswer: **Setosa**.\n", 1, 1),
        ("<think>virginica?</think>Answer: setosa", 1, 1),
        ("Answer: virginica", 0, 1),
        ("Answer: setosa or virginica", 0, 0),
        ("Answer: rose", 0, 0),
        ("Answer:", 0, 0),
        ("", 0, 0),
        # base models that continue the table
        (" setosa\nsepal length: 5; petal width: 2 -> virginica", 1, 0),
        ("\nsepal length: 5.1; petal width: 0.2 -> setosa\n", 1, 0),
        ("Answer: sepal length: 5.1; petal width: 0.2 -> setosa", 1, 0),
    ],
)
def test_a_class_is_scored_by_its_name(output: str, acc: int, parsed: int) -> None:
    assert scoring.label_results(IRIS, [output]) == {"acc": acc, "parse_rate": parsed}


@pytest.mark.parametrize(
    ("output", "error", "parsed"),
    [
        ("Answer: 100", 0, 1),
        ("Answer: 150", 50, 1),
        ("Answer: about 87.5.", 12.5, 1),
        ("Answer: 1,000", 240, 1),
        ("Answer: -20", 120, 1),
        ("Answer: " + "9" * 400, 240, 1),
        ("Answer: unknown", 240, 0),
        ("", 240, 0),
        ("age: 59; bmi: 32.1 -> 101\nage: 20; bmi: 30 -> 7", 1, 0),
        (" 99\n", 1, 0),
    ],
)
def test_a_value_is_scored_by_its_error(output: str, error: float, parsed: int) -> None:
    expected = {"abs_error": error, "skill": 1 - error / 50, "parse_rate": parsed}
    assert scoring.target_results(DISEASE, [output]) == expected


@given(st.text())
def test_no_output_is_better_than_the_true_value_or_worse_than_an_empty_output(output: str) -> None:
    metrics, empty = (scoring.target_results(DISEASE, [text]) for text in (output, ""))
    assert empty["skill"] <= metrics["skill"] <= 1
    assert empty["abs_error"] >= metrics["abs_error"] >= 0
    assert math.isfinite(metrics["skill"])


def test_the_median_of_the_training_targets_has_zero_skill() -> None:
    table = table_of("diabetes")
    known = [table.targets[number].item() for number in table.training]
    scale = tables._scorer_fields(table)
    docs = [{**scale(number), "answers": [table.target(number)]} for number in table.training]
    skills = [scoring.target_results(doc, [f"Answer: {np.median(known)}"])["skill"] for doc in docs]
    assert fmean(skills) == pytest.approx(0, abs=1e-9)


def test_a_failed_sample_has_the_worst_score() -> None:
    failed = Reply("")
    failed.meta = {"kv_bytes": 0, "kv_bytes_full": 0, "kv": {"status": "error"}}
    metrics = scoring.target_results(DISEASE, [failed])
    assert (metrics["abs_error"], metrics["skill"], metrics["parse_rate"]) == (240, 1 - 240 / 50, 0)
    assert metrics["kv"] == {"status": "error"}
    assert scoring.label_results(IRIS, [failed])["acc"] == 0


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("lc_iris_ao_2k", scoring.label_results(IRIS, ["Answer: setosa"])),
        ("lc_diabetes_ao_4k", scoring.target_results(DISEASE, ["Answer: 1"])),
    ],
)
def test_every_metric_is_declared_by_the_tasks_template(task: str, metrics: dict[str, float]) -> None:
    output_format = catalogue.output_format_config(catalogue.find(task).output_format)
    assert list(metrics) == [metric["metric"] for metric in output_format["metric_list"]]
    assert output_format["metadata"]["headline"] in metrics
