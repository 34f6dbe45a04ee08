"""Rows of the tabular suite: predict the target of a held-out row from in-context examples of its table.

The tables ship with scikit-learn. A line of the context is a training row, `feature: value; … -> target`; the question
is a held-out row in the same format. Examples are selected by `retriever=`: `knn` for the nearest training rows by
Euclidean distance on standardised features, the nearest last (after LoCalPFN, Thomas et al. 2024, which fine-tunes on
such neighbourhoods); `random` for rows drawn separately for every question. A context has as many as fit the length, as
whole rows, so a dataset only has lengths of which 2% exceed one row.
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

from lceval.core.errors import UserError
from lceval.tasks.compose import Contract
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row

if TYPE_CHECKING:
    import numpy as np

ARROW = " -> "
"""Separator between the features of a row and its target."""


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """A table, split into held-out rows (questions) and training rows (examples).

    Attributes:
        name: dataset name in scikit-learn.
        columns: feature names.
        features: [rows, columns] float64.
        targets: [rows] float64, class index or value.
        classes: class names; empty for regression.
        digits: significant digits of printed features.
        held_out: indices of the held-out rows.
        training: indices of the training rows.
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
        """Name and content hash: the table depends on the installed scikit-learn."""
        digest = hashlib.sha256(self.features.tobytes() + self.targets.tobytes())
        digest.update("\n".join(self.columns + self.classes).encode())
        return f"scikit-learn {self.name} sha256:{digest.hexdigest()[:16]}"

    def features_text(self, number: int) -> str:
        """Features of a row as text."""
        values = (_rounded(value, self.digits) for value in self.features[number].tolist())
        return "; ".join(f"{column}: {value}" for column, value in zip(self.columns, values, strict=True))

    def target(self, number: int) -> str:
        """Target of a row as text."""
        value = self.targets[number].item()
        return self.classes[int(value)] if self.classes else f"{value:g}"

    def line(self, number: int) -> str:
        """A row as an in-context example."""
        return f"{self.features_text(number)}{ARROW}{self.target(number)}"

    def question(self, number: int) -> str:
        """A row with the list of classes in place of its target."""
        *others, last = self.classes or ("",)
        options = f"{', '.join(others)} or {last}" if others else last
        return f"{self.features_text(number)}{ARROW}{options}?"


def _rounded(value: float, digits: int) -> str:
    """Format with `digits` significant digits, never in scientific notation."""
    return f"{float(f'{value:.{digits}g}'):f}".rstrip("0").rstrip(".")


def rows(request: Request) -> RowPlan:
    """Held-out rows of the dataset's table, each with the examples of the run's retriever."""
    retriever = _retriever(request)
    table = load(request.dataset.options, request.seed)
    inputs = {"source": table.identity, "retriever": retriever}
    return RowPlan(inputs, lambda: _rows(request, table, retriever))


def _retriever(request: Request) -> str:
    allowed, metadata = request.dataset.retrievers, request.metadata
    if "retriever" not in metadata:
        return allowed[0]
    if metadata["retriever"] not in allowed:
        raise UserError(
            f"{request.task} does not support retriever={metadata['retriever']!r} for selecting examples: "
            f"expected one of {', '.join(allowed)}."
        )
    if (kind := metadata.get("context", "full")) != "full":
        raise UserError(f"{request.task}: retriever= requires context=full, got context={kind}.")
    return str(metadata["retriever"])


def load(options: Mapping[str, Any], seed: int) -> DataTable:
    """Load the table of a dataset's options and split it by the seed, stratified by class."""
    import numpy as np
    from sklearn import datasets  # heavy
    from sklearn.model_selection import train_test_split

    name = options["table"]
    options_of_loader = {"scaled": False} if name == "diabetes" else {}  # scikit-learn scales this table by default
    bunch = getattr(datasets, f"load_{name}")(**options_of_loader)
    classes = tuple(_plain(str(name)) for name in bunch.get("target_names", ()))
    targets = np.ascontiguousarray(bunch.target, dtype=np.float64)
    training, held_out = train_test_split(
        np.arange(len(targets)),
        test_size=options["held_out"],
        stratify=targets if classes else None,
        # our seeds are arbitrary integers; scikit-learn takes 32 bits
        random_state=random.Random(f"{name} {seed}").randrange(2**32),
    )
    return DataTable(
        name=name,
        columns=tuple(_plain(str(name)) for name in bunch.feature_names[: options["columns"]]),
        features=np.ascontiguousarray(bunch.data[:, : options["columns"]], dtype=np.float64),
        targets=targets,
        classes=classes,
        digits=options["digits"],
        held_out=tuple(held_out.tolist()),
        training=tuple(sorted(training.tolist())),
    )


