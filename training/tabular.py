"""Training rows from neighbourhoods of a table (LoCalPFN, Thomas et al. 2024, arXiv 2406.05207).

A model evaluated with a query's nearest neighbours in context should be tuned on such contexts. A neighbourhood per
query would need a context per query. Instead, a local set is drawn: a random training row with its k nearest rows. It
is split at random into a context and the queries that share it, so queries are about as near to the context as its rows
are to each other. `random` draws k random rows instead, as the control.

All rows are training rows of the suite's split for `data_seed`; the tasks' queries are held out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, Field

from lceval.core.errors import UserError
from lceval.tasks import catalogue, prompts
from lceval.tasks.request import Request
from lceval.tasks.rows import DEFAULT_SEED, Document
from lceval.tasks.tabular import tables
from lceval.training.data import TrainingRow

SUITE, MODE = "tabular", "ao"


class Neighbourhoods(BaseModel, extra="forbid", frozen=True):
    """Specification of the sets.

    Attributes:
        datasets: datasets of the tabular suite.
        retriever: `knn` for local sets, `random` for sets of random training rows.
        context_rows: table rows per context.
        queries: queries per context.
        sets: sets per dataset.
        data_seed: seed of the tables' split, the same as in the evaluation.
        seed: seed of the sets.
    """

    datasets: tuple[str, ...] = Field(default=("cancer",), min_length=1)
    retriever: Literal["knn", "random"] = "knn"
    context_rows: int = Field(default=64, gt=0)
    queries: int = Field(default=8, gt=0)
    sets: int = Field(default=64, gt=0)
    data_seed: int = DEFAULT_SEED
    seed: int = 0


def rows(config: Neighbourhoods) -> list[TrainingRow]:
    """The rows of all sets, grouped by context.

    Raises:
        UserError: not a table of the suite, or a set larger than a table's training split.
    """
    return [row for dataset in config.datasets for row in _of_table(dataset, config)]


def _of_table(name: str, config: Neighbourhoods) -> Iterator[TrainingRow]:
    known = sorted(dataset.dataset for dataset in catalogue.datasets().values() if dataset.suite == SUITE)
    if name not in known:
        raise UserError(f"{name!r} is not a table of the tabular suite: expected one of {', '.join(known)}")
    dataset = catalogue.datasets()[name]
    table = tables.load(dataset.options, config.data_seed)
    size = config.context_rows + config.queries
    if size > len(table.training):
        raise UserError(
            f"{name} has {len(table.training)} training rows, fewer than context_rows={config.context_rows} plus "
            f"queries={config.queries}: reduce them"
        )
    output_format = dataset.modes[MODE]
    scored: dict[str, Any] = {"classes": list(table.classes)} if table.classes else {}
    request = Request(f"lc_{name}_{MODE}", dataset, output_format, None, None, config.data_seed)
    rng = random.Random(f"{name} {config.data_seed} {config.retriever} {config.seed}")
    for place, local in enumerate(_sets(table, size, config, rng)):
        queries = set(rng.sample(local, config.queries))
        # The nearest row is last, as in the suite's contexts; here, nearest to the row that was drawn.
        context_rows = [number for number in reversed(local) if number not in queries]
        docs = [Document(pid=f"{name}-{number}", title="", text=table.line(number)) for number in context_rows]
        cluster = f"{name}-{config.retriever}-{config.data_seed}-{config.seed}-{place}"
        for number in rng.sample(sorted(queries), len(queries)):
            row = request.row(
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
            yield TrainingRow(
                **row, dataset=name, output_format=output_format, data_seed=config.data_seed, target=target
            )


def _sets(table: tables.DataTable, size: int, config: Neighbourhoods, rng: random.Random) -> Iterator[list[int]]:
    """Sets of training rows; a local set is the drawn row and its neighbours, nearest first."""
    if config.retriever == "random":
        for _ in range(config.sets):
            yield rng.sample(table.training, size)
        return
    # Every row is drawn once before any is drawn twice.
    rounds, rest = divmod(config.sets, len(table.training))
    drawn = [number for _ in range(rounds) for number in rng.sample(table.training, len(table.training))]
    drawn += rng.sample(table.training, rest)
    order = tables.nearest(replace(table, held_out=tuple(dict.fromkeys(drawn))))
    for number in drawn:
        yield order[number][:size]
