"""Rows of the tabular suite: a held-out row of a table is asked for, other rows of the table are its examples.

The tables ship with scikit-learn. A line of the context is a training row, `feature: value; … -> target`; the question
is a held-out row in the same form. Which rows are shown is the run's choice, `retriever=`: `knn` takes the nearest
training rows by Euclidean distance on standardised features and shows the nearest last (after LoCalPFN, Thomas et al.
2024, which fine-tunes on such neighbourhoods); `random` takes any, drawn anew for every question. As many are shown as
fit the length. A context grows by whole rows, so a table has only lengths of which 2% are more than a row of it.
"""

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.compose import Contract
from lceval.tasks.rows import Document, Row

if TYPE_CHECKING:
    import numpy as np

ARROW = " -> "
"""Between the features of a row and its target."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, cut into the rows that are asked for and those that may be shown.

    Attributes:
        features: [rows, columns] float64, as scikit-learn has them.
        targets: the class's number, or the value.
        classes: names of the classes; none for regression.
        held_out: numbers of the rows that are asked for.
        training: numbers of the others.
    """

    name: str
    columns: tuple[str, ...]
    features: "np.ndarray[Any, np.dtype[np.float64]]"
    targets: "np.ndarray[Any, np.dtype[np.float64]]"
    classes: tuple[str, ...]
    digits: int
    held_out: tuple[int, ...]
    training: tuple[int, ...]

    @property
    def identity(self) -> str:
        """The table by its content: it comes with whatever scikit-learn is installed."""
        digest = hashlib.sha256(self.features.tobytes() + self.targets.tobytes())
        digest.update("\n".join(self.columns + self.classes).encode())
        return f"scikit-learn {self.name} sha256:{digest.hexdigest()[:16]}"

    def said(self, number: int) -> str:
        """The features of a row."""
        values = (_rounded(value, self.digits) for value in self.features[number].tolist())
        return "; ".join(f"{column}: {value}" for column, value in zip(self.columns, values, strict=True))

    def target(self, number: int) -> str:
        """The target of a row, as the context and the answer have it."""
        value = self.targets[number].item()
        return self.classes[int(value)] if self.classes else f"{value:g}"

    def line(self, number: int) -> str:
        """A row as an example."""
        return f"{self.said(number)}{ARROW}{self.target(number)}"

    def question(self, number: int) -> str:
        """A row without its target; in its place stand the classes."""
        *others, last = self.classes or ("",)
        options = f"{', '.join(others)} or {last}" if others else last
        return f"{self.said(number)}{ARROW}{options}?"


def _rounded(value: float, digits: int) -> str:
    """A value with so many significant digits, never in scientific notation."""
    return f"{float(f'{value:.{digits}g}'):f}".rstrip("0").rstrip(".")


def rows(request: Request) -> Plan:
    """The held-out rows of the dataset's table, each with the examples that the run's retriever chooses."""
    retriever = _retriever(request)
    table = load(request.dataset.options, request.seed)
    inputs = {"source": table.identity, "retriever": retriever}
    return Plan(inputs, lambda: _rows(request, table, retriever))


def _retriever(request: Request) -> str:
    allowed, metadata = request.dataset.retrievers, request.metadata
    if "retriever" not in metadata:
        return allowed[0]
    if metadata["retriever"] not in allowed:
        raise UserError(
            f"{request.task} has no retriever={metadata['retriever']!r}: it has {' and '.join(allowed)}, which choose "
            "the rows that are shown."
        )
    if (kind := metadata.get("context", "full")) != "full":
        raise UserError(f"{request.task}: retriever= goes with context=full; here context={kind}.")
    return str(metadata["retriever"])


def load(options: Mapping[str, Any], seed: int) -> Table:
    """The table that a dataset's options name, split by the seed; classes keep their shares in both parts."""
    import numpy as np
    from sklearn import datasets  # heavy
    from sklearn.model_selection import train_test_split

    name = options["table"]
    more = {"scaled": False} if name == "diabetes" else {}  # scikit-learn scales this one unless told not to
    bunch = getattr(datasets, f"load_{name}")(**more)
    classes = tuple(_plain(str(of)) for of in bunch.get("target_names", ()))
    targets = np.ascontiguousarray(bunch.target, dtype=np.float64)
    training, held_out = train_test_split(
        np.arange(len(targets)),
        test_size=options["held_out"],
        stratify=targets if classes else None,
        # any whole number is a seed of ours; scikit-learn takes 32 bits
        random_state=random.Random(f"{name} {seed}").randrange(2**32),
    )
    return Table(
        name=name,
        columns=tuple(_plain(str(of)) for of in bunch.feature_names[: options["columns"]]),
        features=np.ascontiguousarray(bunch.data[:, : options["columns"]], dtype=np.float64),
        targets=targets,
        classes=classes,
        digits=options["digits"],
        held_out=tuple(held_out.tolist()),
        training=tuple(sorted(training.tolist())),
    )


