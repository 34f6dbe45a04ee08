"""Columns, headings and caption of the human-readable formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lceval.analysis.table.row_values import Row, Table
from lceval.stats.estimates import LEVEL

# Main metric of a judge: the first that is present.
_JUDGE_METRICS = ("judge_sum", "avg_score", "judge_correct", "judge_acc")


@dataclass(frozen=True)
class Column:
    """One column.

    text: left-aligned and foldable; numbers are right-aligned and never broken.
    show: "always", "differs" (a constant value is stated in the caption), "present" (some row has a value) or "writing"
        (the same, if some row evicts while an answer is written).
    priority: columns are omitted on a narrow terminal, highest first; 0 is never omitted.
    """

    header: str
    cell: Callable[[Row], str]
    text: bool = False
    show: Literal["always", "differs", "present", "writing"] = "present"
    priority: int = 0


def number(value: float | None) -> str:
    """Three significant digits, all digits of a larger number, "-" for None."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def score(row: Row) -> str:
    """`43.8 [31.2, 56.2]`, in percent where the metric is a share; n/a for samples without a metric."""
    if row["n"] and row["metric"] is None:
        return "n/a"
    return _bounded(percent if row["unit"] == "share" else number, row["score"], row["ci_lo"], row["ci_hi"])


def _bounded(
    number_format: Callable[[float | None], str], value: float | None, lo: float | None, hi: float | None
) -> str:
    if value is None:
        return "-"
    bounds = "n/a" if lo is None else f"{number_format(lo)}, {number_format(hi)}"
    return f"{number_format(value)} [{bounds}]"


def _estimate(row: Row, name: str, number_format: Callable[[float | None], str]) -> str:
    return _bounded(number_format, row[name], row[f"{name}_lo"], row[f"{name}_hi"])


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _count(value: int | None) -> str:
    return str(value) if value else "-"


def _judge(row: Row) -> str:
    metrics = row["metrics"] or {}
    return number(next((metrics[name] for name in _JUDGE_METRICS if name in metrics), None))


def kappa(row: Row) -> str:
    """`0.67 [0.59, 0.75]`, "uncalibrated" where the judge has no measured agreement with human labels."""
    if not row["judge"] or _judge(row) == "-":
        return "-"
    return "uncalibrated" if row["judge_kappa"] is None else _estimate(row, "judge_kappa", "{:.2f}".format)


def _query(row: Row) -> str:
    query_aware = row.get("query_aware")  # absent in rows stored before 0.2
    if query_aware is None:
        return "-"
    total = row.get("budget") == "total"
    return ("query-aware, in budget" if total else "query-aware") if query_aware else "query-agnostic"


def _run(row: Row) -> str:
    labels = row["run"].split(", ")
    merged = row["over"] is not None and len(labels) > 1
    return (f"{len(labels)} runs" if merged else row["run"]) + ("*" if row["unfinished"] else "")


def model(row: Row) -> str:
    """`lcft smollm2-135m +ao`: model type, weights and adapter, each by the last part of its name or path."""
    names = [(row[key] or "").rstrip("/").rsplit("/", 1)[-1] for key in ("pretrained", "peft")]
    return " ".join([row["model"], *(mark + name for mark, name in zip(("", "+"), names, strict=True) if name)])


