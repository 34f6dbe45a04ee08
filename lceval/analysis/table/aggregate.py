"""Rows over several tasks: a suite's mean at one length, and its mean over lengths as HELMET takes it.

The score of a suite at one length is the mean of its tasks' mean scores; the score of a suite is the mean over its
lengths. Runs of the same model, adapter, recipe, scorer, query-aware setting, budget and context form one row, across
folders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lceval.analysis.pairs import Result, counted, diagnosis_stratum, recovery_stratum, score_stratum
from lceval.analysis.table.row_values import KEYS, By, Row, Table, estimate, estimates, is_share
from lceval.stats import estimates as statistics
from lceval.stats.estimates import Stratum

_MEANS = (
    *("gold_kept", "gold_nll", "ndcg10", "kept_share", "kv_mb", "kv_16bit_share", "bytes_read_per_step"),
    *("contexts_per_gib", "written_tokens", "peak_mb"),
    *("first_token_s", "prefill_s", "prefill_tok_s", "decode_tok_s"),
)
_SUMS = ("n", "clusters", "errors", "truncated", "uncompressed", "wrong_format", "unjudged")
_AGREEMENT = ("judge_kappa", "judge_kappa_lo", "judge_kappa_hi", "judge_kappa_n")

_CONFIGURATION = ("model", "pretrained", "peft", "recipe", "scorer", "query_aware", "budget")

Pair = tuple[Result, Row]
Group = tuple[str | None, str | None, int | None]  # suite, mode, length


def aggregate(results: Sequence[Result], rows: Sequence[Row], by: By) -> Table:
    """A row per configuration and suite, or suite and length; suites in order of appearance, lengths ascending."""
    groups: dict[tuple[Group, tuple[object, ...]], list[Pair]] = {}
    left_out: dict[str, None] = {}
    configurations = _configurations(rows)
    modes = _modes(rows, configurations)
    for result, row, key in zip(results, rows, configurations, strict=True):
        if row["n"] and not (is_share(result.task) and result.task.higher_is_better and counted(result.task)):
            left_out[row["task"]] = None
            continue
        mode = row["mode"] if (key, row["suite"]) in modes else None
        group = (row["suite"], mode, row["length_k"] if by == "length" else None)
        groups.setdefault((group, key), []).append((result, row))
    suites, all_modes, runs = (list(dict.fromkeys(row[name] for row in rows)) for name in ("suite", "mode", "run"))
    grouped = [(group, members) for (group, _), members in groups.items()]

    def order(entry: tuple[Group, list[Pair]]) -> tuple[int, int, bool, int, int]:
        (suite, mode, length_k), members = entry
        place = -1 if mode is None else all_modes.index(mode)
        return suites.index(suite), place, length_k is None, length_k or 0, runs.index(members[0][1]["run"])

    grouped.sort(key=order)
    return Table([_row(members, group) for group, members in grouped], by, tuple(left_out))


def _modes(rows: Sequence[Row], keys: Sequence[tuple[object, ...]]) -> set[tuple[tuple[object, ...], str | None]]:
    """Configurations and suites with a dataset in several modes: modes are compared, not averaged."""
    dataset_modes: dict[tuple[object, ...], set[str]] = {}
    for row, key in zip(rows, keys, strict=True):
        if row["dataset"]:
            dataset_modes.setdefault((key, row["suite"], row["dataset"]), set()).add(row["mode"])
    return {(key, suite) for (key, suite, _), modes in dataset_modes.items() if len(modes) > 1}  # type: ignore[misc]


def _configurations(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    """The grouping key of each row: its configuration, plus its run if the configuration ran a task more than once."""
    # A task without samples has no context setting yet; the other tasks of its run have it.
    contexts = {row["run"]: row["context"] for row in rows if row["n"]}
    keys = []
    for row in rows:
        context = row["context"] if row["n"] else contexts.get(row["run"])
        keys.append((*(row[name] for name in _CONFIGURATION), context))
    times = Counter((key, row["task"]) for key, row in zip(keys, rows, strict=True))
    repeated = {key for (key, _), count in times.items() if count > 1}
    return [(*key, row["run"]) if key in repeated else key for key, row in zip(keys, rows, strict=True)]


def _row(members: Sequence[Pair], group: Group) -> Row:
    # Sorted, so that resamples do not depend on the order of the runs.
    scored = sorted((pair for pair in members if pair[1]["score"] is not None), key=lambda pair: pair[1]["task"])
    weights = _weights([row for _, row in scored])
    first = members[0][1]
    metrics = sorted({row["metric"] for _, row in scored})

    def mean(of: Callable[[Row], float | None]) -> float | None:
        """Weighted as the score; None unless every task has a value."""
        values = [of(row) for _, row in scored]
        known = [value for value in values if value is not None]
        return sum(w * v for w, v in zip(weights, known, strict=True)) if known and len(known) == len(values) else None

    shared = [
        name for name in (scored[0][1]["metrics"] if scored else ()) if all(name in r["metrics"] for _, r in scored)
    ]
    return {
        **dict.fromkeys(KEYS),
        **{name: first[name] for name in _CONFIGURATION},
        "context": next((row["context"] for _, row in members if row["n"]), None),
        "run": ", ".join(dict.fromkeys(row["run"] for _, row in members)),
        "suite": group[0],
        "mode": group[1] or _common([row["mode"] for _, row in members]),
        "length_k": group[2],
        "over": " ".join(row["task"] for _, row in scored),
        "metric": ", ".join(metrics) or None,
        "unit": "share",
        **_estimates(scored, weights),
        "metrics": {name: mean(lambda row, name=name: row["metrics"][name]) for name in shared},  # type: ignore[misc]
        "judge": _common([row["judge"] for _, row in scored]),
        **{name: _common([row[name] for _, row in scored]) for name in _AGREEMENT},
        **{name: mean(lambda row, name=name: row[name]) for name in _MEANS},  # type: ignore[misc]
        **{name: _sum([row[name] for _, row in members]) for name in _SUMS},
        "unfinished": any(row["unfinished"] for _, row in members),
    }


def _weights(rows: Sequence[Row]) -> list[float]:
    """The weight of each task: equal over lengths, and equal over the tasks of a length."""
    tasks = Counter(row["length_k"] for row in rows)
    return [1 / len(tasks) / tasks[row["length_k"]] for row in rows]


def _estimates(scored: Sequence[Pair], weights: Sequence[float]) -> Row:
    if not scored:
        return {}
    pairs = list(zip((result for result, _ in scored), weights, strict=True))
    if len(scored) == 1:
        # A single task has the same interval as in its own row.
        return estimates(scored[0][0])
    score = statistics.mean(_all([score_stratum(r.task, None, w) for r, w in pairs]) or [])
    values: Row = {"score": score.value, "ci_lo": score.lo, "ci_hi": score.hi}
    if not all(r.full for r, _ in pairs):
        return values
    if strata := _all([score_stratum(r.task, r.full, w) for r, w in pairs]):
        share, delta = statistics.against(strata)
        values |= {**estimate("retention", share), **estimate("delta", delta)}
    if strata := _all([recovery_stratum(r.task, r.full, r.none, w) if r.full and r.none else None for r, w in pairs]):
        values |= estimate("recovered", statistics.recovery(strata))
    if strata := _all([diagnosis_stratum(r.task, r.full, "gold_nll", w) if r.full else None for r, w in pairs]):
        values |= estimate("gold_nll_delta", statistics.difference(strata))
    return values


def _all(strata: Sequence[Stratum | None]) -> list[Stratum] | None:
    """All of them, or None: a mean over some of the tasks is not the mean."""
    known = [stratum for stratum in strata if stratum is not None]
    return known if len(known) == len(strata) else None


def _common(values: Sequence[Any]) -> Any:
    """The common value, or None."""
    return values[0] if len(set(values)) == 1 else None


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
