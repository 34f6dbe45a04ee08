"""Training rows from neighbourhoods of real tables: near rows together, and no held-out rows."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from lceval.core.errors import UserError
from lceval.tasks import catalogue, prompts
from lceval.tasks.tabular import scoring, tables
from lceval.training import tabular
from lceval.training.tabular import Neighbourhoods

TABLES = ("iris", "wine", "cancer", "diabetes")
SMALL = {"context_rows": 16, "queries": 4, "sets": 12}


def numbers(pids: list[str]) -> list[int]:
    return [int(pid.rpartition("-")[2]) for pid in pids]


def sets(rows: list[Any]) -> dict[str, tuple[list[int], list[int]]]:
    """The table rows and the queries of each context."""
    contexts: dict[str, tuple[list[int], list[int]]] = {}
    for row in rows:
        _, queries = contexts.setdefault(row["cluster"], (numbers([d["pid"] for d in row["docs"]]), []))
        queries += numbers([row["id"]])
    return contexts


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("retriever", ["knn", "random"])
@pytest.mark.parametrize("data_seed", [1234, 7])
def test_rows_are_training_rows_and_no_query_is_in_its_context(name: str, retriever: str, data_seed: int) -> None:
    rows = tabular.rows(Neighbourhoods(datasets=(name,), retriever=retriever, data_seed=data_seed, **SMALL))
    table = tables.load(catalogue.datasets()[name].options, data_seed)
    contexts = sets(rows)
    assert len(contexts) == 12
    for context, queries in contexts.values():
        assert len(context) == 16
        assert len(queries) == len(set(queries)) == 4
        assert not set(context) & set(queries)
        assert set(context + queries) <= set(table.training)
        assert not set(context + queries) & set(table.held_out)


@pytest.mark.parametrize("name", TABLES)
def test_a_local_set_is_a_row_and_its_nearest_by_scikit_learn(name: str) -> None:
    rows = tabular.rows(Neighbourhoods(datasets=(name,), **SMALL))
    table = tables.load(catalogue.datasets()[name].options, 1234)
    training = list(table.training)
    scaled = StandardScaler().fit(table.features[training]).transform(table.features)
    reference = NearestNeighbors(n_neighbors=20, algorithm="brute").fit(scaled[training])
    for context, queries in sets(rows).values():
        local = sorted(context + queries)
        # Some row of the set is its center: the distances to the set are those to its 20 nearest neighbours.
        distances, _ = reference.kneighbors(scaled[local])
        own = [np.sort(np.linalg.norm(scaled[local] - scaled[center], axis=1)) for center in local]
        centers = [c for c, d, o in zip(local, distances, own, strict=True) if np.allclose(d, o, rtol=1e-4, atol=1e-4)]
        assert centers
        context_distances = [np.linalg.norm(scaled[context] - scaled[center], axis=1) for center in centers]
        assert any((np.diff(d) <= 1e-5).all() for d in context_distances), "the nearest row is last"


@pytest.mark.parametrize("name", ["iris", "wine", "cancer"])
def test_a_local_context_shares_more_labels_with_its_queries_than_a_random_one(name: str) -> None:
    shares = {}
    for retriever in ("knn", "random"):
        rows = tabular.rows(Neighbourhoods(datasets=(name,), retriever=retriever, **{**SMALL, "sets": 40}))
        same_label = [fmean(d["text"].endswith(tables.ARROW + r["answers"][0]) for d in r["docs"]) for r in rows]
        shares[retriever] = fmean(same_label)
    assert shares["knn"] > shares["random"] + 0.2


@pytest.mark.parametrize("name", TABLES)
def test_the_prompt_is_that_of_the_task_and_the_target_has_a_full_score(name: str) -> None:
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


def test_queries_share_their_context_and_are_grouped_by_it() -> None:
    rows = tabular.rows(Neighbourhoods(datasets=TABLES, **SMALL))
    contexts = defaultdict(set)
    for row in rows:
        contexts[row["cluster"]].add(row["context"])
    assert all(len(texts) == 1 for texts in contexts.values())
    assert len(contexts) == 4 * 12
    clusters = [row["cluster"] for row in rows]
    assert all(len(set(clusters[at : at + 4])) == 1 for at in range(0, len(clusters), 4))
    assert len({row["id"] for row in rows}) == len(rows)


def test_every_row_is_drawn_once_before_any_is_drawn_twice() -> None:
    table = tables.load(catalogue.datasets()["iris"].options, 1234)
    rows = tabular.rows(Neighbourhoods(datasets=("iris",), context_rows=1, queries=1, sets=len(table.training)))
    covered = {number for context, queries in sets(rows).values() for number in context + queries}
    assert covered == set(table.training)


def test_the_sets_depend_on_the_seed() -> None:
    first, repeated, other = (tabular.rows(Neighbourhoods(seed=seed, **SMALL)) for seed in (1, 1, 2))
    assert first == repeated
    assert sets(first).values() != sets(other).values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"datasets": ("nqopen",)},
            "'nqopen' is not a table of the tabular suite: expected one of cancer, diabetes, iris, wine",
        ),
        ({"datasets": ("iris",), "context_rows": 90}, "iris has 90 training rows, fewer than context_rows=90"),
    ],
)
def test_an_impossible_specification_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tabular.rows(Neighbourhoods(**changes))
