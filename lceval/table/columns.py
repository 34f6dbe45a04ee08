"""What the forms for people show of the rows: columns, headings, and the caption that explains them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lceval.stats import LEVEL
from lceval.table.rows import Row, Table

# What a judge's verdicts are known by, the first that there is.
_JUDGED = ("judge_sum", "avg_score", "judge_correct", "judge_acc")


@dataclass(frozen=True)
class Column:
    """One column.

    text: left-aligned and foldable; numbers are right-aligned and never broken.
    shown: "always", "differs" (else the caption says it once) or "present" (some row has a value to show).
    spare: a narrow terminal does without it, the highest first; 0 is never left out.
    """

    header: str
    cell: Callable[[Row], str]
    text: bool = False
    shown: Literal["always", "differs", "present"] = "present"
    spare: int = 0


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
    """`43.8 [31.2, 56.2]`, in percent where the metric is a share."""
    return _bounded(percent if row["unit"] == "share" else number, row["score"], row["ci_lo"], row["ci_hi"])


def _bounded(form: Callable[[float | None], str], value: float | None, lo: float | None, hi: float | None) -> str:
    if value is None:
        return "-"
    return f"{form(value)} [{'n/a' if lo is None else f'{form(lo)}, {form(hi)}'}]"


def _estimate(row: Row, name: str, form: Callable[[float | None], str]) -> str:
    return _bounded(form, row[name], row[f"{name}_lo"], row[f"{name}_hi"])


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
    return number(next((metrics[name] for name in _JUDGED if name in metrics), None))


def kappa(row: Row) -> str:
    """`0.67 [0.59, 0.75]`, "uncalibrated" where the row's judge was never held against people."""
    if not row["judge"] or _judge(row) == "-":
        return "-"
    return "uncalibrated" if row["judge_kappa"] is None else _estimate(row, "judge_kappa", "{:.2f}".format)


def _run(row: Row) -> str:
    labels = row["run"].split(", ")
    several = row["over"] is not None and len(labels) > 1
    return (f"{len(labels)} runs" if several else row["run"]) + ("*" if row["unfinished"] else "")


def model(row: Row) -> str:
    """`lcft smollm2-135m +ao`: model type, weights and adapter, each by the last part of its name or path."""
    names = [(row[key] or "").rstrip("/").rsplit("/", 1)[-1] for key in ("pretrained", "peft")]
    return " ".join([row["model"], *(mark + name for mark, name in zip(("", "+"), names, strict=True) if name)])


_COLUMNS = (
    Column("run", _run, text=True, shown="always"),
    Column("model", model, text=True, shown="differs"),
    Column("recipe", lambda row: row["recipe"], text=True, shown="always"),
    Column("context", lambda row: row["context"] or "-", text=True, shown="differs"),
    Column("tasks", lambda row: "-" if row["over"] is None else str(len(row["over"].split()))),
    Column("n", lambda row: str(row["n"]), shown="always"),
    Column(f"score [{100 * LEVEL:g}% CI]", score, shown="always"),
    Column("% of full", lambda row: _estimate(row, "retention", _whole)),
    Column(
        "minus full",
        lambda row: _estimate(row, "delta", _points if row["unit"] == "share" else _signed),
        spare=4,
    ),
    Column("judge", _judge),
    Column("judge's\nkappa", kappa, spare=5),
    Column("gold\nnll", lambda row: number(row["gold_nll"])),
    Column("nll minus\nfull", lambda row: _estimate(row, "gold_nll_delta", _signed), spare=2),
    Column("gold\nkept %", lambda row: percent(row["gold_kept"])),
    Column("ndcg\n@10 %", lambda row: percent(row["ndcg10"])),
    Column("kept\n%", lambda row: percent(row["kept_share"])),
    Column("KV\nMB", lambda row: number(row["kv_mb"])),
    Column("16b\n%", lambda row: percent(row["kv_16bit_share"])),
    Column("read\nMB", lambda row: number(row["bytes_read_per_step"] and row["bytes_read_per_step"] / 1e6), spare=3),
    Column("pref.\ns", lambda row: number(row["prefill_s"])),
    Column("pref.\ntok/s", lambda row: number(row["prefill_tok_s"])),
    Column("dec.\ntok/s", lambda row: number(row["decode_tok_s"])),
    Column("err", lambda row: str(row["errors"]), shown="always"),
    Column("cut", lambda row: _count(row["truncated"])),
    Column("form", lambda row: _count(row["wrong_format"]), spare=1),
    Column("un-\njudged", lambda row: _count(row["unjudged"])),
)


def columns(table: Table) -> list[Column]:
    """The columns that say something about this table."""
    chosen = []
    for column in _COLUMNS:
        cells = {column.cell(row) for row in table.rows}
        if column.shown == "always" or len(cells) > 1 or (column.shown == "present" and cells != {"-"}):
            chosen.append(column)
    return chosen