def _plain(name: str) -> str:
    """A name as a person would write it: no underscores, no unit in brackets."""
    return re.sub(r" \(.*\)", "", name).replace("_", " ")


def nearest(table: Table) -> dict[int, list[int]]:
    """By held-out row: all training rows, the nearest first; of equally near ones the earlier first."""
    import faiss
    import numpy as np

    shown = table.features[list(table.training)]
    spread = shown.std(axis=0)
    spread[spread == 0] = 1.0  # a constant column tells no row from another
    scaled = ((table.features - shown.mean(axis=0)) / spread).astype(np.float32)
    index = faiss.IndexFlatL2(scaled.shape[1])
    index.add(scaled[list(table.training)])
    found = {}
    for number in table.held_out:
        # One at a time: for a batch faiss multiplies matrices, and rows that are equal come out at unequal distances.
        distances, places = index.search(scaled[number : number + 1], len(table.training))
        ranked = sorted(zip(distances[0].tolist(), places[0].tolist(), strict=True))
        found[number] = [table.training[place] for _, place in ranked]
    return found


def drawn(table: Table, seed: int) -> dict[int, list[int]]:
    """By held-out row: all training rows in an order of its own."""
    return {
        number: random.Random(f"{table.name} {seed} {number}").sample(table.training, len(table.training))
        for number in table.held_out
    }


def _rows(request: Request, table: Table, retriever: str) -> list[Row]:
    orders = nearest(table) if retriever == "knn" else drawn(table, request.seed)
    meter, limit = request.fitted
    lines = {number: table.line(number) for number in table.training}
    costs = dict(zip(lines, meter.pieces([f"{line}\n" for line in lines.values()]), strict=True))
    more = _scale(table)
    made = []
    for number, order in orders.items():
        question = table.question(number)
        length, docs = _fitted(request, question, order, lines, costs)
        made.append(
            request.row(
                id=f"{request.dataset.dataset}-{number}",
                question=question,
                answers=[table.target(number)],
                docs=docs,
                gold_pids=[],
                cluster=f"{request.dataset.dataset}-{number}-{limit // 1024}k",
                length_tokens=length,
                source=table.identity,
                **more(number),
            )
        )
    return made


def _scale(table: Table) -> Callable[[int], dict[str, Any]]:
    """What the scorer wants to know of a row besides its target."""
    if table.classes:
        return lambda number: {"classes": list(table.classes)}
    known = table.targets[list(table.training)].tolist()
    middle = median(known)
    deviation = fmean(abs(value - middle) for value in known)

    def of(number: int) -> dict[str, Any]:
        target = table.targets[number].item()
        return {"target": target, "deviation": deviation, "farthest": max(abs(value - target) for value in known)}

    return of


def _fitted(
    request: Request, question: str, order: Sequence[int], lines: dict[int, str], costs: dict[int, int]
) -> tuple[int, list[Document]]:
    """The first rows of an order, as many as fit; the first of them is shown last."""
    _, limit = request.fitted
    name = request.dataset.dataset

    def docs(count: int) -> list[Document]:
        return [Document(pid=f"{name}-{number}", title="", text=lines[number]) for number in reversed(order[:count])]

    @cache
    def total(count: int) -> int:
        return request.totals(docs(count), [question])[0]

    # Costs of lines add up to the prompt's tokens but for a few, so the estimate is nearly always the answer.
    spent = accumulate(costs[number] for number in order)
    count = sum(cost <= limit - total(0) for cost in spent)
    while count and total(count) > limit:
        count -= 1
    while count < len(order) and total(count + 1) <= limit:
        count += 1
    if not Contract.promised(limit).holds([total(count)]):
        if count == len(order):
            raise UserError(
                f"{request.task} needs {limit} tokens and all {count} training rows of {name} come to {total(count)} "
                "with this tokenizer: choose a shorter task."
            )
        raise UserError(
            f"{request.task} cannot come within 2% of {limit} tokens of this tokenizer with whole rows of "
            f"{name}: choose a longer task."
        )
    return total(count), docs(count)
