"""Training rows from neighbourhoods of a table (LoCalPFN, Thomas et al. 2024, arXiv 2406.05207).

A model that is shown a row's nearest neighbours when it is asked should be tuned on such contexts. A neighbourhood for
every query would make every context another one; instead, a local set is drawn: any training row, with its k nearest.
It is split at random into the context, which the set's queries share, and the queries, which are therefore about as
near to the context as the context's rows are to each other. `random` draws any k rows instead: the control.

Only training rows of the split that the suite's tasks have under the same `data_seed` occur; the tasks ask for others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lceval.errors import UserError
from lceval.tasks import catalogue, prompts
from lceval.tasks.build import Request
from lceval.tasks.rows import DEFAULT_SEED, Document, Row
from lceval.tasks.tabular import tables

SUITE, MODE = "tabular", "ao"


class Neighbourhoods(BaseModel):
    """Which rows to make.

    Attributes:
        datasets: of the tabular suite.
        retriever: `knn` draws local sets, `random` sets of any training rows.
        context_rows: rows of a context.
        queries: rows that are asked for on each.
        sets: of each dataset.
        data_seed: of the tables' split, as the runs have it that will measure the model.
        seed: of the draws.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    datasets: tuple[str, ...] = Field(default=("cancer",), min_length=1)
    retriever: Literal["knn", "random"] = "knn"
    context_rows: int = Field(default=64, gt=0)
    queries: int = Field(default=8, gt=0)
    sets: int = Field(default=64, gt=0)
    data_seed: int = DEFAULT_SEED
    seed: int = 0


class TabularRow(Row):
    """A task's row, and what training needs besides: `target` is the reply to be learned, in the form `form`."""

    dataset: str
    output_format: str
    data_seed: int
    target: str


def rows(config: Neighbourhoods) -> list[TabularRow]:
    """The rows of all sets, those on one context together.

    Raises:
        UserError: a dataset that is no table, or sets larger than a table's training part.
    """
    return [row for dataset in config.datasets for row in _of_table(dataset, config)]


def _of_table(name: str, config: Neighbourhoods) -> Iterator[TabularRow]:
    known = sorted(of.dataset for of in catalogue.datasets().values() if of.suite == SUITE)
    if name not in known:
        raise UserError(f"{name!r} is no table of the tabular suite: one of {', '.join(known)}")
    dataset = catalogue.datasets()[name]
    table = tables.load(dataset.options, config.data_seed)
    size = config.context_rows + config.queries
    if size > len(table.training):
        raise UserError(
            f"{name} has {len(table.training)} training rows, fewer than context_rows={config.context_rows} and "
            f"queries={config.queries} together: ask for fewer"
        )
    output_format = dataset.modes[MODE]
    scored: dict[str, Any] = {"classes": list(table.classes)} if table.classes else {}
    request = Request(f"lc_{name}_{MODE}", dataset, output_format, None, None, config.data_seed)
    rng = random.Random(f"{name} {config.data_seed} {config.retriever} {config.seed}")
    for place, local in enumerate(_sets(table, size, config, rng)):
        asked = set(rng.sample(local, config.queries))
        # As in the suite's contexts the nearest row is the last; near here means to the row that was drawn.
        shown = [number for number in reversed(local) if number not in asked]
        docs = [Document(pid=f"{name}-{number}", title="", text=table.line(number)) for number in shown]
        cluster = f"{name}-{config.retriever}-{config.data_seed}-{config.seed}-{place}"
        for number in rng.sample(sorted(asked), len(asked)):
            made = request.row(
                id=f"{cluster}-{number}",
                question=table.question(number),
                answers=[table.target(number)],
                docs=docs,
                gold_pids=[],
                cluster=cluster,
                source=table.identity,
                **scored,
            )
            target = f"{prompts.ANSWER_PREFIX} {table.target(number)}"
            yield TabularRow(
                **made, dataset=name, output_format=output_format, data_seed=config.data_seed, target=target
            )


def _sets(table: tables.Table, size: int, config: Neighbourhoods, rng: random.Random) -> Iterator[list[int]]:
    """Sets of training rows; a local one begins with the row that was drawn, the nearest first."""
    if config.retriever == "random":
        for _ in range(config.sets):
            yield rng.sample(table.training, size)
        return
    # Every row is the middle of one set before any is of two.
    rounds, rest = divmod(config.sets, len(table.training))
    drawn = [number for _ in range(rounds) for number in rng.sample(table.training, len(table.training))]
    drawn += rng.sample(table.training, rest)
    order = tables.nearest(replace(table, held_out=tuple(dict.fromkeys(drawn))))
    for number in drawn:
        yield order[number][:size]
