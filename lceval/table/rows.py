"""The rows of a table as plain data, one per run and task: nothing is rounded, and None is never 0."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lceval.results import DIAGNOSES, Sample, TaskResult
from lceval.stats import cluster_bootstrap
from lceval.table import intervals
from lceval.table.intervals import Estimate
from lceval.table.judged import is_judges, judged
from lceval.table.pairs import Result, counted, diagnosis_stratum, score_stratum

By = Literal["task", "suite", "length"]
Row = dict[str, Any]

# Key -> meaning; None (null, an empty CSV cell) is "not measured" or "undefined", never 0.
KEYS = {
    "run": "label of the run: its folder's name, or its path in the folder of runs that was named",
    "model": "lm-eval model type",
    "pretrained": "weights, as given in model_args",
    "peft": "adapter, as given in model_args",
    "recipe": "canonical KV recipe; '-' for models that have none",
    "task": "task name; None in a row over several tasks",
    "suite": "suite of a task of ours",
    "dataset": "its dataset",
    "mode": "its mode, as ao or rj",
    "length_k": "the task's length in units of 1,024 tokens",
    "over": "tasks that a row is the mean over, separated by spaces",
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
    "retention": "score / score under full, same model, adapter, task, version, context and samples; None for full",
    "retention_lo": "lower bound of its interval, which resamples contexts with both of their scores",
    "retention_hi": "upper bound of its interval",
    "delta": "score - score under full, likewise",
    "delta_lo": "lower bound of its interval",
    "delta_hi": "upper bound of its interval",
    "metrics": "mean of every metric that is a number per sample, and of a judge's",
    "judge": "whose verdicts are among the metrics; a rule is named as one",
    "judge_kappa": "its agreement with people beyond chance (Cohen's kappa) by `lceval judge calibrate`; "
    "None: uncalibrated",
    "judge_kappa_lo": "lower bound of its interval",
    "judge_kappa_hi": "upper bound of its interval",
    "judge_kappa_n": "answers graded by people that it rests on",
    "gold_kept": "mean share of the gold passages' slots that survived, over the same samples",
    "gold_nll": "mean NLL per token of the gold answer, over samples with diagnose=gold",
    "gold_nll_delta": "gold_nll - gold_nll under full, over samples where both have it; above 0 is worse",
    "gold_nll_delta_lo": "lower bound of its interval",
    "gold_nll_delta_hi": "upper bound of its interval",
    "ndcg10": "mean NDCG@10 of documents by attention, over samples with diagnose=attention",
    "kept_share": "sum of kv_bytes / sum of kv_bytes_full, over samples with telemetry",
    "kv_mb": "mean of kv_bytes over the same samples, in 1e6 bytes",
    "kv_16bit_share": "sum of kv_bytes / what the full cache would take at 2 bytes a number",
    "bytes_read_per_step": "mean bytes of the context's cache that a decoding step reads",
    "prefill_s": "mean prefill time of a context that was really prefilled (not a shared one), in seconds",
    "prefill_tok_s": "prefilled tokens / prefill time, over the same contexts",
    "decode_tok_s": "tokens after each answer's first / the time they took, over samples that generated",
    "errors": "samples that ended in an error or without a finite score",
    "truncated": "samples whose prompt was cut; None without telemetry",
    "wrong_format": "samples whose answer had not the required form; None where nothing says so",
    "unjudged": "samples without a judge's verdict; None where none is due",
    "unfinished": "the run is not finished, or fewer samples are on disk than lm-eval evaluated",
    "quoted": "where a row was quoted from; None for what was measured",
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

    by: what a row stands for: a task, a suite, or a suite at one length.
    left_out: tasks that no mean is taken over, because their score is not a share where 1 is best.
    quoted: references, of which nothing was measured here (`lceval.table.references`).
    """

    rows: list[Row]
    by: By = "task"
    left_out: Sequence[str] = ()
    quoted: Sequence[Any] = field(default_factory=tuple)