_COLUMNS = (
    Column("run", _run, text=True, show="always"),
    Column("model", model, text=True, show="differs"),
    Column("recipe", lambda row: row["recipe"], text=True, show="always"),
    Column("scorer", lambda row: row.get("scorer") or "-", text=True),
    Column("query", _query),
    Column("context", lambda row: row["context"] or "-", text=True, show="differs"),
    Column("tasks", lambda row: "-" if row["over"] is None else str(len(row["over"].split()))),
    Column("n", lambda row: str(row["n"]), show="always"),
    Column(f"score [{100 * LEVEL:g}% CI]", score, show="always"),
    Column("retention\n%", lambda row: _estimate(row, "retention", _whole)),
    Column("none to\nfull %", lambda row: _estimate(row, "recovered", _whole) if "recovered" in row else "-"),
    Column(
        "Δ vs full",
        lambda row: _estimate(row, "delta", _points if row["unit"] == "share" else _signed),
        priority=4,
    ),
    Column("judge", _judge),
    Column("judge's\nkappa", kappa, priority=5),
    Column("gold_nll", lambda row: number(row["gold_nll"])),
    Column("Δ gold_nll\nvs full", lambda row: _estimate(row, "gold_nll_delta", _signed), priority=2),
    Column("gold\nkept %", lambda row: percent(row["gold_kept"])),
    Column("ndcg\n@10 %", lambda row: percent(row["ndcg10"])),
    Column("KV\nkept\n%", lambda row: percent(row["kept_share"])),
    Column("KV\nMB", lambda row: number(row["kv_mb"])),
    Column("% of\nfp16\nKV", lambda row: percent(row["kv_16bit_share"])),
    Column(
        "read\nMB/step",
        lambda row: number(row["bytes_read_per_step"] and row["bytes_read_per_step"] / 1e6),
        priority=3,
    ),
    Column("contexts\nper GiB", lambda row: number(row.get("contexts_per_gib")), priority=6),
    Column("tokens\nwritten", lambda row: number(row.get("written_tokens")), show="writing"),
    Column("peak\nKV MB", lambda row: number(row.get("peak_mb")), show="writing"),
    Column("first\ntoken s", lambda row: number(row.get("first_token_s")), priority=5),
    Column("prefill\ns", lambda row: number(row["prefill_s"]), priority=4),
    Column("prefill\ntok/s", lambda row: number(row["prefill_tok_s"])),
    Column("decode\ntok/s", lambda row: number(row["decode_tok_s"])),
    Column("errors", lambda row: str(row["errors"]), show="always"),
    Column("truncated", lambda row: _count(row["truncated"])),
    Column("not com-\npressed", lambda row: _count(row.get("uncompressed"))),
    Column("bad\nformat", lambda row: _count(row["wrong_format"]), priority=1),
    Column("unjudged", lambda row: _count(row["unjudged"])),
)


def columns(table: Table) -> list[Column]:
    """The columns with information about this table."""
    chosen, writing = [], any("when=decode" in row["recipe"] for row in table.rows)
    for column in _COLUMNS:
        cells = {column.cell(row) for row in table.rows}
        if column.header == "query" and "query-aware" not in cells:
            continue
        if column.show == "writing" and not writing:
            continue
        if column.show == "always" or len(cells) > 1 or (column.show != "differs" and cells != {"-"}):
            chosen.append(column)
    return chosen


def sections(table: Table) -> list[tuple[str, list[Row]]]:
    """Rows by heading; versions and metrics of a task have separate headings.

    A row without samples joins the first section of its task.
    """
    headings = {row["task"]: _heading(row) for row in reversed(table.rows) if row["n"]}
    by_heading: dict[str, list[Row]] = {}
    for row in table.rows:
        if row["over"] is not None:
            heading = _group_heading(row, table)
        else:
            heading = _heading(row) if row["n"] else headings.get(row["task"], str(row["task"]))
        by_heading.setdefault(heading, []).append(row)
    return list(by_heading.items())


def _heading(row: Row) -> str:
    version = f" (version {row['version']})" if row["version"] is not None else ""
    metric = row["metric"] or "no metric per sample"
    unit = " in %" if row["unit"] == "share" else ""
    filtered = f", filter {row['filter']}" if row["filter"] != "none" else ""
    return f"{row['task']}{version}: {metric}{unit}{filtered}"


def _group_heading(row: Row, table: Table) -> str:
    suite = f"suite {row['suite']}" if row["suite"] else "tasks without a suite"
    suite += f", mode {row['mode']}" if row["mode"] else ""
    if table.by == "length":
        suite += f" at {row['length_k']}k" if row["length_k"] else " at source length"
    return f"{suite}: mean in %"


def mean_over(table: Table) -> str | None:
    """The definition of a mean score; None for rows of single tasks."""
    if table.by == "task":
        return None
    if table.by == "length":
        return "mean over the tasks of that length of each task's mean headline score"
    return "mean over lengths of the mean over the tasks of that length of each task's mean headline score"


