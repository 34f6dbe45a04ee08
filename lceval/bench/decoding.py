"""Decoding speed over one context: `--model hf`, lceval's full cache, and KV recipes, alternating within one run.

Each side decodes the same tokens step by step; its result is the median step over all rounds. The context is random
tokens, because speed does not depend on their content.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lceval.bench.machine import device, machine
from lceval.core.errors import UserError
from lceval.models import attention, chunkwise
from lceval.models.compressed import CompressedContext
from lceval.models.lcft import LCFT
from lceval.models.policies import StatsSpec
from lceval.models.prefill import Prefill
from lceval.models.recipe import Recipe, parse

SEED = 0


def bench(
    pretrained: str, recipes: Sequence[str], *, tokens: int, new_tokens: int, rounds: int, **model_args: Any
) -> dict[str, Any]:
    """Milliseconds per token of each side, and their ratios.

    Args:
        recipes: compared with `hf` and with `full`; the first one's ratios are the headline.
        tokens: context length.
        new_tokens: decoding steps per side and round.

    Raises:
        UserError: a bad recipe, or a context that does not fit the model.
    """
    parsed = [parse(text) for text in recipes]
    if not parsed or tokens < 1 or new_tokens < 1 or rounds < 1:
        raise UserError("bench decode requires a recipe, and at least one token, new token and round")
    for kv in parsed:
        if kv.evicts_while_writing:
            raise UserError(f"bench decode times steps over a cache that does not change, so not {kv}")
    model = LCFT(pretrained, device=device(), **model_args)
    if tokens + new_tokens > model.max_length:
        raise UserError(f"{tokens} + {new_tokens} tokens do not fit the model's {model.max_length}: reduce --tokens")
    stats_spec, bound = StatsSpec(), []
    for kv in parsed:
        model.use(kv)
        bound.append(model.recipe)
        stats_spec |= model.recipe.stats_spec
    ids = torch.randint(0, model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(SEED)).tolist()
    prefill = model.engine.prefill(ids, stats_spec)
    contexts = {"full": prefill.compress(Recipe(), consume=False)}
    for kv in bound:
        if kv.reads_in_chunks:
            contexts[str(kv)], _ = chunkwise.read(model.engine, ids, kv)
        else:
            contexts[str(kv)] = prefill.compress(kv, consume=False)
    steps = torch.randint(0, model.vocab_size, (new_tokens,), generator=torch.Generator().manual_seed(SEED + 1))

    def timed(context: CompressedContext) -> list[float]:
        cache = context.fork(new_tokens, kernels=model.engine.kernels)
        return _decode(lambda ids: model.engine.forward(cache, ids, keep=1), steps.to(model.device))

    def timed_hf() -> list[float]:
        cache = _copied(model, prefill)
        model.base.set_attn_implementation("sdpa")
        try:
            return _decode(
                lambda ids: model.model(input_ids=ids, cache=cache, use_cache=True).logits, steps.to(model.device)
            )
        finally:
            model.base.set_attn_implementation(attention.NAME)

    sides: dict[str, Callable[[], list[float]]] = {"hf": timed_hf}
    sides |= {name: (lambda c=context: timed(c)) for name, context in contexts.items()}  # type: ignore[misc]
    step_s: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            # The first round is a warm-up.
            step_s[name] += side() if number else side()[:0]
    medians = {name: statistics.median(times) for name, times in step_s.items()}
    report = [
        {
            "name": name,
            "ms_per_token": 1000 * medians[name],
            "kv_bytes": contexts[name].kept_bytes if name in contexts else prefill.kv_bytes,
            "bytes_read_per_step": contexts[name].read_bytes if name in contexts else prefill.kv_bytes,
            "compress_s": contexts[name].compress_s if name in contexts else 0.0,
            "speedup_vs_hf": medians["hf"] / medians[name],
            "speedup_vs_full": medians["full"] / medians[name],
        }
        for name in sides
    ]
    headline = next(side for side in report if side["name"] == str(parsed[0]))
    return {
        "bench": "decode",
        "model": pretrained,
        "context_tokens": tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "recipe": headline["name"],
        "speedup_vs_hf": headline["speedup_vs_hf"],
        "speedup_vs_full": headline["speedup_vs_full"],
        "sides": report,
        "machine": machine(),
    }


def _copied(model: LCFT, prefill: Prefill) -> DynamicCache:
    """A transformers cache with the same keys and values."""
    cache = DynamicCache(config=model.model.config)
    for index, layer in prefill.state_layers.items():
        layer.copy_to(cache.layers[index])
    for index, layer in enumerate(prefill.layers):
        if not layer.attends:
            continue
        k, v = layer.last if layer.is_sliding else (layer.keys, layer.values)
        cache.update(k[:, :, : layer.seen].clone(), v[:, :, : layer.seen].clone(), index)
    return cache


@torch.inference_mode()
def _decode(forward: Callable[[Tensor], Tensor], steps: Tensor) -> list[float]:
    """Seconds of each step."""
    step_s = []
    for step in steps:
        start = time.perf_counter()
        logits = forward(step[None, None])
        # Transfers the result to the CPU, as a loop that picks the next token does.
        int(logits[0, -1].argmax())
        step_s.append(time.perf_counter() - start)
    return step_s
