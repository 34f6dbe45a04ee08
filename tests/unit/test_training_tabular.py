"""Training rows from neighbourhoods: real tables, near rows together, and nothing that the tasks ask for."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from lceval.errors import UserError
from lceval.tasks import catalogue, prompts
from lceval.tasks.tabular import scoring, tables
from lceval.training import tabular
from lceval.training.tabular import Neighbourhoods

TABLES = ("iris", "wine", "cancer", "diabetes")
SMALL = {"context_rows": 16, "queries": 4, "sets": 12}


def numbers(pids: list[str]) -> list[int]:
    return [int(pid.rpartition("-")[2]) for pid in pids]


def sets(rows: list[Any]) -> dict[str, tuple[list[int], list[int]]]:
    """By context: its rows, and those that are asked for."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for row in rows:
        _, asked = found.setdefault(row["cluster"], (numbers([d["pid"] for d in row["docs"]]), []))
        asked += numbers([row["id"]])
    return found


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("retriever", ["knn", "random"])
@pytest.mark.parametrize("data_seed", [1234, 7])
def test_rows_are_training_rows_and_no_query_is_in_its_context(name: str, retriever: str, data_seed: int) -> None:
    made = tabular.rows(Neighbourhoods(datasets=(name,), retriever=retriever, data_seed=data_seed, **SMALL))
    table = tables.load(catalogue.datasets()[name].options, data_seed)
    found = sets(made)
    assert len(found) == 12
    for shown, asked in found.values():
        assert len(shown) == 16
        assert len(asked) == len(set(asked)) == 4
        assert not set(shown) & set(asked)
        assert set(shown + asked) <= set(table.training)
        assert not set(shown + asked) & set(table.held_out)


@pytest.mark.parametrize("name", TABLES)
def test_a_local_set_is_a_row_and_its_nearest_by_scikit_learn(name: str) -> None:
    made = tabular.rows(Neighbourhoods(datasets=(name,), **SMALL))
    table = tables.load(catalogue.datasets()[name].options, 1234)
    training = list(table.training)
    scaled = StandardScaler().fit(table.features[training]).transform(table.features)
    reference = NearestNeighbors(n_neighbors=20, algorithm="brute").fit(scaled[training])
    for shown, asked in sets(made).values():
        every = sorted(shown + asked)
        # Some row of the set is its middle: the set is as near to it as its 20 nearest are.
        distances, _ = reference.kneighbors(scaled[every])
        own = [np.sort(np.linalg.norm(scaled[every] - scaled[middle], axis=1)) for middle in every]
        middles = [m for m, d, o in zip(every, distances, own, strict=True) if np.allclose(d, o, rtol=1e-4, atol=1e-4)]
        assert middles
        far = [np.linalg.norm(scaled[shown] - scaled[middle], axis=1) for middle in middles]
        assert any((np.diff(d) <= 1e-5).all() for d in far), "the nearest is shown last"


@pytest.mark.parametrize("name", ["iris", "wine", "cancer"])
def test_a_local_context_says_more_of_its_queries_than_a_random_one(name: str) -> None:
    shares = {}
    for retriever in ("knn", "random"):
        made = tabular.rows(Neighbourhoods(datasets=(name,), retriever=retriever, **{**SMALL, "sets": 40}))
        of = [fmean(d["text"].endswith(tables.ARROW + r["answers"][0]) for d in r["docs"]) for r in made]
        shares[retriever] = fmean(of)
    assert shares["knn"] > shares["random"] + 0.2


@pytest.mark.parametrize("name", TABLES)
def test_the_prompt_is_the_tasks_and_the_target_is_a_full_score(name: str) -> None:
    row = tabular.rows(Neighbourhoods(datasets=(name,), **{**SMALL, "sets": 1}))[0]
    dataset = catalogue.datasets()[name]
    output_format = dataset.modes["ao"]
    assert row["instruction"] == prompts.instruction("examples", output_format)
    table = tables.load(dataset.options, 1234)
    (number,) = numbers([row["id"]])
    assert row["ask"] == prompts.ask(output_format, table.question(number), ())
    assert row["context"].splitlines() == [table.line(int(d["pid"].rpartition("-")[2])) for d in row["docs"]]
    assert row["target"] == f"Answer: {table.target(number)}"
    if table.classes:
        assert scoring.label_results(row, [row["target"]]) | {"kv": None} == {"acc": 1.0, "parse_rate": 1.0, "kv": None}
    else:
        doc = {**row, "target": float(table.targets[number]), "deviation": 1.0, "farthest": 1.0}
        assert scoring.target_results(doc, [row["target"]])["abs_error"] == 0


def test_queries_share_their_context_and_stand_together() -> None:
    made = tabular.rows(Neighbourhoods(datasets=TABLES, **SMALL))
    contexts = defaultdict(set)
    for row in made:
        contexts[row["cluster"]].add(row["context"])
    assert all(len(of) == 1 for of in contexts.values())
    assert len(contexts) == 4 * 12
    clusters = [row["cluster"] for row in made]
    assert all(len(set(clusters[at : at + 4])) == 1 for at in range(0, len(clusters), 4))
    assert len({row["id"] for row in made}) == len(made)


def test_every_row_is_the_middle_of_a_set_before_any_is_of_two() -> None:
    table = tables.load(catalogue.datasets()["iris"].options, 1234)
    rows = len(table.training)
    made = tabular.rows(Neighbourhoods(datasets=("iris",), context_rows=1, queries=1, sets=rows))
    seen = {number for shown, asked in sets(made).values() for number in shown + asked}
    assert seen == set(table.training)


def test_the_seed_decides_the_draws() -> None:
    first, again, other = (tabular.rows(Neighbourhoods(seed=seed, **SMALL)) for seed in (1, 1, 2))
    assert first == again
    assert sets(first).values() != sets(other).values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datasets": ("nqopen",)}, "'nqopen' is no table of the tabular suite: one of cancer, diabetes, iris, wine"),
        ({"datasets": ("iris",), "context_rows": 90}, "iris has 90 training rows, fewer than context_rows=90"),
    ],
)
def test_what_no_table_has_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tabular.rows(Neighbourhoods(**changes))
