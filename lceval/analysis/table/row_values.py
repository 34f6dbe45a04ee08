"""The rows of a table as plain data, one per run and task: unrounded; None means undefined or not measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lceval.analysis.pairs import FULL, Result, counted, diagnosis_stratum, recovery_stratum, score_stratum
from lceval.analysis.table.judged import is_judges, judged
from lceval.core.answers import DIAGNOSES
from lceval.records.results import Run, Sample, TaskResult, model_args, number
from lceval.stats.estimates import Estimate, against, difference, mean, recovery

By = Literal["task", "suite", "length"]
Row = dict[str, Any]

# Key -> meaning; None (null, an empty CSV cell) means not measured or undefined, never 0.
KEYS = {
    "run": "run label: its folder name, or its path within a folder of runs",
    "model": "lm-eval model type",
    "pretrained": "model weights, as in model_args",
    "peft": "adapter, as in model_args",
    "recipe": "canonical KV recipe; '-' for models without one",
    "scorer": "scorer of a learned evictor as name@hash; None without one",
    "query_aware": "whether eviction scores include the question; None without a recipe and for full",
    "budget": "whether the budget includes the question (total) or not (context); None unless query-aware",
    "task": "task name; None in a mean over tasks",
    "suite": "suite of an lceval task",
    "dataset": "dataset of an lceval task",
    "mode": "mode of an lceval task, such as ao or rj",
    "length_k": "context length in units of 1,024 tokens",
    "over": "tasks averaged in this row, separated by spaces",
    "context": "context setting: full, gold, none or rag with its options; None for other tasks",
    "version": "task version",
    "filter": "lm-eval filter of the score: the task's first",
    "n": "number of samples, errors included",
    "clusters": "number of distinct contexts",
    "metric": "headline metric",
    "unit": "'share' where the metric lies in [0, 1] by nature, else 'raw'",
    "score": "mean over all n samples, errors scored 0",
    "ci_lo": "lower bound of the score",
    "ci_hi": "upper bound of the score",
    "retention": "score / score under full, same model, adapter, task, version, context and samples; None for full",
    "retention_lo": "lower bound of retention (paired bootstrap over contexts)",
    "retention_hi": "upper bound of retention",
    "delta": "score - score under full, on the same samples",
    "delta_lo": "lower bound of delta",
    "delta_hi": "upper bound of delta",
    "recovered": "share of the way from no context (a run with context=none) to full: (score - none) / (full - none)",
    "recovered_lo": "lower bound of recovered (paired bootstrap over contexts)",
    "recovered_hi": "upper bound of recovered",
    "metrics": "mean of every numeric per-sample metric and judge metric",
    "judge": "judge whose verdicts are among the metrics; the rule-based judge is labelled",
    "judge_kappa": "agreement of the judge with human labels (Cohen's kappa, `lceval judge calibrate`); "
    "None: uncalibrated",
    "judge_kappa_lo": "lower bound of kappa",
    "judge_kappa_hi": "upper bound of kappa",
    "judge_kappa_n": "number of human-labelled answers behind kappa",
    "gold_kept": "mean share of KV slots of gold passages kept, over samples with diagnose=gold",
    "gold_nll": "mean NLL per token of the gold answer, over samples with diagnose=gold",
    "gold_nll_delta": "gold_nll - gold_nll under full, over samples with both; above 0 is worse",
    "gold_nll_delta_lo": "lower bound of gold_nll_delta",
    "gold_nll_delta_hi": "upper bound of gold_nll_delta",
    "ndcg10": "mean NDCG@10 of documents by attention, over samples with diagnose=attention",
    "kept_share": "sum of kv_bytes / sum of kv_bytes_full, over samples with telemetry",
    "kv_mb": "mean of kv_bytes over samples with telemetry, in 1e6 bytes",
    "kv_16bit_share": "sum of kv_bytes / size of the full cache at 2 bytes per number",
    "bytes_read_per_step": "mean KV cache bytes of the context read per decoding step",
    "contexts_per_gib": "compressed contexts that fit into 1 GiB: 2**30 / mean bytes of one, with page slack",
    "written_tokens": "mean tokens of a generated answer",
    "peak_mb": "mean of the largest KV cache bytes while a sample is answered, in 1e6 bytes",
    "first_token_s": "mean seconds of prefill, compression and question, where the context was read for the question",
    "prefill_s": "mean prefill time of a context in seconds, without reused prefixes",
    "prefill_tok_s": "prefilled tokens / prefill time, over these contexts",
    "decode_tok_s": "decode tokens per second (first token of each answer excluded), over generated samples",
    "errors": "samples with an error or without a finite score",
    "truncated": "samples with a truncated prompt; None without telemetry",
    "uncompressed": "samples without a context to compress, answered from the full cache; None for full",
    "wrong_format": "samples whose answer is not in the requested format; None if not recorded",
    "unjudged": "samples without a verdict; None for tasks without a judge",
    "unfinished": "the run is unfinished, or samples are missing on disk",
    "quoted": "source of a quoted row; None for measured rows",
}

# Metrics in [0, 1] by nature, recognised by a word of their name: acc_norm, subem_raw, ids_f1, parse_rate.
_SHARE_WORDS = frozenset(
    {"acc", "accuracy", "em", "exact", "f1", "match", "mrecall", "precision", "rate", "recall", "subem"}
    | {"rouge1", "rouge2", "rougel", "rougelsum"}
)

_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Table:
    """Rows with the keys of `KEYS`.

    by: what a row aggregates over: a task, a suite, or a suite at one length.
    left_out: tasks excluded from means, because their score is not in [0, 1] with 1 best.
    quoted: published results (`lceval.analysis.table.references`).
    """

    rows: list[Row]
    by: By = "task"
    left_out: Sequence[str] = ()
    quoted: Sequence[Any] = field(default_factory=tuple)


def row(result: Result, *, bounds: bool = True) -> Row:
    """The values of one run on one task, under the keys of `KEYS`.

    bounds: False omits the intervals and the comparison with full, which are slow.
    """
    run, task = result.run, result.task
    verdicts = judged(task)
    return {
        **dict.fromkeys(KEYS),
        "run": run.label,
        "model": run.model,
        "pretrained": run.pretrained,
        "peft": run.peft,
        "recipe": run.recipe,
        "scorer": _scorer(run),
        "query_aware": _query_aware(run),
        "budget": model_args(run.config.get("model_args")).get("budget", "context") if _query_aware(run) else None,
        "task": task.task,
        **place(task.task),
        "context": task.context,
        "version": task.version,
        "filter": task.filters[0] if task.filters else None,
        "n": len(task.samples),
        "clusters": len({sample.cluster for sample in task.samples}),
        "metric": task.headline,
        "unit": "share" if is_share(task) else "raw",
        **(estimates(result) if bounds else {"score": _mean(counted(task) or [])}),
        "metrics": {k: v for k, v in _metrics(task).items() if not (verdicts.judge and is_judges(k))}
        | dict(verdicts.metrics),
        "judge": verdicts.judge,
        **verdicts.agreement,
        **{name: _mean([s.diagnosis[name] for s in task.samples if name in s.diagnosis]) for name in DIAGNOSES},
        **_memory(task.samples),
        **_speed(task.samples),
        "errors": sum(sample.status == "error" for sample in task.samples),
        "truncated": _truncated(task.samples),
        "uncompressed": None if run.recipe in ("-", FULL) else sum(sample.uncompressed for sample in task.samples),
        "wrong_format": _wrong_format(task.samples),
        "unjudged": verdicts.unjudged,
        "unfinished": not run.finished or len(task.samples) < (task.expected or 0),
    }


def _scorer(run: Run) -> str | None:
    recorded = run.config.get("lcft")
    return recorded.get("scorer") if isinstance(recorded, Mapping) else None


def _query_aware(run: Run) -> bool | None:
    """Whether eviction scores include the question; None without a recipe and for full, which evicts nothing."""
    if run.recipe in ("-", FULL):
        return None
    return str(model_args(run.config.get("model_args")).get("query_aware", False)).lower() == "true"


def place(task: str) -> Row:
    """Suite, dataset, mode and length_k of an lceval task; only the length in its name for other tasks."""
    if task.startswith("lc_"):
        from lceval.tasks import catalogue

        if known := catalogue.tasks().get(task):
            of = known.dataset
            if of.by_length:  # a suite of its own: its modes are tasks whose mean is the score
                return {"suite": of.dataset, "dataset": f"{of.dataset}_{known.mode}", "length_k": known.length_k}
            return {"suite": of.suite, "dataset": of.dataset, "mode": known.mode, "length_k": known.length_k}
    length = re.search(r"(?:^|_)(\d{1,6})k(?:_|$)", task)
    return {"length_k": int(length[1]) if length else None}


def is_share(task: TaskResult) -> bool:
    """Whether the headline lies in [0, 1] by nature."""
    words = (task.headline or "").lower().split("_")
    scores = [sample.score or 0.0 for sample in task.samples]
    return any(word in _SHARE_WORDS for word in words) and all(0 <= score <= 1 for score in scores)


def estimate(name: str, value: Estimate) -> Row:
    """An estimate and its bounds under their keys."""
    return {name: value.value, f"{name}_lo": value.lo, f"{name}_hi": value.hi}


def estimates(result: Result) -> Row:
    """The score with its interval, and the comparison with full."""
    task, full = result.task, result.full
    scores = score_stratum(task, None)
    score = Estimate(None) if scores is None else mean([scores])
    values: Row = {"score": score.value, "ci_lo": score.lo, "ci_hi": score.hi}
    if full is not None and result.none is not None and (gains := recovery_stratum(task, full, result.none)):
        values |= estimate("recovered", recovery([gains]))
    return values if full is None else values | _against_full(task, full)


def _against_full(task: TaskResult, full: TaskResult) -> Row:
    values: Row = {}
    if (scores := score_stratum(task, full)) is not None:
        share, delta = against([scores])
        values |= {**(estimate("retention", share) if task.higher_is_better else {}), **estimate("delta", delta)}
    if (nll := diagnosis_stratum(task, full, "gold_nll")) is not None:
        values |= estimate("gold_nll_delta", difference([nll]))
    return values


def _metrics(task: TaskResult) -> Mapping[str, float | None]:
    """The mean of every metric over the samples that have it; errors count as in the score."""
    failed = sum(sample.status == "error" for sample in task.samples)
    means: dict[str, float | None] = {}
    for name in dict.fromkeys(name for sample in task.samples for name in sample.metrics):
        values = [sample.metrics[name] for sample in task.samples if name in sample.metrics]
        worst_is_0 = name not in task.lower_is_better and min(values) >= 0
        means[name] = None if failed and not worst_is_0 else math.fsum(values) / (len(values) + failed)
    return means


def _memory(samples: Sequence[Sample]) -> Row:
    """KV cache memory, over the samples with telemetry (an error may have none)."""
    taken, bytes_read = (
        _mean([bytes_ for sample in samples if (bytes_ := _measured(sample, key))])
        for key in ("bytes_allocated", "bytes_read_per_step")
    )
    values: Row = {"bytes_read_per_step": bytes_read, "contexts_per_gib": 2**30 / taken if taken else None}
    measured = [sample for sample in samples if sample.kv_bytes is not None and sample.kv_bytes_full]
    if not measured:
        return values
    kept = sum(sample.kv_bytes or 0 for sample in measured)
    full = sum(sample.kv_bytes_full or 0 for sample in measured)
    number_bytes = [_DTYPE_BYTES.get(str(s.kv.get("kv_dtype")).removeprefix("torch.")) for s in measured]
    full_16bit = 0.0
    for sample, size in zip(measured, number_bytes, strict=True):
        full_16bit += (sample.kv_bytes_full or 0) * 2 / size if size else math.nan
    return values | {
        "kept_share": kept / full,
        "kv_mb": kept / len(measured) / 1e6,
        "kv_16bit_share": _defined(kept / full_16bit),
    }


def _speed(samples: Sequence[Sample]) -> Row:
    """Prefill and decode speed; None (not 0) if nothing was timed."""
    prefills = [sample for sample in samples if not sample.kv.get("shared_prefix")]
    seconds = [_measured(sample, "prefill_s") for sample in prefills]
    timed = [second for second in seconds if second]
    return {
        "first_token_s": _mean([second for sample in prefills if (second := _measured(sample, "first_token_s"))]),
        "prefill_s": math.fsum(timed) / len(timed) if timed else None,
        "prefill_tok_s": _rate(prefills, "prefill_tokens", "prefill_s"),
        "decode_tok_s": _rate(samples, "decode_tokens", "decode_s"),
        "written_tokens": _mean([tokens for sample in samples if (tokens := _measured(sample, "new_tokens"))]),
        "peak_mb": _mean([peak / 1e6 for sample in samples if (peak := _measured(sample, "peak_bytes"))]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _rate(samples: Sequence[Sample], tokens_key: str, seconds_key: str) -> float | None:
    """Total tokens / total seconds, over samples where both are measured and nonzero."""
    pairs = [(_measured(sample, tokens_key), _measured(sample, seconds_key)) for sample in samples]
    pairs = [(tokens, seconds) for tokens, seconds in pairs if tokens and seconds]
    return _defined(math.fsum(t for t, _ in pairs) / math.fsum(s for _, s in pairs)) if pairs else None


def _measured(sample: Sample, key: str) -> float:
    """A positive finite number from the telemetry, or 0."""
    return max(number(sample.kv.get(key)) or 0.0, 0.0)


def _truncated(samples: Sequence[Sample]) -> int | None:
    if not any(sample.kv for sample in samples):
        return None
    return sum(bool(sample.kv.get("truncated")) for sample in samples)


def _wrong_format(samples: Sequence[Sample]) -> int | None:
    """Number of answers not in the requested format; errors have no answer."""
    if not any("status" in sample.kv or "parse_rate" in sample.metrics for sample in samples):
        return None
    return sum(
        sample.status == "wrong_format" or (sample.status != "error" and sample.metrics.get("parse_rate") == 0)
        for sample in samples
    )


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
