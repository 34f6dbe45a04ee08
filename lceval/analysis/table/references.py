"""Published results for comparison: quoted as printed, marked as quoted, excluded from all means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lceval.analysis.table.row_values import KEYS, Row
from lceval.core.errors import UserError

# Metrics printed in percent; others keep their scale.
_PERCENT = frozenset({"acc", "subem", "rougeL", "string_match"})


@dataclass(frozen=True)
class Reference:
    """A table of a publication.

    rows: each with `system`, `values` (one number per column, or None) and optionally `recipe`.
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
        """Heading that marks the table as quoted, with source and title."""
        return f"quoted, not measured here ({self.name}: {self.source}): {self.title}"

    def header(self) -> list[str]:
        """Column names of `lines`."""
        return ["quoted", *(["recipe"] if any("recipe" in row for row in self.rows) else []), *self.columns]

    def lines(self) -> list[list[str]]:
        """The table as printed, "-" for a missing number."""
        names = [[f"quoted: {row['system']}", *([row["recipe"]] if "recipe" in row else [])] for row in self.rows]
        values = [[_printed(value) for value in row["values"]] for row in self.rows]
        return [name + cells for name, cells in zip(names, values, strict=True)]

    def flat(self) -> list[Row]:
        """One row per number, with the keys of the table."""
        return [
            {
                **dict.fromkeys(KEYS),
                "run": f"quoted: {row['system']}",
                "pretrained": self.model,
                "recipe": row.get("recipe"),
                "task": column,
                "metric": metric,
                "unit": "share" if metric in _PERCENT else "raw",
                # Rounded to the printed digits, which the division would extend.
                "score": round(value / 100, 6) if metric in _PERCENT else value,
                "quoted": f"{self.name}: {self.source}",
            }
            for row in self.rows
            for column, metric, value in zip(self.columns, self.metrics, row["values"], strict=True)
            if value is not None
        ]


def _printed(value: float | None) -> str:
    """A number with one decimal, or the two that it was printed with."""
    return "-" if value is None else f"{value:.2f}".removesuffix("0")


def load(names: Sequence[str]) -> list[Reference]:
    """The references with these names.

    Raises:
        UserError: an unknown name.
    """
    if not names:
        return []
    import yaml

    known = yaml.safe_load((files("lceval.analysis.table") / "references.yaml").read_text(encoding="utf-8"))
    for name in names:
        if name not in known:
            raise UserError(f"unknown reference {name!r}: expected one of {', '.join(known)}")
    return [Reference(name=name, **known[name]) for name in dict.fromkeys(names)]
