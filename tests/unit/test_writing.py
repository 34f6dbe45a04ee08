"""Eviction while an answer is written, against one plain forward pass with the evicted slots masked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scorers import random_scorer
from test_chunkwise import HEADS, KV_HEADS, LAYERS, engine_of, llama, token_ids
from torch import Tensor
from transformers import AttentionInterface

from lceval.bench import decoding, prefilling
from lceval.core.errors import UserError
from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.quant import QuantKV
from lceval.models import attention
from lceval.models.arguments import check_mode
from lceval.models.engine import Engine
from lceval.models.policies import StatsSpec
from lceval.models.recipe import Recipe, parse
from lceval.models.writing import WritingCache, WritingLayer
from lceval.training.packing import check_trainable

EVICTORS = [
    "knorm:12",
    "streaming:12",
    "lacache:12",
    "keydiff:12",
    "snapkv:12:window=4",
    "tova:12",
    "random:12",
    "adakv:12:of=knorm",
    "adakv:12:window=4",
    "rkv:12",
    "kvzap:12",
    "kvzap:12:scope=head",
    "knorm:threshold=-1.2",
    "kvzap:threshold=0.2:recent=3",
]
CONTEXTS, QUESTIONS, WRITTEN = (40, 70, 1, 25), (5, 3, 9, 2), 40
# By row: the tokens seen at an eviction, and what was kept by layer and head.
Events = list[list[tuple[int, list[list[list[int]]]]]]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return llama()


def recipe_of(text: str, every: int = 7, rest: str = "", prompt: str = "keep") -> Recipe:
    text = f"{text}:when=decode:every={every}:prompt={prompt}{rest}"
    return parse(text).bound(random_scorer(96, KV_HEADS, LAYERS).digest)


def rows_of(count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Context, question and written tokens of each row."""
    parts = zip(CONTEXTS[:count], QUESTIONS[:count], strict=True)
    return [
        (ids[:context], ids[context : context + question], ids[context + question :])
        for context, question in parts
        for ids in [token_ids(context + question + WRITTEN)]
    ]


def write(engine: Engine, rows: Sequence[tuple[list[int], list[int], list[int]]], recipe: Recipe) -> Any:
    """The logits [B, WRITTEN, V] of the written tokens, the cache, and what was kept at each eviction."""
    contexts = [engine.prefill(context, StatsSpec()).compress(recipe, consume=True) for context, *_ in rows]
    questions = [question for _, question, _ in rows]
    cache = WritingCache(engine, contexts, questions, [0] * len(rows), recipe)
    longest = max(map(len, questions))
    ids = torch.tensor([[0] * (longest - len(question)) + question for question in questions])
    events: Events = [[] for _ in rows]
    logits = []
    with cache.writing():
        engine.forward(cache, ids)
        for at in range(WRITTEN):
            before = cache.evictions
            logits.append(engine.forward(cache, torch.tensor([[written[at]] for *_, written in rows])))
            if cache.evictions > before:
                for row, (context, question, _) in enumerate(rows):
                    kept = [
                        [layer.contexts[row].kept_positions(0, head).tolist() for head in range(KV_HEADS)]
                        for layer in cache.layers
                    ]
                    events[row].append((len(context) + len(question) + at + 1, kept))
    return torch.cat(logits, 1), cache, events


def oracle(model: Any, row: tuple[list[int], list[int], list[int]], events: Any) -> Tensor:
    """Logits of the written tokens in one pass, in which no token attends to what was evicted before it."""
    ids = [*row[0], *row[1], *row[2]]

    def masked(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any) -> Any:
        total = q.shape[2]
        visible = torch.ones(total, total, dtype=torch.bool).tril().repeat(KV_HEADS, 1, 1)
        for seen, kept in events:
            for head in range(KV_HEADS):
                dropped = torch.ones(seen, dtype=torch.bool)
                dropped[kept[module.layer_idx][head]] = False
                visible[head, seen:, :seen] &= ~dropped
        group = HEADS // KV_HEADS
        k, v, visible = (x.repeat_interleave(group, dim) for x, dim in ((k, 1), (v, 1), (visible, 0)))
        logits = (q @ k.transpose(2, 3) * scaling).masked_fill(~visible, -math.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2), None

    AttentionInterface.register("oracle", masked)
    model.set_attn_implementation("oracle")
    try:
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -WRITTEN:]
    finally:
        model.set_attn_implementation(attention.NAME)
    return logits


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("text", "prompt"),
    # kvzap scores what is written.
    [(text, prompt) for text in EVICTORS for prompt in ("keep", "evict") if prompt == "keep" or "kvzap" not in text],
)
def test_a_written_token_attends_to_what_is_left(tiny: Any, text: str, prompt: str, batch: int) -> None:
    recipe, rows = recipe_of(text, prompt=prompt), rows_of(batch)
    logits, cache, events = write(engine_of(tiny), rows, recipe)
    assert cache.evictions == WRITTEN // 7
    for row, of_row, own in zip(rows, events, logits, strict=True):
        torch.testing.assert_close(own, oracle(tiny, row, of_row), rtol=1e-4, atol=1e-4)
        tokens = len(row[0]) + len(row[1])
        before: list[set[int]] = []
        for seen, kept in of_row:
            heads = [set(head) for of_layer in kept for head in of_layer]
            assert not before or all(
                now <= {*old, *range(seen - 7, seen)} for now, old in zip(heads, before, strict=True)
            )
            before = heads
            if prompt == "keep":
                assert all({*range(tokens)} <= head for head in heads)
            if "threshold" not in text:
                budget = 12 + (tokens if prompt == "keep" else 0)
                assert sum(map(len, heads)) == LAYERS * KV_HEADS * min(seen, budget)


