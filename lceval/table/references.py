"""Figures that others published, to be shown beside ours: quoted as printed, marked so, and never part of a mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lceval.errors import UserError
from lceval.table.rows import KEYS, Row

# Metrics that are printed in percent; others keep their own scale.
_PERCENT = frozenset({"acc", "subem", "rougeL"})


@dataclass(frozen=True)
class Reference:
    """A table of a publication.

    rows: each with `system`, `values` (a figure per column, None where there is none) and perhaps `recipe`.
    """

    name: str
    title: str
    source: str
    model: str
    columns: Sequence[str]
    metrics: Sequence[str]
    rows: Sequence[Mapping[str, Any]]

    @property
    def heading(self) -> str:
        """Says that it is quoted, from where, and what of."""
        return f"quoted, not measured here ({self.name}: {self.source}): {self.title}"

    def header(self) -> list[str]:
        """Names of the columns of `lines`."""
        return ["quoted", *(["recipe"] if any("recipe" in row for row in self.rows) else []), *self.columns]

    def lines(self) -> list[list[str]]:
        """The table as it was printed, "-" for a figure that it has not."""
        names = [[f"quoted: {row['system']}", *([row["recipe"]] if "recipe" in row else [])] for row in self.rows]
        values = [["-" if value is None else f"{value:.1f}" for value in row["values"]] for row in self.rows]
        return [name + cells for name, cells in zip(names, values, strict=True)]

    def flat(self) -> list[Row]:
        """A row per figure, under the keys of the table."""
        return [
            {
                **dict.fromkeys(KEYS),
                "run": f"quoted: {row['system']}",
                "pretrained": self.model,
                "recipe": row.get("recipe"),
                "task": column,
                "metric": metric,
                "unit": "share" if metric in _PERCENT else "raw",
                # A figure in percent has few digits: no more of them than were printed.
                "score": round(value / 100, 6) if metric in _PERCENT else value,
                "quoted": f"{self.name}: {self.source}",
            }
            for row in self.rows
            for column, metric, value in zip(self.columns, self.metrics, row["values"], strict=True)
            if value is not None
        ]


def load(names: Sequence[str]) -> list[Reference]:
    """The references of these names.

    Raises:
        UserError: there is none of a name.
    """
    if not names:
        return []
    import yaml

    known = yaml.safe_load((files("lceval.table") / "references.yaml").read_text(encoding="utf-8"))
    for name in names:
        if name not in known:
            raise UserError(f"unknown reference {name!r}: expected one of {', '.join(known)}")
    return [Reference(name=name, **known[name]) for name in dict.fromkeys(names)]
