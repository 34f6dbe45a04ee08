"""What the page shows, as plain JSON values: the table's rows, and every sample in columns.

A page holds thousands of samples of a dozen runs, so what they share is stored once: `texts` has every prompt end,
question, name and status, `golds` every list of gold answers, and samples point into them. Only the end of a prompt is
kept (the question stands there): at most `TAIL` characters, fewer where many different prompts would outgrow
`TAILS_TOTAL`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from lceval.results import Run, Sample, TaskResult
from lceval.table import KEYS, build
from lceval.table.judged import verdicts
from lceval.table.pairs import places, results

TAIL = 1500
TAILS_TOTAL = 12_000_000
ANSWER = 4000

T = TypeVar("T", bound=Hashable)


class Pool(Generic[T]):
    """Each value once, in order of appearance."""

    def __init__(self) -> None:
        self.places: dict[T, int] = {}

    def place(self, value: T) -> int:
        return self.places.setdefault(value, len(self.places))


def collect(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything on the page; nothing in it depends on where or when it was made."""
    found = results(runs)
    rows = build(runs).rows
    texts: Pool[str] = Pool()
    golds: Pool[tuple[str, ...]] = Pool()
    prompts: Pool[str] = Pool()
    blocks = []
    for result, row in zip(found, rows, strict=True):
        block = _block(result.task, texts, golds, prompts)
        row["family"] = re.sub(r"_\d+k$", "", result.task.task)
        block["full"] = None
        if full := result.full:
            place = next(index for index, other in enumerate(found) if other.task is full)
            block["full"] = {"block": place, "pairs": places(result.task.samples, full.samples)}
        blocks.append(block)
    tail = max(200, min(TAIL, TAILS_TOTAL // max(1, len(prompts.places))))
    page = _finite(
        {
            "rows": rows,
            "keys": KEYS,
            "blocks": blocks,
            "texts": list(texts.places),
            "golds": [list(answers) for answers in golds.places],
            "prompts": [prompt[-tail:] for prompt in prompts.places],
            "tail": tail,
        }
    )
    assert isinstance(page, dict)
    return page


def _block(task: TaskResult, texts: Pool[str], golds: Pool[tuple[str, ...]], prompts: Pool[str]) -> dict[str, Any]:
    """The samples of one row, a list per column; telemetry under `kv`, what a judge said under `judge` by place."""
    samples = task.samples
    columns: dict[str, list[Any]] = {"question": [], "gold": [], "prompt": []}
    for line in _lines(task):
        doc = line["doc"] if isinstance(line.get("doc"), dict) else {}
        columns["question"].append(texts.place(str(doc.get("question") or doc.get("query") or "")))
        columns["gold"].append(golds.place(_gold(line, doc)))
        columns["prompt"].append(prompts.place(_prompt(line)[-TAIL:]))
    return {
        **columns,
        "id": [texts.place(s.id) for s in samples],
        "status": [texts.place(s.status) for s in samples],
        "score": [s.score for s in samples],
        "answer": [s.answer if len(s.answer) <= ANSWER else s.answer[:ANSWER] + " […]" for s in samples],
        "gold_kept": [s.diagnosis.get("gold_kept") for s in samples],
        "gold_nll": [s.diagnosis.get("gold_nll") for s in samples],
        "kv": _telemetry(samples),
        "judge": {str(index): _said(line) for index, line in enumerate(verdicts(task) or [])},
    }


def _said(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """What a judge said of a sample: its grades and its words, or why there are none."""
    shown = ("judge", "status", "reason", "grades", "reply")
    return {f"judge: {key}" if key != "judge" else key: verdict[key] for key in shown if verdict.get(key)}


def _lines(task: TaskResult) -> Iterator[Mapping[str, Any]]:
    """The lines of the samples file that `task.samples` were read from, in the same order, one in memory at a time."""
    if task.file is None:
        return
    with Path(task.file).open("rb") as lines:
        for line in lines:
            if line.strip() and (row := json.loads(line)).get("filter", "none") == task.filters[0]:
                yield row


def _prompt(line: Mapping[str, Any]) -> str:
    """The prompt of a generation; of a choice, the first choice's."""
    arguments = line.get("arguments")
    first = next(iter(arguments.values()), None) if isinstance(arguments, dict) else None
    return str(first.get("arg_0", "")) if isinstance(first, dict) else ""


def _gold(line: Mapping[str, Any], doc: Mapping[str, Any]) -> tuple[str, ...]:
    answers = doc.get("answers")
    if isinstance(answers, list):
        return tuple(str(answer) for answer in answers)
    target = line.get("target")
    return () if target is None else (str(target),)


def _telemetry(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Columns of the telemetry that is a single value; kept tokens as their range over layers and heads."""
    columns: dict[str, list[Any]] = {}
    names = {name: None for s in samples for name, value in s.kv.items() if isinstance(value, bool | int | float | str)}
    if any(s.kv_bytes is not None for s in samples):
        columns["kv_bytes"] = [s.kv_bytes for s in samples]
        columns["kv_bytes_full"] = [s.kv_bytes_full for s in samples]
    columns |= {name: [_short(s.kv.get(name)) for s in samples] for name in names if name != "status"}
    if any(s.kv.get("kept_tokens") for s in samples):
        columns["kept_tokens"] = [_kept_tokens(s.kv.get("kept_tokens")) for s in samples]
    return columns


def _kept_tokens(layers: object) -> str | None:
    if not isinstance(layers, list) or not all(
        isinstance(layer, dict) and {"min", "max"} <= {*layer} for layer in layers
    ):
        return None
    if not layers:
        return None
    least, most = min(layer["min"] for layer in layers), max(layer["max"] for layer in layers)
    span = f"{least}" if least == most else f"{least} to {most}"
    return f"{span} ({len(layers)} layers)"


def _short(value: object) -> object:
    """Telemetry to six digits; other values that are not plain are left out."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else None


def _finite(value: Any) -> Any:
    """The same with None for what is not a number: JSON has no other word for it."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
