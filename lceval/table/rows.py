"""The rows of the table: plain data, one row per run and task, never rounded."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lceval.results import DIAGNOSES, Run, Sample, TaskResult
from lceval.stats import cluster_bootstrap
from lceval.table import against_full

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
    "retention": "score / score of the run under `full` with the same model, adapter, task and context, paired",
    "retention_lo": "lower bound of its interval",
    "retention_hi": "upper bound of its interval",
    "nll_delta": "gold_nll - gold_nll of that run, paired by sample",
    "nll_delta_lo": "lower bound of its interval",
    "nll_delta_hi": "upper bound of its interval",
    "gold_kept": "mean share of the gold passages' slots that survived, over the same samples",
    "gold_nll": "mean NLL per token of the gold answer, over samples with diagnose=gold",
    "ndcg10": "mean NDCG@10 of documents by attention, over samples with diagnose=attention",
    "kept_share": "sum of kv_bytes / sum of kv_bytes_full, over samples with telemetry",
    "kv_mb": "mean of kv_bytes over the same samples, in 1e6 bytes",
    "kv_16bit_share": "sum of kv_bytes / what the full cache would take at 2 bytes a number",
    "bytes_read_per_step": "mean bytes of KV cache that a decoding step reads, over the same samples",
    "prefill_s": "mean prefill time of a context that was really prefilled (not a shared one), in seconds",
    "prefill_tok_s": "prefilled tokens / prefill time, over the same contexts",
    "decode_tok_s": "tokens after each answer's first / the time they took, over samples that generated",
    "errors": "samples that ended in an error or without a finite score",
    "wrong_format": "samples whose output had not the form that was asked for; None without telemetry",
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


def build(runs: Iterable[Run]) -> Table:
    """One row per (run, task): tasks in the order they first appear, in each the runs as they were given."""
    results = in_order(runs)
    rows = []
    for run, task in results:
        row = _row(run, task)
        place = against_full.reference((run, task), results)
        if place is not None and run.recipe != against_full.FULL:
            row |= against_full.compared(task, results[place][1])
        rows.append(row)
    return Table(rows=rows)


def in_order(runs: Iterable[Run]) -> list[tuple[Run, TaskResult]]:
    """(run, task) in the order of the rows."""
    by_task: dict[str, list[tuple[Run, TaskResult]]] = {}
    for run in runs:
        for task in run.tasks:
            by_task.setdefault(task.task, []).append((run, task))
    return [pair for pairs in by_task.values() for pair in pairs]


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
        **dict.fromkeys(against_full.KEYS),
        **{name: _mean([s.diagnosis[name] for s in task.samples if name in s.diagnosis]) for name in DIAGNOSES},
        **_memory(task.samples),
        **_speed(task.samples),
        "errors": errors,
        "wrong_format": _counted(task.samples, lambda sample: sample.status == "wrong_format"),
        "truncated": _counted(task.samples, lambda sample: bool(sample.kv.get("truncated"))),
        "unfinished": not run.finished or len(task.samples) < (task.expected or 0),
    }


def _memory(samples: Sequence[Sample]) -> Row:
    """What the contexts occupied, over the samples with telemetry (an error may have none)."""
    measured = [sample for sample in samples if sample.kv_bytes is not None and sample.kv_bytes_full]
    if not measured:
        return dict.fromkeys(("kept_share", "kv_mb", "kv_16bit_share", "bytes_read_per_step"))
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
        "bytes_read_per_step": _mean([read for s in measured if (read := _measured(s, "bytes_read_per_step"))]),
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


def _counted(samples: Sequence[Sample], what: Callable[[Sample], bool]) -> int | None:
    return sum(map(what, samples)) if any(sample.kv for sample in samples) else None


def _is_share(metric: str | None, scores: Sequence[float]) -> bool:
    words = (metric or "").lower().split("_")
    return any(word in _SHARE_WORDS for word in words) and all(0 <= score <= 1 for score in scores)


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
