"""The table of one or more runs: a score with its interval and what it cost, one row per run and task.

`build` computes plain data and never rounds; the renderers below only format it. JSON and CSV carry every
key of `KEYS`; the two forms for people print one section per task and say once, in the caption, what is
the same in every row.
"""

import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lceval.errors import UserError
from lceval.results import DIAGNOSES, Run, Sample, TaskResult, read_runs
from lceval.stats import LEVEL, RESAMPLES, SEED, cluster_bootstrap

Format = Literal["terminal", "markdown", "csv", "json"]
Row = dict[str, Any]

# Key -> meaning; None (null, an empty CSV cell) is "not measured" or "undefined", never 0.
KEYS = {
    "run": "label of the run: its folder's name",
    "model": "lm-eval model type",
    "pretrained": "weights, as given in model_args",
    "peft": "adapter, as given in model_args",
    "recipe": "canonical KV recipe; '-' for models that have none",
    "task": "task name",
    "context": "what the questions were shown: full, gold, none or rag with its settings; None for foreign tasks",
    "version": "task version",
    "filter": "lm-eval filter the score is taken from: the task's first",
    "n": "samples, errors included",
    "clusters": "distinct contexts among them",
    "metric": "headline metric",
    "unit": "'share' where the metric lies in [0, 1] by nature, else 'raw'",
    "score": "mean over all n samples, an error counting as 0",
    "ci_lo": "lower bound of its interval",
    "ci_hi": "upper bound of its interval",
    "gold_kept": "mean share of the gold passages' slots that survived, over the same samples",
    "gold_nll": "mean NLL per token of the gold answer, over samples with diagnose=gold",
    "ndcg10": "mean NDCG@10 of documents by attention, over samples with diagnose=attention",
    "kept_share": "sum of kv_bytes / sum of kv_bytes_full, over samples with telemetry",
    "kv_mb": "mean of kv_bytes over the same samples, in 1e6 bytes",
    "kv_16bit_share": "sum of kv_bytes / what the full cache would take at 2 bytes a number",
    "prefill_s": "mean prefill time of a context that was really prefilled (not a shared one), in seconds",
    "prefill_tok_s": "prefilled tokens / prefill time, over the same contexts",
    "decode_tok_s": "tokens after each answer's first / the time they took, over samples that generated",
    "errors": "samples that ended in an error or without a finite score",
    "truncated": "samples whose prompt was cut; None without telemetry",
    "unfinished": "the run is not finished, or fewer samples are on disk than lm-eval evaluated",
}

# Metrics in [0, 1] by nature, recognised by a word of their name: acc_norm, subem_raw, ids_f1, parse_rate.
_SHARE_WORDS = frozenset(
    {"acc", "accuracy", "em", "exact", "f1", "match", "mrecall", "precision", "rate", "recall", "subem"}
    | {"rouge1", "rouge2", "rougel", "rougelsum"}
)

_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Table:
    """One row per (run, task), each with the keys of `KEYS`."""

    rows: list[Row]


def main(paths: Sequence[Path], fmt: Format = "terminal") -> str:
    """The table of the runs in `paths`, as text in one of four forms, without a final newline.

    Raises:
        UserError: No paths, or a folder that cannot be read as a run.
    """
    if not paths:
        raise UserError("no runs given; name one or more run folders, as in: lceval table runs/a runs/b")
    table = build(read_runs(paths))
    render: dict[Format, Callable[[Table], str]] = {
        "terminal": to_terminal,
        "markdown": to_markdown,
        "csv": to_csv,
        "json": to_json,
    }
    return render[fmt](table)


def build(runs: Iterable[Run]) -> Table:
    """One row per (run, task): tasks in the order they first appear, in each the runs as they were given."""
    by_task: dict[str, list[Row]] = {}
    for run in runs:
        for task in run.tasks:
            by_task.setdefault(task.task, []).append(_row(run, task))
    return Table(rows=[row for rows in by_task.values() for row in rows])


