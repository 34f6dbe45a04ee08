"""Eviction while an answer is written, against one plain forward pass with the evicted slots masked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
# Context, question and written tokens.
Row = tuple[list[int], list[int], list[int]]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return llama()


def recipe_of(text: str, every: int = 7, rest: str = "", prompt: str = "keep") -> Recipe:
    text = f"{text}:when=decode:every={every}:prompt={prompt}{rest}"
    return parse(text).bound(random_scorer(96, KV_HEADS, LAYERS).digest)


def rows_of(count: int) -> list[Row]:
    """Rows of different lengths."""
    parts = zip(CONTEXTS[:count], QUESTIONS[:count], strict=True)
    return [
        (ids[:context], ids[context : context + question], ids[context + question :])
        for context, question in parts
        for ids in [token_ids(context + question + WRITTEN)]
    ]


@dataclass
class Written:
    """What `write` observed.

    Attributes:
        logits: of the written tokens, [B, T, V].
        events: what was kept at each eviction.
        sizes: bytes of the rows' own slots after each token.
    """

    logits: Tensor
    cache: WritingCache
    events: Events
    sizes: list[int]


def write(engine: Engine, rows: Sequence[Row], recipe: Recipe, more: int = 0) -> Written:
    """Write the rows' tokens, and `more` that the model chooses, which are added to the rows."""
    contexts = [engine.prefill(context, StatsSpec()).compress(recipe, consume=True) for context, *_ in rows]
    questions = [question for _, question, _ in rows]
    cache = WritingCache(engine, contexts, questions, [0] * len(rows), recipe)
    longest = max(map(len, questions))
    ids = torch.tensor([[0] * (longest - len(question)) + question for question in questions])
    events: Events = [[] for _ in rows]
    logits, sizes = [], []
    with cache.writing():
        last = engine.forward(cache, ids)[:, -1:]
        for at in range(len(rows[0][2]) + more):
            before = cache.evictions
            for (*_, written), own in zip(rows, last, strict=True):
                if at == len(written):
                    written.append(chosen(own[0], written))
            last = engine.forward(cache, torch.tensor([[written[at]] for *_, written in rows]))
            logits.append(last)
            sizes.append(cache.own_bytes)
            if cache.evictions > before:
                for row, (context, question, _) in enumerate(rows):
                    kept = [
                        [layer.contexts[row].kept_positions(0, head).tolist() for head in range(KV_HEADS)]
                        for layer in cache.layers
                    ]
                    events[row].append((len(context) + len(question) + at + 1, kept))
    return Written(torch.cat(logits, 1), cache, events, sizes)


def chosen(logits: Tensor, written: Sequence[int]) -> int:
    """The most likely token that is not among the last 20: a small model would repeat one forever."""
    logits = logits.clone()
    logits[written[-20:]] = -math.inf
    return int(logits.argmax())


def oracle(model: Any, row: Row, events: Any) -> Tensor:
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
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -len(row[2]) :]
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
    run = write(engine_of(tiny), rows, recipe)
    assert run.cache.evictions == WRITTEN // 7
    for row, of_row, own in zip(rows, run.events, run.logits, strict=True):
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
    run = write(engine_of(tiny), rows, recipe_of("knorm:64", every=5, rest=rest))
    assert all(isinstance(kv, layout) for layer in run.cache.layers for kv in layer.contexts)
    plain = write(engine_of(tiny), rows, recipe_of("knorm:64", every=5))
    assert 0 < (run.logits - plain.logits).abs().max() < 0.5


@torch.inference_mode()
@pytest.mark.parametrize(("text", "batch"), [("kvzap:256", 1), ("adakv:256:of=knorm", 4)])
def test_2000_tokens_are_the_oracles_and_their_bytes_are_flat(tiny: Any, text: str, batch: int) -> None:
    rows: list[Row] = [(context, question, []) for context, question, _ in rows_of(batch)]
    run = write(engine_of(tiny, kernels=False), rows, recipe_of(text, every=128), more=2000)
    assert run.cache.evictions == 15
    for row, of_row, own in zip(rows, run.events, run.logits, strict=True):
        expected, written = oracle(tiny, row, of_row), row[2]
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
        assert written[1:] == [chosen(logits, written[: at + 1]) for at, logits in enumerate(expected[:-1])]
    # After the first evictions nothing grows but page tables, as heads differ: prompt, budget and tail, a page a head.
    heads, slot = batch * LAYERS * KV_HEADS, 2 * 16 * 4 + 4
    assert max(run.sizes[1000:]) <= max(run.sizes[:1000]) + heads * 64
    prompts = sum(len(context) + len(question) for context, question, _ in rows) * LAYERS * KV_HEADS
    assert max(run.sizes) <= (heads * (256 + 128 + 64) + prompts) * slot + heads * 64
    assert run.cache.peak_own_bytes >= max(run.sizes)


@torch.inference_mode()
def test_a_fork_and_a_selection_of_rows_are_independent(tiny: Any) -> None:
    engine, recipe, rows = engine_of(tiny), recipe_of("snapkv:12:window=4"), rows_of(4)
    cache = write(engine, rows, recipe).cache
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
