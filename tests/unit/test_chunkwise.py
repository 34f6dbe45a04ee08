"""Eviction while a context is read, against one plain forward pass with the evicted slots masked."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import tiny_models
import torch
from scorers import random_scorer
from torch import Tensor
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

from lceval.core.errors import UserError
from lceval.kernels import launch
from lceval.models import attention, chunkwise
from lceval.models.arguments import check_mode
from lceval.models.chunkwise import Reader
from lceval.models.engine import Engine
from lceval.models.recipe import Recipe, parse
from lceval.models.reconstruction import Repetition
from lceval.runs import methods
from lceval.training.packing import check_trainable

HEADS, KV_HEADS, LAYERS = 6, 2, 3
LENGTH, CHUNK = 130, 32
EVICTORS = [
    "knorm:0.25",
    "streaming:0.25",
    "lacache:0.3",
    "keydiff:0.3",
    "snapkv:0.3:window=8",
    "snapkv:0.3:window=40",
    "tova:0.3",
    "rkv:0.3",
    "kvzap:0.3",
    "kvzap:0.3:scope=layer",
    "kvzap:0.3:scope=head:recent=5",
]
THRESHOLDS = ["kvzap:threshold=0.2:recent=3", "knorm:threshold=-1.2", "keydiff:threshold=-0.1"]
# One head's kept positions after a chunk, by layer and head.
Kept = list[list[list[int]]]


def llama() -> Any:
    model = tiny_models.llama(num_hidden_layers=LAYERS)
    model.set_attn_implementation(attention.register())
    return model


@pytest.fixture(scope="module")
def tiny() -> Any:
    return llama()


def engine_of(model: Any, layers: int = LAYERS, kernels: bool = launch.INTERPRETED) -> Engine:
    engine = Engine(model, model, chunk=0, kernels=kernels, autocast=nullcontext, repetition=Repetition((5,), (7,)))
    engine.add_scorer(random_scorer(96, KV_HEADS, layers))
    return engine


def recipe_of(text: str, chunk: int, rest: str = "", layers: int = LAYERS) -> Recipe:
    return parse(f"{text}:when=chunk:chunk={chunk}{rest}").bound(random_scorer(96, KV_HEADS, layers).digest)


def token_ids(count: int = LENGTH) -> list[int]:
    return torch.randint(0, 99, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def read(engine: Engine, ids: list[int], recipe: Recipe) -> tuple[Any, list[Kept]]:
    """The context, and what was kept after every chunk."""
    assert recipe.evictor is not None
    reader, kept = Reader(engine, ids, recipe.evictor), []
    for start in range(0, len(ids), recipe.evictor.read_chunk):
        reader.add(ids[start : start + recipe.evictor.read_chunk])
        kept.append([[kv.kept_positions(0, h).tolist() for h in range(KV_HEADS)] for kv in reader.slots.layers])
    return reader.finished(recipe), kept


def oracle(model: Any, ids: list[int], chunk: int, length: int, kept: list[Kept]) -> tuple[Tensor, list[Tensor]]:
    """One forward pass without the cache, in which no token attends to what was evicted before its chunk.

    Returns:
        The logits of the tokens after the context, and the keys [Hkv, S, D] of every layer.
    """
    keys: list[Tensor] = []

    def masked(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any) -> Any:
        keys.append(k[0])
        total = q.shape[2]
        visible = torch.ones(total, total, dtype=torch.bool).tril().repeat(KV_HEADS, 1, 1)
        for number, of_layers in enumerate(kept):
            first, stop = chunk * number, min(chunk * (number + 1), length)
            later = slice(stop, total if stop == length else min(stop + chunk, length))
            for head, positions in enumerate(of_layers[module.layer_idx]):
                dropped = torch.ones(stop, dtype=torch.bool)
                dropped[positions] = False
                visible[head, later, :stop] &= ~dropped
            assert first < stop
        group = HEADS // KV_HEADS
        k, v, visible = (x.repeat_interleave(group, dim) for x, dim in ((k, 1), (v, 1), (visible, 0)))
        logits = (q @ k.transpose(2, 3) * scaling).masked_fill(~visible, -math.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2), None

    AttentionInterface.register("oracle", masked)
    model.set_attn_implementation("oracle")
    try:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, length:]
    finally:
        model.set_attn_implementation(attention.NAME)
    return logits, keys


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [7, CHUNK, 128])
@pytest.mark.parametrize("text", [*EVICTORS, *THRESHOLDS])
def test_a_chunk_attends_to_itself_and_to_what_is_left(tiny: Any, text: str, chunk: int) -> None:
    ids = token_ids(LENGTH + 6)
    recipe = recipe_of(text, chunk)
    context, kept = read(engine_of(tiny), ids[:LENGTH], recipe)
    expected, _ = oracle(tiny, ids, chunk, LENGTH, kept)
    cache = context.fork(6, kernels=launch.INTERPRETED)
    parts = [tiny(torch.tensor([part]), cache=cache).logits[0] for part in (ids[LENGTH:-2], ids[-2:-1], ids[-1:])]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-4)
    # The budget holds after every chunk, and nothing evicted returns.
    before: Kept = [[[] for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    for number, now in enumerate(kept):
        seen = min(LENGTH, chunk * (number + 1))
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                assert set(now[layer][head]) <= {*before[layer][head], *range(chunk * number, seen)}
        if text in EVICTORS:
            assert recipe.evictor is not None
            slots = LAYERS * KV_HEADS * min(seen, recipe.evictor.budgeted.tokens(LENGTH))
            assert sum(len(head) for of_layer in now for head in of_layer) == slots
        before = now


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [7, CHUNK])
def test_after_every_chunk_the_shortest_keys_are_kept(tiny: Any, chunk: int) -> None:
    ids = token_ids()
    _, kept = read(engine_of(tiny), ids, recipe_of("knorm:0.25", chunk))
    _, keys = oracle(tiny, ids, chunk, LENGTH, kept)
    budget = round(0.25 * LENGTH)
    for layer in range(LAYERS):
        norms = keys[layer].norm(dim=-1).tolist()
        for head in range(KV_HEADS):
            mine: list[int] = []
            for number, now in enumerate(kept):
                mine += range(chunk * number, min(LENGTH, chunk * (number + 1)))
                mine = sorted(sorted(mine, key=lambda i: norms[head][i])[:budget])
                assert now[layer][head] == mine


@torch.inference_mode()
@pytest.mark.parametrize("text", [*EVICTORS, *THRESHOLDS])
def test_a_chunk_as_long_as_the_context_is_eviction_after_the_prefill(tiny: Any, text: str) -> None:
    ids, engine = token_ids(), engine_of(tiny)
    recipe = recipe_of(text, LENGTH)
    whole = parse(text).bound(random_scorer(96, KV_HEADS, LAYERS).digest)
    expected = engine.prefill(ids, whole.stats_spec).compress(whole, consume=True)
    context, seconds = chunkwise.read(engine, ids, recipe)
    assert seconds > 0 < context.compress_s
    assert (context.kept_bytes, context.full_bytes, context.dtype) == (
        expected.kept_bytes,
        expected.full_bytes,
        expected.dtype,
    )
    for a, b in zip(context.layers, expected.layers, strict=True):
        for head in range(KV_HEADS):
            assert torch.equal(a.kept_positions(0, head), b.kept_positions(0, head))
            assert all(torch.equal(x, y) for x, y in zip(a.head(head), b.head(head), strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("text", ["streaming:0.25", "lacache:0.3"])
@pytest.mark.parametrize("chunk", [1, 7, CHUNK])
def test_methods_by_position_keep_the_same_slots_however_the_context_is_read(tiny: Any, text: str, chunk: int) -> None:
    ids, engine = token_ids(), engine_of(tiny)
    expected = engine.prefill(ids, parse(text).stats_spec).compress(parse(text), consume=True)
    context, _ = chunkwise.read(engine, ids, recipe_of(text, chunk))
    for a, b in zip(context.layers, expected.layers, strict=True):
        assert all(torch.equal(a.kept_positions(0, head), b.kept_positions(0, head)) for head in range(KV_HEADS))


@torch.inference_mode()
@pytest.mark.parametrize("rest", ["+int4:residual=10", "+quest:0.2:skip=0", "+int8+fier:0.2:skip=0"])
def test_quantization_and_sparse_attention_follow_the_last_eviction(tiny: Any, rest: str) -> None:
    ids, engine = token_ids(), engine_of(tiny)
    recipe = recipe_of("kvzap:0.5", CHUNK, rest)
    plain = Recipe(recipe.evictor)
    context, _ = chunkwise.read(engine, ids, recipe)
    kept, _ = chunkwise.read(engine, ids, plain)
    question = torch.tensor([[3, 1, 4]])
    layers = []
    for place, kv in enumerate(kept.layers):
        stored = kv if recipe.quantizer is None else recipe.quantizer.quantize(kv)
        sparse = recipe.sparse_attention
        layers.append(stored if sparse is None else sparse.wrap(stored, place, LENGTH))
    expected = type(kept)(tuple(layers), LENGTH, kept.dtype, 0, 0, 0.0)
    results = [tiny(question, cache=one.fork(3)).logits for one in (context, expected)]
    assert torch.equal(*results)
    assert context.kept_bytes == expected.kept_bytes


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [9, 40, 100])
def test_sliding_layers_keep_their_window(chunk: int) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=99,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=24,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.set_attn_implementation(attention.register())
    ids, engine = token_ids(), engine_of(model, layers=2)
    # Nothing is evicted, so the results are those of a plain pass.
    context, _ = chunkwise.read(engine, ids[:-4], recipe_of("streaming:1.0", chunk, layers=2))
    assert context.kept_bytes - context.full_bytes == 4 * 2 * KV_HEADS * (LENGTH - 4) * (chunk < LENGTH - 4)
    plain = model(torch.tensor([ids]), use_cache=False).logits[:, -4:]
    torch.testing.assert_close(
        model(torch.tensor([ids[-4:]]), cache=context.fork(4)).logits, plain, rtol=1e-4, atol=1e-4
    )


@torch.inference_mode()
def test_memory_peaks_at_what_is_kept_one_chunk_and_one_layer(tiny: Any) -> None:
    length, chunk = 8000, 1024
    ids, engine = token_ids(length), engine_of(tiny, kernels=False)
    context, _ = chunkwise.read(engine, ids, recipe_of("knorm:0.25", chunk))
    slots, slot = length // 4 + chunk, context.full_bytes // length
    # One layer's slots in a copy; page slack of at most one page a head, and 4 bytes of position a slot.
    workspace = slots * slot // LAYERS
    slack = LAYERS * KV_HEADS * (64 * 2 * 16 * 4 + 2 * 4 * slots)
    assert slots * slot < context.peak_bytes <= slots * slot + workspace + slack
    whole = engine.prefill(ids, parse("knorm:0.25").stats_spec).compress(parse("knorm:0.25"), consume=True)
    assert context.peak_bytes < 0.6 * whole.peak_bytes


def test_the_chunk_is_part_of_the_label_and_of_the_record() -> None:
    assert str(parse("knorm:0.5:chunk=1024:when=chunk")) == "knorm:0.5:when=chunk"
    assert str(parse("snapkv:0.5:window=8:chunk=64:when=chunk")) == "snapkv:0.5:when=chunk:chunk=64:window=8"
    assert parse("knorm:0.5:when=chunk") != parse("knorm:0.5")
    assert parse("kvzap:threshold=-4:when=chunk:chunk=9+int4").expanded()["evict"] == {
        "name": "kvzap",
        "amount": None,
        "threshold": -4.0,
        "when": "chunk",
        "chunk": 9,
        "scope": "model",
        "recent": None,
    }
    assert "chunk" in methods.record("knorm")["when"]
    assert "chunk" not in methods.record("h2o")["when"]


def test_it_excludes_training_and_knowing_the_question() -> None:
    with pytest.raises(UserError, match="not supported in training: remove when=chunk"):
        check_trainable(parse("snapkv:0.5:when=chunk").evictor)
    with pytest.raises(UserError, match="evicts before the question is known: use query_aware=false"):
        check_mode(parse("snapkv:0.5:when=chunk"), query_aware=True)