def row(result: Result, *, bounds: bool = True) -> Row:
    """The values of one run on one task, under the keys of `KEYS`.

    bounds: False leaves out the intervals and what is compared with full, which take the time.
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
        **verdicts.worth,
        **{name: _mean([s.diagnosis[name] for s in task.samples if name in s.diagnosis]) for name in DIAGNOSES},
        **_memory(task.samples),
        **_speed(task.samples),
        "errors": sum(sample.status == "error" for sample in task.samples),
        "truncated": _truncated(task.samples),
        "wrong_format": _wrong_format(task.samples),
        "unjudged": verdicts.unjudged,
        "unfinished": not run.finished or len(task.samples) < (task.expected or 0),
    }


def place(task: str) -> Row:
    """Suite, dataset, mode and length in units of 1,024 tokens of a task of ours; of another what its name says."""
    if task.startswith("lc_"):
        from lceval.tasks import catalogue

        if known := catalogue.tasks().get(task):
            of = known.dataset
            return {"suite": of.suite, "dataset": of.dataset, "mode": known.mode, "length_k": known.length_k}
    said = re.search(r"(?:^|_)(\d+)k(?:_|$)", task)
    return {"length_k": int(said[1]) if said else None}


def is_share(task: TaskResult) -> bool:
    """Whether the headline lies in [0, 1] by nature."""
    words = (task.headline or "").lower().split("_")
    scores = [sample.score or 0.0 for sample in task.samples]
    return any(word in _SHARE_WORDS for word in words) and all(0 <= score <= 1 for score in scores)


def estimate(name: str, found: Estimate) -> Row:
    """An estimate under its key and those of its bounds."""
    return {name: found.value, f"{name}_lo": found.lo, f"{name}_hi": found.hi}


def estimates(result: Result) -> Row:
    """The score with its interval, and what it is beside that of full."""
    task, full = result.task, result.full
    score = lo = hi = math.nan
    if (scores := counted(task)) is not None:
        score, lo, hi = cluster_bootstrap(scores, [sample.cluster for sample in task.samples])
    found: Row = {"score": _defined(score), "ci_lo": _defined(lo), "ci_hi": _defined(hi)}
    return found if full is None else found | _beside(task, full)


def _beside(task: TaskResult, full: TaskResult) -> Row:
    found: Row = {}
    if (scores := score_stratum(task, full)) is not None:
        share, delta = intervals.against([scores])
        found |= {**(estimate("retention", share) if task.higher_is_better else {}), **estimate("delta", delta)}
    if (nll := diagnosis_stratum(task, full, "gold_nll")) is not None:
        found |= estimate("gold_nll_delta", intervals.difference([nll]))
    return found


def _metrics(task: TaskResult) -> Mapping[str, float | None]:
    """Every metric's mean over the samples that have it; an error counts as in the score."""
    failed = sum(sample.status == "error" for sample in task.samples)
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(name for sample in task.samples for name in sample.metrics):
        values = [sample.metrics[name] for sample in task.samples if name in sample.metrics]
        worst_is_0 = name not in task.lower_is_better and min(values) >= 0
        found[name] = None if failed and not worst_is_0 else math.fsum(values) / (len(values) + failed)
    return found


def _memory(samples: Sequence[Sample]) -> Row:
    """What the contexts occupied, over the samples with telemetry (an error may have none)."""
    read = [bytes_ for sample in samples if (bytes_ := _measured(sample, "bytes_read_per_step"))]
    measured = [sample for sample in samples if sample.kv_bytes is not None and sample.kv_bytes_full]
    if not measured:
        return {"bytes_read_per_step": _mean(read)}
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
        "bytes_read_per_step": _mean(read),
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


def _wrong_format(samples: Sequence[Sample]) -> int | None:
    """Answers that a parser could not read as asked; an error has no answer."""
    if not any("status" in sample.kv or "parse_rate" in sample.metrics for sample in samples):
        return None
    return sum(
        sample.status == "wrong_format" or (sample.status != "error" and sample.metrics.get("parse_rate") == 0)
        for sample in samples
    )


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