def caption(table: Table, chosen: Sequence[Column]) -> list[str]:
    """Legend of the chosen columns, one topic per line."""
    rows = table.rows
    headers = {column.header for column in chosen}
    lines = []
    models = {model(row) for row in rows}
    if len(models) == 1:
        lines.append(f"model: {models.pop()}")
    lines += _over(table)
    counts = sorted({row["clusters"] for row in rows if row["n"]})
    if counts:
        span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        each = "" if table.by == "task" else ", resampled within each task"
        interval = f"[lo, hi]: {100 * LEVEL:g}% bootstrap CI over clusters (contexts){each}; {span} clusters per row."
        if table.by == "task" and any(row["score"] in (0.0, 1.0) and row["ci_lo"] is not None for row in rows):
            interval += " All scores 0 or all 1: Wilson interval with clusters as trials."
        if any("[n/a]" in column.cell(row) for column in chosen if not column.text for row in rows):
            interval += " n/a: a single cluster, or identical clusters."
        lines.append(interval)
    if headers & {"retention\n%", "Δ vs full", "Δ gold_nll\nvs full"}:
        lines.append("retention, Δ vs full: compared with recipe full on the same samples (paired bootstrap).")
    if any(row["kv_mb"] is not None for row in rows):
        lines.append("KV kept %: KV cache bytes as % of the full cache. % of fp16 KV: as % of a full cache in 16 bits.")
        lines.append("KV MB: mean per sample, 1e6 bytes. prefill: per distinct context.")
    if "read\nMB/step" in headers:
        lines.append("read MB/step: KV cache bytes of the context read per decoding step, 1e6 bytes.")
    if any(row["gold_nll"] is not None for row in rows):
        lines.append("gold_nll: NLL per token of the gold answer. gold kept %: KV slots of gold passages kept.")
    if "query" in headers:
        lines.append("query-aware: eviction scores include the question; query-agnostic: the context alone.")
    lines += _statuses(rows)
    return lines


def _over(table: Table) -> list[str]:
    lines = []
    if definition := mean_over(table):
        lines.append(f"score: {definition}.")
        mixed = [heading for heading, rows in sections(table) if len({row["over"] for row in rows}) > 1]
        if mixed:
            lines.append(f"Not comparable, because the rows cover different tasks: {'; '.join(mixed)}.")
    if table.left_out:
        lines.append(f"Excluded from means, because the score is not in [0, 1]: {', '.join(table.left_out)}.")
    return lines


def _statuses(rows: Sequence[Row]) -> list[str]:
    lines = []
    if any(row["errors"] for row in rows):
        lines.append("errors: included in n and scored 0 (no score where 0 is not the worst value).")
    if any(row["truncated"] for row in rows):
        lines.append("truncated: samples whose prompt exceeded the context window.")
    if any(row.get("uncompressed") for row in rows):
        lines.append(
            "not compressed: samples without a context to compress (see context_from), answered from the full cache."
        )
    if any(row["wrong_format"] for row in rows):
        lines.append("bad format: answers not in the requested format; scored as they are.")
    if any(row["unjudged"] for row in rows):
        lines.append("unjudged: samples without a verdict; excluded from judge means.")
    if judges := sorted({row["judge"] for row in rows if row["judge"]}):
        metrics = sorted({next(k for k in _JUDGE_METRICS if k in row["metrics"]) for row in rows if _judge(row) != "-"})
        lines.append(f"judge: {', '.join(metrics) or 'verdicts'} by {', '.join(judges)}.")
        kappas = {row["judge"]: (kappa(row), row["judge_kappa_n"]) for row in rows if kappa(row) != "-"}
        for judge, (value, n) in sorted(kappas.items()):
            basis = f" with human labels of {n} FinanceBench answers" if n else " (lceval judge calibrate)"
            lines.append(f"Cohen's kappa of {judge}: {value}{basis}.")
    if any(row["unfinished"] for row in rows):
        lines.append("*: unfinished run; n is the number of samples so far.")
    return lines
