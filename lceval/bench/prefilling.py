"""The cost of eviction before the first token: prefill, statistics, scoring and compaction, against a plain prefill.

The recipes alternate within one run. A recipe's overhead is the median over rounds of its time beside that of `full`
in the same round. The context is random tokens, because speed does not depend on their content.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from lceval.bench.decoding import SEED
from lceval.bench.machine import device, machine
from lceval.core.errors import UserError
from lceval.models.lcft import LCFT
from lceval.models.recipe import FULL


def bench(pretrained: str, recipes: Sequence[str], *, tokens: int, rounds: int, **model_args: Any) -> dict[str, Any]:
    """Seconds of each recipe, and its overhead as a share of the time of `full`.

    `prefill_s` includes what the recipe records while it reads (kvzip: its second pass; kvzap: its scores), and
    `compress_s` is selection and compaction.

    Args:
        tokens: context length.

    Raises:
        UserError: a bad recipe, or a context that does not fit the model.
    """
    if not recipes or tokens < 1 or rounds < 1:
        raise UserError("bench prefill requires a recipe, and at least one token and round")
    model = LCFT(pretrained, device=device(), **model_args)
    if tokens > model.max_length:
        raise UserError(f"{tokens} tokens do not fit the model's {model.max_length}: reduce --tokens")
    ids = torch.randint(0, model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(SEED)).tolist()
    prefill_s: dict[str, list[float]] = {}
    compress_s: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for recipe in (FULL, *recipes):
            model.use(recipe)
            prefill = model.engine.prefill(ids, model.recipe.stats_spec)
            context = prefill.compress(model.recipe, consume=True)
            if number:  # the first round is a warm-up
                prefill_s.setdefault(str(model.recipe), []).append(prefill.prefill_s)
                compress_s.setdefault(str(model.recipe), []).append(context.compress_s)
    totals = {name: [a + b for a, b in zip(prefill_s[name], compress_s[name], strict=True)] for name in prefill_s}
    sides = [
        {
            "name": name,
            "prefill_s": statistics.median(prefill_s[name]),
            "compress_s": statistics.median(compress_s[name]),
            "reading_overhead": _overhead(prefill_s[name], prefill_s[FULL]),
            "overhead": _overhead(totals[name], totals[FULL]),
        }
        for name in prefill_s
    ]
    return {
        "bench": "prefill",
        "model": pretrained,
        "context_tokens": tokens,
        "rounds": rounds,
        "sides": sides,
        "machine": machine(),
    }


def _overhead(seconds: Sequence[float], of_full: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, of_full, strict=True)) - 1