def _plain(name: str) -> str:
    """Readable name: no underscores, no unit in brackets."""
    return re.sub(r" \(.*\)", "", name).replace("_", " ")


def nearest(table: DataTable) -> dict[int, list[int]]:
    """Held-out row -> all training rows, the nearest first; ties keep the order of the table."""
    import faiss
    import numpy as np

    training = table.features[list(table.training)]
    deviation = training.std(axis=0)
    deviation[deviation == 0] = 1.0  # a constant column does not affect distances
    scaled = ((table.features - training.mean(axis=0)) / deviation).astype(np.float32)
    faiss_index = faiss.IndexFlatL2(scaled.shape[1])
    faiss_index.add(scaled[list(table.training)])
    nearest_rows = {}
    for number in table.held_out:
        # One at a time: for batches faiss uses matrix products, which give equal rows unequal distances.
        distances, indices = faiss_index.search(scaled[number : number + 1], len(table.training))
        ranked = sorted(zip(distances[0].tolist(), indices[0].tolist(), strict=True))
        nearest_rows[number] = [table.training[index] for _, index in ranked]
    return nearest_rows


def random_order(table: DataTable, seed: int) -> dict[int, list[int]]:
    """Held-out row -> all training rows in random order."""
    return {
        number: random.Random(f"{table.name} {seed} {number}").sample(table.training, len(table.training))
        for number in table.held_out
    }


def _rows(request: Request, table: DataTable, retriever: str) -> list[Row]:
    orders = nearest(table) if retriever == "knn" else random_order(table, request.seed)
    meter, limit = request.meter_and_limit
    lines = {number: table.line(number) for number in table.training}
    costs = dict(zip(lines, meter.pieces([f"{line}\n" for line in lines.values()]), strict=True))
    scorer_fields = _scorer_fields(table)
    built_rows = []
    for number, order in orders.items():
        question = table.question(number)
        length, docs = _fitted(request, question, order, lines, costs)
        built_rows.append(
            request.row(
                id=f"{request.dataset.dataset}-{number}",
                question=question,
                answers=[table.target(number)],
                docs=docs,
                gold_pids=[],
                cluster=f"{request.dataset.dataset}-{number}-{limit // 1024}k",
                length_tokens=length,
                source=table.identity,
                **scorer_fields(number),
            )
        )
    return built_rows


def _scorer_fields(table: DataTable) -> Callable[[int], dict[str, Any]]:
    """Return a function of a row that returns the scorer's additional fields."""
    if table.classes:
        return lambda number: {"classes": list(table.classes)}
    training_targets = table.targets[list(table.training)].tolist()
    middle = median(training_targets)
    deviation = fmean(abs(value - middle) for value in training_targets)

    def fields(number: int) -> dict[str, Any]:
        target = table.targets[number].item()
        farthest = max(abs(value - target) for value in training_targets)
        return {"target": target, "deviation": deviation, "farthest": farthest}

    return fields


def _fitted(
    request: Request, question: str, order: Sequence[int], lines: dict[int, str], costs: dict[int, int]
) -> tuple[int, list[Document]]:
    """Total and documents of as many rows of `order` as fit, in reverse: the first of the order is last."""
    _, limit = request.meter_and_limit
    name = request.dataset.dataset

    def docs(count: int) -> list[Document]:
        return [Document(pid=f"{name}-{number}", title="", text=lines[number]) for number in reversed(order[:count])]

    @cache
    def total(count: int) -> int:
        return request.totals(docs(count), [question])[0]

    # Token counts of lines add up to the prompt's tokens but for a few, so this estimate is rarely corrected.
    spent = accumulate(costs[number] for number in order)
    count = sum(cost <= limit - total(0) for cost in spent)
    while count and total(count) > limit:
        count -= 1
    while count < len(order) and total(count + 1) <= limit:
        count += 1
    if not Contract.guaranteed(limit).allows([total(count)]):
        if count == len(order):
            raise UserError(
                f"{request.task} requires {limit} tokens, and all {count} training rows of {name} are {total(count)} "
                "tokens of this tokenizer: choose a shorter task."
            )
        raise UserError(
            f"{request.task} cannot reach {limit} tokens of this tokenizer within 2% with whole rows of "
            f"{name}: choose a longer task."
        )
    return total(count), docs(count)
