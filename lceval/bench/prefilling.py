"""The cost of eviction before the first token: prefill, statistics, scoring and compaction, against a plain prefill.

The recipes alternate within one run. A recipe's overhead is the median over rounds of its time beside that of `full`
in the same round, which another program on the machine disturbs by more than a cheap recipe costs. So PyTorch's
profiler also times the work that only the scores need, within the same prefill. The context is random tokens, because
speed does not depend on their content.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import profile

from lceval.bench import memory
from lceval.bench.decoding import SEED
from lceval.bench.machine import device, machine
from lceval.core.errors import UserError
from lceval.models import chunkwise
from lceval.models.compressed import CompressedContext
from lceval.models.engine import Engine
from lceval.models.lcft import LCFT
from lceval.models.prefill_stats import SCORING
from lceval.models.recipe import FULL, Recipe, parse


def bench(pretrained: str, recipes: Sequence[str], *, tokens: int, rounds: int, **model_args: Any) -> dict[str, Any]:
    """Seconds of each recipe, and its overhead as a share of the time of `full`.

    `prefill_s` includes what the recipe records while it reads (kvzip: its second pass; kvzap: its scores),
    `compress_s` is scores that need the whole context, selection and compaction, and `scoring_s` is the scores' part of
    both. `scoring_overhead` is `scoring_s` as a share of `prefill_s` without its part of it. `peak_kv_bytes` counts the
    cache at its largest, with the copies of an eviction; `memory_bytes` is what the process or the GPU needed for all.

    Args:
        tokens: context length.

    Raises:
        UserError: a bad recipe, or a context that does not fit the model.
    """
    if not recipes or tokens < 1 or rounds < 1:
        raise UserError("bench prefill requires a recipe, and at least one token and round")
    for kv in map(parse, recipes):
        if kv.evicts_while_writing:
            raise UserError(f"bench prefill measures eviction before the answer, and {kv} evicts nothing there")
    model = LCFT(pretrained, device=device(), **model_args)
    if tokens > model.max_length:
        raise UserError(f"{tokens} tokens do not fit the model's {model.max_length}: reduce --tokens")
    ids = torch.randint(0, model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(SEED)).tolist()
    measured: dict[str, list[dict[str, float]]] = {}
    memories: dict[str, dict[str, int | None]] = {}
    for number in range(rounds + 1):
        for recipe in (FULL, *recipes):
            model.use(recipe)
            measures = _measured(model.engine, ids, model.recipe)
            if number:  # the first round is a warm-up
                measured.setdefault(str(model.recipe), []).append(measures)
                if number == rounds:
                    memories[str(model.recipe)] = _memory(model.engine, ids, model.recipe)
    totals = {name: [one["prefill_s"] + one["compress_s"] for one in of] for name, of in measured.items()}
    sides = [
        {
            "name": name,
            **{key: statistics.median(one[key] for one in of) for key in of[0]},
            "overhead": _overhead(totals[name], totals[FULL]),
            **memories[name],
        }
        for name, of in measured.items()
    ]
    return {
        "bench": "prefill",
        "model": pretrained,
        "context_tokens": tokens,
        "rounds": rounds,
        "sides": sides,
        "machine": machine(),
    }


def _measured(engine: Engine, ids: Sequence[int], recipe: Recipe) -> dict[str, float]:
    """The measures of one prefill and compression."""
    if recipe.reads_in_chunks:
        with profile() as reading:
            context, prefill_s = chunkwise.read(engine, ids, recipe)
        # All scoring is part of the evictions, but for the scorers.
        scoring_s, while_reading = _scoring_s(reading), 0.0
    else:
        with profile() as reading:
            prefill = engine.prefill(ids, recipe.stats_spec)
        with profile() as compressing:
            context = prefill.compress(recipe, consume=True)
        prefill_s, while_reading = prefill.prefill_s, _scoring_s(reading)
        scoring_s = while_reading + _scoring_s(compressing)
    return {
        "prefill_s": prefill_s,
        "compress_s": context.compress_s,
        "scoring_s": scoring_s,
        "scoring_overhead": scoring_s / (prefill_s - while_reading),
    }


def _memory(engine: Engine, ids: Sequence[int], recipe: Recipe) -> dict[str, int | None]:
    """Counted and measured memory of one prefill and compression, without the profiler."""
    with memory.peak() as peak:
        context = _compressed(engine, ids, recipe)
    return {
        "kv_bytes": context.kept_bytes,
        "kv_bytes_full": context.full_bytes,
        "peak_kv_bytes": context.peak_bytes,
        "memory_bytes": peak.bytes,
    }


def _compressed(engine: Engine, ids: Sequence[int], recipe: Recipe) -> CompressedContext:
    if recipe.reads_in_chunks:
        return chunkwise.read(engine, ids, recipe)[0]
    return engine.prefill(ids, recipe.stats_spec).compress(recipe, consume=True)


def _scoring_s(run: profile) -> float:
    """Seconds of the work labelled SCORING: of its kernels on a GPU, of its operators on a CPU."""
    events: Any = run.events()  # type: ignore[no-untyped-call]
    labelled = [event for event in events if event.name == SCORING and event.device_type.name == "CPU"]
    return sum(float(event.device_time_total or event.cpu_time_total) for event in labelled) / 1e6


def _overhead(seconds: Sequence[float], of_full: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, of_full, strict=True)) - 1