def to_json(table: Table) -> str:
    """{"interval": {...}, "rows": [...]}: every number as computed, null where undefined."""
    interval = {
        "method": "percentile bootstrap over clusters; Wilson where all scores are 0 or all are 1",
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seed": SEED,
    }
    return json.dumps({"interval": interval, "rows": table.rows}, indent=2, allow_nan=False)


def to_csv(table: Table) -> str:
    """A header of `KEYS` and one line per row; an undefined value is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(KEYS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return text.getvalue().rstrip("\n")


def to_markdown(table: Table) -> str:
    """One heading and pipe table per task, then the caption."""
    parts = []
    columns = _columns(table)
    for heading, rows in _sections(table):
        lines = [
            "| " + " | ".join(column.header.replace("\n", " ") for column in columns) + " |",
            "| " + " | ".join("---" if column.text else "---:" for column in columns) + " |",
        ]
        for row in rows:
            cells = (column.cell(row).replace("|", "\\|").replace("*", "\\*") for column in columns)
            lines.append("| " + " | ".join(cells) + " |")
        parts.append(f"### {heading}\n\n" + "\n".join(lines))
    caption = "\n".join(f"- {line}" for line in _caption(table)).replace("*", "\\*")
    return "\n\n".join([*parts, caption])


def to_terminal(table: Table, width: int | None = None) -> str:
    """Plain text for a terminal of `width` characters: the console's own, or 100 where there is none.

    Names fold onto further lines before a number loses a digit; a terminal too narrow for the numbers
    gets lines wider than itself.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = _columns(table)
    least = [_least_width(column, table) for column in columns]
    available = width or shutil.get_terminal_size(fallback=(100, 24)).columns
    gap = 2 if sum(least) + 2 * (len(columns) - 1) <= available else 1
    needed = sum(least) + gap * (len(columns) - 1)
    text = io.StringIO()
    console = Console(
        file=text, width=max(available, needed), color_system=None, markup=False, emoji=False, highlight=False
    )
    for heading, rows in _sections(table):
        grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
        for column, minimum in zip(columns, least, strict=True):
            grid.add_column(
                Text(column.header),
                justify="left" if column.text else "right",
                vertical="top",
                overflow="fold",
                no_wrap=not column.text,
                min_width=minimum,
            )
        for row in rows:
            grid.add_row(*(Text(column.cell(row)) for column in columns))
        console.print(Text(heading), grid, Text(), sep="\n")
    for line in _caption(table):
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _row(run: Run, task: TaskResult) -> Row:
    """The values of one run on one task, under the keys of `KEYS`."""
    scores = [0.0 if sample.score is None else sample.score for sample in task.samples]
    errors = sum(sample.status == "error" for sample in task.samples)
    # Counting an error as 0 is a penalty only where 0 is the worst score; elsewhere it would be a reward.
    countable = not errors or (task.higher_is_better and min(scores) >= 0)
    score = lo = hi = math.nan
    if task.headline and countable:
        score, lo, hi = cluster_bootstrap(scores, [sample.cluster for sample in task.samples])
    return {
        "run": run.label,
        "model": run.model,
        "pretrained": run.pretrained,
        "peft": run.peft,
        "recipe": run.recipe,
        "task": task.task,
        "context": task.context,
        "version": task.version,
        "filter": task.filters[0] if task.filters else None,
        "n": len(task.samples),
        "clusters": len({sample.cluster for sample in task.samples}),
        "metric": task.headline,
        "unit": "share" if _is_share(task.headline, scores) else "raw",
        "score": _defined(score),
        "ci_lo": _defined(lo),
        "ci_hi": _defined(hi),
        **{name: _mean([s.diagnosis[name] for s in task.samples if name in s.diagnosis]) for name in DIAGNOSES},
        **_memory(task.samples),
        **_speed(task.samples),
        "errors": errors,
        "truncated": _truncated(task.samples),
        "unfinished": not run.finished or len(task.samples) < (task.expected or 0),
    }


