"""Pairs each run, sample by sample, with the run under recipe `full` that differs only in the recipe, and with the one
that has no context."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lceval.records.results import Run, Sample, TaskResult, model_args
from lceval.stats.estimates import Stratum

FULL = "full"
# Settings that may differ from the `full` run: compression, attention and diagnostics.
_RECIPE_SETTINGS = frozenset(
    {"kv", "scorer", "query_aware", "budget", "diagnose", "attn", "prefill_chunk", "prefix_cache_gib"}
)


@dataclass(frozen=True)
class Result:
    """One run on one task.

    Attributes:
        full: the same task under recipe `full`; None without such a run.
        none: the same questions without a context (`context=none`) under recipe `full`; None without such a run.
    """

    run: Run
    task: TaskResult
    full: TaskResult | None = None
    none: TaskResult | None = None


def results(runs: Sequence[Run]) -> list[Result]:
    """One result per (run, task): tasks in order of first appearance, runs in the given order."""
    by_task: dict[str, list[Result]] = {}
    for run in runs:
        for task in run.tasks:
            by_task.setdefault(task.task, []).append(Result(run, task))
    return [
        Result(r.run, r.task, _full(r, of_task), _none(r, of_task)) for of_task in by_task.values() for r in of_task
    ]


def counted(task: TaskResult) -> list[float] | None:
    """The score of every sample, 0 for an error; None without scores, or if 0 is not the worst score."""
    if not task.headline or not task.samples:
        return None
    scores = [0.0 if sample.score is None else sample.score for sample in task.samples]
    failed = any(sample.status == "error" for sample in task.samples)
    # Where 0 is not the worst score, scoring an error 0 would reward it.
    return None if failed and (not task.higher_is_better or min(scores) < 0) else scores


def score_stratum(task: TaskResult, full: TaskResult | None, weight: float = 1.0) -> Stratum | None:
    """The scores of a task, paired with those under `full` if given; None if the task has no score."""
    ours = counted(task)
    if ours is None:
        return None
    theirs = counted(full) if full else None
    if full and theirs is None:
        return None
    clusters = [sample.cluster for sample in task.samples]
    paired = [theirs[place] for place in places(task.samples, full.samples)] if full and theirs else []
    return Stratum(ours, paired, clusters, weight)


def recovery_stratum(task: TaskResult, full: TaskResult, none: TaskResult, weight: float = 1.0) -> Stratum | None:
    """What a recipe gains over no context, paired with what `full` gains; None if one of the tasks has no score."""
    ours, fulls, nones = counted(task), counted(full), counted(none)
    if ours is None or fulls is None or nones is None:
        return None
    floor = [nones[place] for place in places(task.samples, none.samples)]
    whole = [fulls[place] for place in places(task.samples, full.samples)]
    sign = 1 if task.higher_is_better else -1
    gains, possible = ([sign * (a - b) for a, b in zip(scores, floor, strict=True)] for scores in (ours, whole))
    return Stratum(gains, possible, [sample.cluster for sample in task.samples], weight)


def diagnosis_stratum(task: TaskResult, full: TaskResult, name: str, weight: float = 1.0) -> Stratum | None:
    """A diagnosis on the samples where both runs measured it; None without such samples."""
    measured = []
    for sample, place in zip(task.samples, places(task.samples, full.samples), strict=True):
        ours, theirs = sample.diagnosis.get(name), full.samples[place].diagnosis.get(name)
        if ours is not None and theirs is not None:
            measured.append((ours, theirs, sample.cluster))
    if not measured:
        return None
    ours_, theirs_, clusters = zip(*measured, strict=True)
    return Stratum(ours_, theirs_, clusters, weight)


def _full(of: Result, among: Sequence[Result]) -> TaskResult | None:
    """The task under `full` with the same samples; of several, that with the fewest other differences."""
    if of.run.recipe == FULL or not of.task.samples:
        return None
    same = [
        other
        for other in among
        if other.run.recipe == FULL and _key(other) == _key(of) and _same(of.task.samples, other.task.samples)
    ]
    return _closest(of, same)


def _none(of: Result, among: Sequence[Result]) -> TaskResult | None:
    """The task under `full` and `context=none` with the same questions; of several, that with the fewest other
    differences."""
    if of.run.recipe == FULL or not of.task.samples or of.task.context is None:
        return None
    without = re.sub(r"^[^:]+", "none", of.task.context)
    same = [
        other
        for other in among
        if other.run.recipe == FULL
        and _key(other) == (*_key(of)[:-1], without)
        and _same_ids(of.task.samples, other.task.samples)
    ]
    return _closest(of, same)


def _closest(of: Result, among: Sequence[Result]) -> TaskResult | None:
    """The task of the run with the fewest other differences; None without runs."""
    return min(among, key=lambda other: _differences(of.run, other.run)).task if among else None


def _key(of: Result) -> tuple[object, ...]:
    run, task = of.run, of.task
    return run.model, run.pretrained, run.peft, task.version, task.headline, task.filters[:1], task.context


def _differences(run: Run, other: Run) -> int:
    ours, theirs = _settings(run), _settings(other)
    return sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())


def _settings(run: Run) -> Mapping[str, Any]:
    arguments = {name: str(value) for name, value in model_args(run.config.get("model_args")).items()}
    others = {name: value for name, value in arguments.items() if name not in _RECIPE_SETTINGS}
    return {**others, **{name: str(run.config.get(name)) for name in ("gen_kwargs", "apply_chat_template")}}


def unique_names(ids: Iterable[str]) -> list[str]:
    """A unique name per sample: its id, or `id#2` for the second with that id."""
    names: dict[str, None] = {}
    occurrences: dict[str, int] = {}
    for id_ in ids:
        name, occurrence = id_, occurrences.get(id_, 1)
        while name in names:
            occurrence += 1
            name = f"{id_}#{occurrence}"
        names[name] = None
        occurrences[id_] = occurrence
    return list(names)


def places(samples: Sequence[Sample], full: Sequence[Sample]) -> list[int]:
    """The index of each sample in `full`."""
    index = {name: place for place, name in enumerate(unique_names(s.id for s in full))}
    return [index[name] for name in unique_names(s.id for s in samples)]


def _same(samples: Sequence[Sample], full: Sequence[Sample]) -> bool:
    """Whether both have the same samples, and the same prompts where both record them."""
    if not _same_ids(samples, full):
        return False
    others = (full[place] for place in places(samples, full))
    return all(
        a.prompt_hash == b.prompt_hash or not (a.prompt_hash and b.prompt_hash)
        for a, b in zip(samples, others, strict=True)
    )


def _same_ids(samples: Sequence[Sample], others: Sequence[Sample]) -> bool:
    return {*unique_names(s.id for s in samples)} == {*unique_names(s.id for s in others)}