@torch.inference_mode()
@pytest.mark.parametrize(("rest", "layout"), [("+int4:residual=0", QuantKV), ("+fp8", Fp8KV)])
def test_what_is_left_is_stored_as_the_recipe_says(tiny: Any, rest: str, layout: type) -> None:
    rows = rows_of(2)
    logits, cache, _ = write(engine_of(tiny), rows, recipe_of("knorm:64", every=5, rest=rest))
    assert all(isinstance(kv, layout) for layer in cache.layers for kv in layer.contexts)
    plain, *_ = write(engine_of(tiny), rows, recipe_of("knorm:64", every=5))
    assert 0 < (logits - plain).abs().max() < 0.5


@torch.inference_mode()
@pytest.mark.parametrize("text", ["knorm:24", "adakv:24:of=knorm", "kvzap:24"])
def test_bytes_are_flat_while_hundreds_of_tokens_are_written(tiny: Any, text: str) -> None:
    engine, recipe = engine_of(tiny), recipe_of(text, every=16)
    context = engine.prefill(token_ids(30), StatsSpec()).compress(recipe, consume=True)
    cache = WritingCache(engine, [context], [[1, 2, 3]], [0], recipe)
    sizes = []
    with cache.writing():
        engine.forward(cache, torch.tensor([[1, 2, 3]]))
        for at in range(320):
            engine.forward(cache, torch.tensor([[at % 99]]))
            sizes.append(cache.own_bytes)
    assert cache.evictions == 20
    assert max(sizes[160:]) <= max(sizes[:160])
    slot = 2 * 16 * 4 + 4
    # Prompt, budget and tail, and the slack of a page a head.
    assert max(sizes) <= LAYERS * KV_HEADS * (33 + 24 + 16 + 64) * slot + LAYERS * KV_HEADS * 64
    assert cache.peak_own_bytes >= max(sizes)


@torch.inference_mode()
def test_a_fork_and_a_selection_of_rows_are_independent(tiny: Any) -> None:
    engine, recipe, rows = engine_of(tiny), recipe_of("snapkv:12:window=4"), rows_of(4)
    _, cache, _ = write(engine, rows, recipe)
    other = cache.fork()
    other.select([2, 0])
    assert isinstance(other, WritingCache)
    assert other.prompts == [cache.prompts[2], cache.prompts[0]]
    ids = torch.tensor([[5], [7]])
    with other.writing():
        first = engine.forward(other, ids)
        for _ in range(9):
            engine.forward(other, ids)
    assert other.evictions > cache.evictions
    again = cache.fork()
    again.select([2, 0])
    assert torch.equal(engine.forward(again, ids), first)
    assert all(isinstance(layer, WritingLayer) for layer in cache.layers)


def test_the_schedule_is_part_of_the_label_and_of_the_record() -> None:
    assert str(parse("knorm:512:prompt=keep:every=128:when=decode")) == "knorm:512:when=decode"
    text = "adakv:512:when=decode:every=64:prompt=evict:floor=0.1:of=knorm"
    assert str(parse(text)) == text
    record = parse("knorm:512:when=decode+fp8").expanded()["evict"]
    assert record == {"name": "knorm", "amount": 512, "when": "decode", "every": 128, "prompt": "keep"}


def test_it_excludes_training_and_query_aware_mode() -> None:
    with pytest.raises(UserError, match="not supported in training"):
        check_trainable(parse("snapkv:5:when=decode").evictor)
    with pytest.raises(UserError, match="evicts after the question: use query_aware=false"):
        check_mode(parse("snapkv:5:when=decode"), query_aware=True)


@pytest.mark.parametrize("bench", [decoding.bench, prefilling.bench])
def test_a_bench_of_what_precedes_the_answer_is_refused_before_a_model_is_loaded(bench: Any) -> None:
    more = {"new_tokens": 2} if bench is decoding.bench else {}
    with pytest.raises(UserError, match="knorm:5:when=decode"):
        bench("no-such-model", ["knorm:5:when=decode"], tokens=9, rounds=1, **more)