def _memory(samples: Sequence[Sample]) -> Row:
    """What the contexts occupied, over the samples with telemetry (an error may have none)."""
    measured = [sample for sample in samples if sample.kv_bytes is not None and sample.kv_bytes_full]
    if not measured:
        return {"kept_share": None, "kv_mb": None, "kv_16bit_share": None}
    kept = sum(sample.kv_bytes or 0 for sample in measured)
    full = sum(sample.kv_bytes_full or 0 for sample in measured)
    number_bytes = [_DTYPE_BYTES.get(str(s.kv.get("kv_dtype")).removeprefix("torch.")) for s in measured]
    full_16bit = 0.0
    for sample, size in zip(measured, number_bytes, strict=True):
        full_16bit += (sample.kv_bytes_full or 0) * 2 / size if size else math.nan
    return {
        "kept_share": kept / full,
        "kv_mb": kept / len(measured) / 1e6,
        "kv_16bit_share": _defined(kept / full_16bit),
    }


def _speed(samples: Sequence[Sample]) -> Row:
    """Prefill and decode speed; None where nothing was timed, which is not a speed of 0."""
    prefills = [sample for sample in samples if not sample.kv.get("shared_prefix")]
    seconds = [_measured(sample, "prefill_s") for sample in prefills]
    timed = [second for second in seconds if second]
    return {
        "prefill_s": math.fsum(timed) / len(timed) if timed else None,
        "prefill_tok_s": _rate(prefills, "prefill_tokens", "prefill_s"),
        "decode_tok_s": _rate(samples, "decode_tokens", "decode_s"),
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _rate(samples: Sequence[Sample], tokens_key: str, seconds_key: str) -> float | None:
    """All tokens over all seconds, of the samples where both were measured and neither is 0."""
    pairs = [(_measured(sample, tokens_key), _measured(sample, seconds_key)) for sample in samples]
    pairs = [(tokens, seconds) for tokens, seconds in pairs if tokens and seconds]
    return math.fsum(t for t, _ in pairs) / math.fsum(s for _, s in pairs) if pairs else None


def _measured(sample: Sample, key: str) -> float:
    """A positive finite number of the telemetry, or 0."""
    value = sample.kv.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else 0.0


def _truncated(samples: Sequence[Sample]) -> int | None:
    if not any(sample.kv for sample in samples):
        return None
    return sum(bool(sample.kv.get("truncated")) for sample in samples)


def _is_share(metric: str | None, scores: Sequence[float]) -> bool:
    words = (metric or "").lower().split("_")
    return any(word in _SHARE_WORDS for word in words) and all(0 <= score <= 1 for score in scores)


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class _Column:
    """One column of the forms for people.

    text: left-aligned and foldable; numbers are right-aligned and never broken.
    shown: "always", "differs" (else the caption says it once) or "present" (some row has a value to show).
    """

    header: str
    cell: Callable[[Row], str]
    text: bool = False
    shown: Literal["always", "differs", "present"] = "present"


def _number(value: float | None) -> str:
    """Three significant digits, all digits of a larger number, "-" for None."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _score(row: Row) -> str:
    """`43.8 [31.2, 56.2]`, in percent where the metric is a share."""
    form = _percent if row["unit"] == "share" else _number
    if row["score"] is None:
        return "-"
    interval = "n/a" if row["ci_lo"] is None else f"{form(row['ci_lo'])}, {form(row['ci_hi'])}"
    return f"{form(row['score'])} [{interval}]"


_COLUMNS = (
    _Column("run", lambda row: row["run"] + ("*" if row["unfinished"] else ""), text=True, shown="always"),
    _Column("model", lambda row: _model(row), text=True, shown="differs"),
    _Column("recipe", lambda row: row["recipe"], text=True, shown="always"),
    _Column("context", lambda row: row["context"] or "-", text=True, shown="differs"),
    _Column("n", lambda row: str(row["n"]), shown="always"),
    _Column(f"score [{100 * LEVEL:g}% CI]", _score, shown="always"),
    _Column("gold\nnll", lambda row: _number(row["gold_nll"])),
    _Column("gold\nkept %", lambda row: _percent(row["gold_kept"])),
    _Column("ndcg\n@10 %", lambda row: _percent(row["ndcg10"])),
    _Column("kept\n%", lambda row: _percent(row["kept_share"])),
    _Column("KV\nMB", lambda row: _number(row["kv_mb"])),
    _Column("16b\n%", lambda row: _percent(row["kv_16bit_share"])),
    _Column("pref.\ns", lambda row: _number(row["prefill_s"])),
    _Column("pref.\ntok/s", lambda row: _number(row["prefill_tok_s"])),
    _Column("dec.\ntok/s", lambda row: _number(row["decode_tok_s"])),
    _Column("err", lambda row: str(row["errors"]), shown="always"),
    _Column("cut", lambda row: str(row["truncated"]) if row["truncated"] else "-"),
)


def _model(row: Row) -> str:
    """`lcft smollm2-135m +ao`: model type, weights and adapter, each by the last part of its name or path."""
    names = [(row[key] or "").rstrip("/").rsplit("/", 1)[-1] for key in ("pretrained", "peft")]
    return " ".join([row["model"], *(mark + name for mark, name in zip(("", "+"), names, strict=True) if name)])


def _columns(table: Table) -> list[_Column]:
    """The columns that say something about this table."""
    chosen = []
    for column in _COLUMNS:
        cells = {column.cell(row) for row in table.rows}
        if column.shown == "always" or len(cells) > 1 or (column.shown == "present" and cells != {"-"}):
            chosen.append(column)
    return chosen


def _sections(table: Table) -> list[tuple[str, list[Row]]]:
    """Rows under the heading of what they measure; scores of another version or metric stand apart.

    A row without samples joins the first section of its task.
    """
    named = {row["task"]: _heading(row) for row in reversed(table.rows) if row["n"]}
    sections: dict[str, list[Row]] = {}
    for row in table.rows:
        heading = _heading(row) if row["n"] else named.get(row["task"], str(row["task"]))
        sections.setdefault(heading, []).append(row)
    return list(sections.items())


def _heading(row: Row) -> str:
    version = f" (version {row['version']})" if row["version"] is not None else ""
    metric = row["metric"] or "no metric per sample"
    unit = " in %" if row["unit"] == "share" else ""
    filtered = f", filter {row['filter']}" if row["filter"] != "none" else ""
    return f"{row['task']}{version}: {metric}{unit}{filtered}"


def _caption(table: Table) -> list[str]:
    """What a reader needs to know about the numbers above, one sentence group a line."""
    rows = table.rows
    lines = []
    models = {_model(row) for row in rows}
    if len(models) == 1:
        lines.append(f"model: {models.pop()}")
    counts = sorted({row["clusters"] for row in rows if row["n"]})
    if counts:
        span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        interval = f"[lo, hi]: {100 * LEVEL:g}% bootstrap over clusters (contexts), {span} per row."
        if any(row["score"] in (0.0, 1.0) and row["ci_lo"] is not None for row in rows):
            interval += " All 0 or all 1: Wilson, with the clusters as trials."
        if any(row["score"] is not None and row["ci_lo"] is None for row in rows):
            interval += " n/a: one cluster, or clusters that do not differ."
        lines.append(interval)
    if any(row["kv_mb"] is not None for row in rows):
        lines.append("kept, 16b: share of the bytes of the uncompressed KV cache, and of it at 16 bits a number.")
        lines.append("KV: mean per sample, MB = 1e6 bytes. pref., dec.: prefill of a distinct context, decode.")
    if any(row["gold_nll"] is not None for row in rows):
        lines.append("gold nll: NLL per token of the gold answer; gold kept: share of its passages' slots that stayed.")
    if any(row["errors"] for row in rows):
        lines.append("err: errors, counted in n and as 0 in the score (no score where 0 is not the worst).")
    if any(row["truncated"] for row in rows):
        lines.append("cut: samples whose prompt did not fit and was shortened.")
    if any(row["unfinished"] for row in rows):
        lines.append("*: unfinished: n counts the samples on disk so far.")
    return lines


def _least_width(column: _Column, table: Table) -> int:
    """Characters a column cannot do without; names can do with 11, folded."""
    texts = [column.header, *(column.cell(row) for row in table.rows)]
    longest = max(len(line) for text in texts for line in text.split("\n"))
    return min(longest, 11) if column.text else longest
