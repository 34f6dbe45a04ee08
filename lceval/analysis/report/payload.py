"""The data of the page as plain JSON values: the table's rows, and the samples in columns.

A page contains thousands of samples of a dozen runs, so shared values are stored once: `texts` has questions, names and
statuses, `golds` lists of gold answers, `prompts` prompt ends, and samples contain indices into them. Only the end of a
prompt, which contains the question, is kept: at most `TAIL` characters, fewer where many different prompts would exceed
`TAILS_TOTAL`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from lceval.analysis.pairs import places, results
from lceval.analysis.table import KEYS, build
from lceval.analysis.table.judged import verdicts
from lceval.core.io import read_objects
from lceval.records.results import Run, Sample, TaskResult

TAIL = 1500
TAILS_TOTAL = 12_000_000
ANSWER = 4000

T = TypeVar("T", bound=Hashable)


class UniqueValues(Generic[T]):
    """Distinct values with their indices, in order of appearance."""

    def __init__(self) -> None:
        self.indices: dict[T, int] = {}

    def index(self, value: T) -> int:
        return self.indices.setdefault(value, len(self.indices))


def collect(runs: Sequence[Run]) -> dict[str, Any]:
    """All data of the page, independent of where and when it is created."""
    run_tasks = results(runs)
    rows = build(runs).rows
    texts: UniqueValues[str] = UniqueValues()
    golds: UniqueValues[tuple[str, ...]] = UniqueValues()
    prompts: UniqueValues[str] = UniqueValues()
    blocks = []
    for result, row in zip(run_tasks, rows, strict=True):
        block = _block(result.task, texts, golds, prompts)
        row["family"] = re.sub(r"_\d+k$", "", result.task.task)
        block["full"] = None
        if full := result.full:
            index = next(index for index, other in enumerate(run_tasks) if other.task is full)
            block["full"] = {"block": index, "pairs": places(result.task.samples, full.samples)}
        blocks.append(block)
    tail = max(200, min(TAIL, TAILS_TOTAL // max(1, len(prompts.indices))))
    page = finite(
        {
            "rows": rows,
            "keys": KEYS,
            "blocks": blocks,
            "texts": list(texts.indices),
            "golds": [list(answers) for answers in golds.indices],
            "prompts": [prompt[-tail:] for prompt in prompts.indices],
            "tail": tail,
        }
    )
    assert isinstance(page, dict)
    return page


def _block(
    task: TaskResult, texts: UniqueValues[str], golds: UniqueValues[tuple[str, ...]], prompts: UniqueValues[str]
) -> dict[str, Any]:
    """The samples of one row, a list per column; telemetry under `kv`, verdicts under `judge` by sample index."""
    samples = task.samples
    columns: dict[str, list[Any]] = {"question": [], "gold": [], "prompt": []}
    for line in _lines(task):
        doc = line["doc"] if isinstance(line.get("doc"), dict) else {}
        columns["question"].append(texts.index(str(doc.get("question") or doc.get("query") or "")))
        columns["gold"].append(golds.index(_gold(line, doc)))
        columns["prompt"].append(prompts.index(_prompt(line)[-TAIL:]))
    return {
        **columns,
        "id": [texts.index(s.id) for s in samples],
        "status": [texts.index(s.status) for s in samples],
        "score": [s.score for s in samples],
        "answer": [s.answer if len(s.answer) <= ANSWER else s.answer[:ANSWER] + " […]" for s in samples],
        "gold_kept": [s.diagnosis.get("gold_kept") for s in samples],
        "gold_nll": [s.diagnosis.get("gold_nll") for s in samples],
        "kv": _telemetry(samples),
        "judge": {str(index): _verdict(line) for index, line in enumerate(verdicts(task) or [])},
    }


def _verdict(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The displayed fields of a verdict: grades and reply, or the reason for their absence."""
    keys = ("judge", "status", "reason", "grades", "reply")
    return {f"judge: {key}" if key != "judge" else key: verdict[key] for key in keys if verdict.get(key)}


def _lines(task: TaskResult) -> Iterator[Mapping[str, Any]]:
    """The lines of the samples file in the order of `task.samples`, one in memory at a time."""
    if task.file is None:
        return
    yield from (row for _, row in read_objects(task.file) if str(row.get("filter", "none")) == task.filters[0])


def _prompt(line: Mapping[str, Any]) -> str:
    """The prompt of a generation; for multiple choice, that of the first choice."""
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
    """Columns of the scalar telemetry; kept tokens as their range over layers and heads."""
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
    if not isinstance(layers, list) or not layers:
        return None
    if not all(
        isinstance(layer, dict) and isinstance(layer.get(key), int) for layer in layers for key in ("min", "max")
    ):
        return None
    least, most = min(layer["min"] for layer in layers), max(layer["max"] for layer in layers)
    span = f"{least}" if least == most else f"{least} to {most}"
    return f"{span} ({len(layers)} layers)"


def _short(value: object) -> object:
    """Scalar telemetry, floats to six digits; None for other values."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else None


def finite(value: Any) -> Any:
    """The value with None for every non-finite number, which JSON cannot represent."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