def sections(table: Table) -> list[tuple[str, list[Row]]]:
    """Rows under the heading of what they measure; scores of another version or metric stand apart.

    A row without samples joins the first section of its task.
    """
    named = {row["task"]: _heading(row) for row in reversed(table.rows) if row["n"]}
    found: dict[str, list[Row]] = {}
    for row in table.rows:
        if row["over"] is not None:
            heading = _group_heading(row, table)
        else:
            heading = _heading(row) if row["n"] else named.get(row["task"], str(row["task"]))
        found.setdefault(heading, []).append(row)
    return list(found.items())


def _heading(row: Row) -> str:
    version = f" (version {row['version']})" if row["version"] is not None else ""
    metric = row["metric"] or "no metric per sample"
    unit = " in %" if row["unit"] == "share" else ""
    filtered = f", filter {row['filter']}" if row["filter"] != "none" else ""
    return f"{row['task']}{version}: {metric}{unit}{filtered}"


def _group_heading(row: Row, table: Table) -> str:
    suite = f"suite {row['suite']}" if row["suite"] else "tasks of no suite"
    suite += f", mode {row['mode']}" if row["mode"] else ""
    if table.by == "length":
        suite += f" at {row['length_k']}k" if row["length_k"] else " at its sources' lengths"
    return f"{suite}: mean in %"


def mean_over(table: Table) -> str | None:
    """What the scores are means over, where they are not one task's."""
    if table.by == "task":
        return None
    if table.by == "length":
        return "mean over the tasks of that length of each task's mean headline score"
    return "mean over lengths of the mean over the tasks of that length of each task's mean headline score"


def caption(table: Table, shown: Sequence[Column]) -> list[str]:
    """What a reader needs to know about the numbers above, in the columns shown; one sentence group a line."""
    rows = table.rows
    headers = {column.header for column in shown}
    lines = []
    models = {model(row) for row in rows}
    if len(models) == 1:
        lines.append(f"model: {models.pop()}")
    lines += _over(table)
    counts = sorted({row["clusters"] for row in rows if row["n"]})
    if counts:
        span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        each = "" if table.by == "task" else " of each task by itself"
        interval = f"[lo, hi]: {100 * LEVEL:g}% bootstrap over clusters (contexts){each}, {span} per row."
        if table.by == "task" and any(row["score"] in (0.0, 1.0) and row["ci_lo"] is not None for row in rows):
            interval += " All 0 or all 1: Wilson, with the clusters as trials."
        if any("[n/a]" in column.cell(row) for column in shown if not column.text for row in rows):
            interval += " n/a: one cluster, or clusters that do not differ."
        lines.append(interval)
    if headers & {"% of full", "minus full", "nll minus\nfull"}:
        lines.append("of full, minus full: beside the run of recipe full on the same samples, resampled in pairs.")
    if any(row["kv_mb"] is not None for row in rows):
        lines.append("kept, 16b: share of the bytes of the uncompressed KV cache, and of it at 16 bits a number.")
        lines.append("KV: mean per sample, MB = 1e6 bytes. pref., dec.: prefill of a distinct context, decode.")
    if "read\nMB" in headers:
        lines.append("read: what a decoding step reads of a context's cache.")
    if any(row["gold_nll"] is not None for row in rows):
        lines.append("gold nll: NLL per token of the gold answer; gold kept: share of its passages' slots that stayed.")
    lines += _statuses(rows)
    return lines


def _over(table: Table) -> list[str]:
    lines = []
    if said := mean_over(table):
        lines.append(f"score: {said}.")
        unlike = [heading for heading, rows in sections(table) if len({row["over"] for row in rows}) > 1]
        if unlike:
            lines.append(f"Not the same tasks in every row, so not comparable: {'; '.join(unlike)}.")
    if table.left_out:
        lines.append(f"In no mean, because the score is no share of 1: {', '.join(table.left_out)}.")
    return lines


def _statuses(rows: Sequence[Row]) -> list[str]:
    lines = []
    if any(row["errors"] for row in rows):
        lines.append("err: errors, counted in n and as 0 in the score (no score where 0 is not the worst).")
    if any(row["truncated"] for row in rows):
        lines.append("cut: samples whose prompt did not fit and was shortened.")
    if any(row["wrong_format"] for row in rows):
        lines.append("form: answers without the form that was asked for; they are scored as they stand.")
    if any(row["unjudged"] for row in rows):
        lines.append("unjudged: samples without a judge's verdict; they are in no judged mean.")
    if judges := sorted({row["judge"] for row in rows if row["judge"]}):
        shown = sorted({next(k for k in _JUDGED if k in row["metrics"]) for row in rows if _judge(row) != "-"})
        lines.append(f"judge: {', '.join(shown) or 'verdicts'} by {', '.join(judges)}.")
        worth = {row["judge"]: (kappa(row), row["judge_kappa_n"]) for row in rows if kappa(row) != "-"}
        for judge, (found, n) in sorted(worth.items()):
            on = f" with people's grades of {n} FinanceBench answers" if n else " (lceval judge calibrate)"
            lines.append(f"judge's kappa of {judge}: {found}{on}.")
    if any(row["unfinished"] for row in rows):
        lines.append("*: unfinished: n counts the samples on disk so far.")
    return lines
