"""The estimated cost of a plan's unfinished cells: samples, prefill tokens and seconds.

Seconds per token come from finished cells of the same model, or are constants of the packaged model. Otherwise the time
is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lceval.core.io import read_objects
from lceval.records.results import number
from lceval.runs.sweep.plan import Cell, SweepPlan

# Seconds per token of the packaged model: 135M parameters in float32 on two cores, with `diagnose=gold`.
PACKAGED, PREFILL_S, NEW_S = "smollm2-135m", 0.0015, 0.035
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Rates:
    """Seconds per prefilled and per generated token, tokens per answer, and their source; None is unknown."""

    prefill_s: float | None
    new_s: float | None
    answer_tokens: float
    basis: str


def cost(plan: SweepPlan, root: Path) -> dict[str, Any]:
    """The remaining cells and samples, an upper bound of the prefill tokens, and the seconds of one worker.

    `unknown_tokens` lists tasks of unknown length, whose prefill is in neither number. `basis` is the source of each
    model's seconds; a model of unknown speed adds no seconds.
    """
    finished = plan.finished(root)
    done = set(finished)
    measured = [(cell, telemetry) for cell in finished if (telemetry := _telemetry(root / cell.name))]
    samples, tokens, seconds = 0, 0, 0.0
    basis: dict[str, str] = {}
    unknown: dict[str, None] = {}
    for group in plan.groups():
        left = [cell for cell in group if cell not in done]
        if not left:
            continue
        one = left[0]
        rates = _rates(one, measured)
        basis[_weights(one)] = rates.basis
        questions = _questions(one)
        prefill = _prefill_tokens(one, questions, measured)
        if prefill is None:
            unknown[one.task] = None
        samples += questions * len(left)
        tokens += prefill or 0
        if rates.prefill_s is not None and rates.new_s is not None:
            seconds += (prefill or 0) * rates.prefill_s + questions * len(left) * rates.answer_tokens * rates.new_s
    return {
        "cells": len(plan.cells),
        "finished": len(done),
        "samples": samples,
        "prefill_tokens": tokens,
        "unknown_tokens": [*unknown],
        "seconds": seconds,
        "basis": basis,
    }


def render(left: dict[str, Any]) -> list[str]:
    """The remaining cost as lines of text."""
    lines = [
        f"{left['cells']} cells, {left['finished']} finished; left: {left['samples']} samples, at most "
        f"{left['prefill_tokens']:,} prefill tokens, {left['seconds'] / 60:.0f} min of one worker"
    ]
    if left["unknown_tokens"]:
        lines.append(f"  not counted, because the context length is unknown: {', '.join(left['unknown_tokens'])}")
    return lines + [f"  {weights}: {source}" for weights, source in left["basis"].items()]


def _weights(cell: Cell) -> str:
    return f"{cell.model} + {cell.adapter}" if cell.adapter else cell.model


def _rates(cell: Cell, measured: Sequence[tuple[Cell, list[dict[str, Any]]]]) -> Rates:
    same = [(other, telemetry) for other, telemetry in measured if other.model == cell.model]
    samples = [kv for _, own in same for kv in own]
    prefilled, generated = _total(samples, "prefill_tokens"), _total(samples, "new_tokens")
    if prefilled and generated:
        return Rates(
            (_total(samples, "prefill_s") + _total(samples, "compress_s")) / prefilled,
            (_total(samples, "question_s") + _total(samples, "decode_s")) / generated,
            generated / len(samples),
            f"measured on {len(same)} finished cell{'s' * (len(same) > 1)}, {len(samples)} samples",
        )
    if cell.model == PACKAGED:
        return Rates(PREFILL_S, NEW_S, ANSWER_TOKENS, "constants of the packaged model on two cores")
    return Rates(None, None, ANSWER_TOKENS, "time unknown and not counted until one of its cells is finished")


def _prefill_tokens(cell: Cell, questions: int, measured: Sequence[tuple[Cell, list[dict[str, Any]]]]) -> int | None:
    """Tokens that a group prefills: those of a finished cell on the same rows, else at most the length per question."""
    for other, samples in measured:
        if (other.task, other.metadata, other.limit) == (cell.task, cell.metadata, cell.limit):
            return int(_total(samples, "prefill_tokens"))
    length = _length(cell.task)
    return None if length is None else questions * length


def _telemetry(folder: Path) -> list[dict[str, Any]]:
    """The `kv` telemetry of every sample of a finished cell that has any."""
    samples = (sample for file in sorted(folder.glob("samples_*.jsonl")) for _, sample in read_objects(file))
    return [kv for sample in samples if isinstance(kv := sample.get("kv"), dict) and "prefill_s" in kv]


def _total(samples: Sequence[dict[str, Any]], key: str) -> float:
    return sum(max(number(kv.get(key)) or 0.0, 0.0) for kv in samples)


def _questions(cell: Cell) -> int:
    """The number of a cell's questions, from its limit or the catalogue's count."""
    from lceval.tasks import catalogue

    digits = re.search(r"\d[\d,]*", catalogue.find(cell.task).dataset.count)
    rows = int(digits[0].replace(",", "")) if digits else 100
    return rows if cell.limit is None else min(cell.limit, rows)


def _length(task: str) -> int | None:
    from lceval.tasks import catalogue

    length = catalogue.find(task).length_k
    return length * 1024 if length else None
