"""What is left of a plan: questions, tokens to read and seconds, and what the seconds are computed from.

Seconds a token come from the finished cells of the same model, if there are any; else from the packaged model's on two
cores, scaled by the number of parameters where the weights lie in a folder here; else there are none.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lceval.sweep.plan import Cell, Plan

# The packaged model, 135M parameters in float32 on two cores, with `diagnose=gold`: seconds a token.
PACKAGED, PARAMETERS, PREFILL_S, NEW_S = "smollm2-135m", 134_515_008, 0.0015, 0.035
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Rates:
    """Seconds a token read and a token written, tokens an answer, and what they are from; None is unknown."""

    prefill_s: float | None
    new_s: float | None
    answer_tokens: float
    basis: str


def cost(plan: Plan, root: Path) -> dict[str, Any]:
    """What is left: cells, samples, prefill tokens at most, and seconds of one worker.

    `unknown_tokens` names tasks whose length nothing says: their reading is in neither number. `basis` says for each
    model what its seconds are from; those of a model without any are not counted.
    """
    finished = plan.finished(root)
    done = set(finished)
    measured = [(cell, told) for cell in finished if (told := _telemetry(root / cell.name))]
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
        reading = _reading(one, questions, measured)
        if reading is None:
            unknown[one.task] = None
        samples += questions * len(left)
        tokens += reading or 0
        if rates.prefill_s is not None and rates.new_s is not None:
            seconds += (reading or 0) * rates.prefill_s + questions * len(left) * rates.answer_tokens * rates.new_s
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
    """The cost as lines of text."""
    lines = [
        f"{left['cells']} cells, {left['finished']} finished; left: {left['samples']} samples, at most "
        f"{left['prefill_tokens']:,} tokens to read, {left['seconds'] / 60:.0f} min of one worker"
    ]
    if left["unknown_tokens"]:
        lines.append(f"  tokens unknown, and reading them not counted: {', '.join(left['unknown_tokens'])}")
    return lines + [f"  {weights}: {said}" for weights, said in left["basis"].items()]


def parameters(folder: Path) -> int | None:
    """The number of parameters in a model folder, from the headers of its safetensors files; None without any."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(length))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total or None


def _weights(cell: Cell) -> str:
    return f"{cell.model} + {cell.adapter}" if cell.adapter else cell.model


def _rates(cell: Cell, measured: Sequence[tuple[Cell, list[dict[str, Any]]]]) -> Rates:
    same = [(other, samples) for other, samples in measured if other.model == cell.model]
    told = [kv for _, samples in same for kv in samples]
    read, written = _total(told, "prefill_tokens"), _total(told, "new_tokens")
    if read and written:
        return Rates(
            (_total(told, "prefill_s") + _total(told, "compress_s")) / read,
            (_total(told, "question_s") + _total(told, "decode_s")) / written,
            written / len(told),
            f"measured on {len(same)} finished cell{'s' * (len(same) > 1)}, {len(told)} samples",
        )
    if cell.model == PACKAGED:
        return Rates(PREFILL_S, NEW_S, ANSWER_TOKENS, "constants of the packaged model on two cores")
    number = parameters(Path(cell.model))
    if number is not None:
        scale = number / PARAMETERS
        why = f"the packaged model's constants on two cores, times {scale:.3g} by its {number / 1e6:,.0f}M parameters"
        return Rates(PREFILL_S * scale, NEW_S * scale, ANSWER_TOKENS, why)
    why = "time unknown and not counted: no cell of it is finished, and it is no folder here"
    return Rates(None, None, ANSWER_TOKENS, why)


def _reading(cell: Cell, questions: int, measured: Sequence[tuple[Cell, list[dict[str, Any]]]]) -> int | None:
    """Tokens that a group reads: as another model's finished cell did, else at most its length a question."""
    for other, samples in measured:
        if (other.task, other.metadata, other.limit) == (cell.task, cell.metadata, cell.limit):
            return int(_total(samples, "prefill_tokens"))
    length = _length(cell.task)
    return None if length is None else questions * length


def _telemetry(folder: Path) -> list[dict[str, Any]]:
    """The `kv` telemetry of every sample of a finished cell that has any."""
    import jsonlines

    telemetry = []
    for file in sorted(folder.glob("samples_*.jsonl")):
        with jsonlines.open(file) as samples:
            for sample in samples:
                kv = sample.get("kv")
                if isinstance(kv, dict) and "prefill_s" in kv:
                    telemetry.append(kv)
    return telemetry


def _total(samples: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(kv.get(key, 0) for kv in samples))


def _questions(cell: Cell) -> int:
    """How many questions a cell asks, from the limit or the catalogue's count."""
    from lceval.tasks import catalogue

    digits = re.search(r"\d[\d,]*", catalogue.find(cell.task).dataset.count)
    rows = int(digits[0].replace(",", "")) if digits else 100
    return rows if cell.limit is None else min(cell.limit, rows)


def _length(task: str) -> int | None:
    from lceval.tasks import catalogue

    length = catalogue.find(task).length_k
    return length * 1024 if length else None
