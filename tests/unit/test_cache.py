"""The compressed cache against full attention with the dropped positions masked away."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from lceval.kernels import decode, paged
from lceval.kernels.paged import PagedKV
from lceval.models import attention
from lceval.models.cache import Context, Prefill
from lceval.models.policies import Evictor, LayerView
from lceval.models.recipe import Recipe, parse

LAYERS, HEADS, KV_HEADS = 3, 6, 2
RECIPES = [
    "full",
    "snapkv:0.25",
    "snapkv:0.5:window=8:pool=3",
    "snapkv:3",
    "streaming:0.25",
    "streaming:1:sinks=0",
]
LENGTHS = [1, 2, 63, 64, 65, 130]


@pytest.fixture(scope="module")
def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention.register())
    return model


class Ragged(Evictor):
    """A policy for tests alone: heads and layers keep different counts, one head of each layer nothing."""

    def keep(self, layer: LayerView) -> Tensor:
        length = layer.keys.shape[2]
        generator = torch.Generator().manual_seed(layer.layer)
        keep = torch.rand(1, KV_HEADS, length, generator=generator) < 0.2 + 0.2 * layer.layer
        keep[:, layer.layer % KV_HEADS] = False
        return keep


def read(model: Any, ids: Tensor, recipe: Recipe, chunk: int = 0) -> Context:
    prefill = Prefill(LAYERS, ids.shape[1], recipe.queries_needed)
    for part in ids.split(chunk or ids.shape[1], 1):
        model.model(part, past_key_values=prefill, use_cache=True)
    return prefill.compress(recipe, consume=True)


def oracle(model: Any, ids: Tensor, context: Context) -> Tensor:
    """Logits of one plain forward pass in which the question cannot see what the context dropped.

    Written without the cache: eager attention, K and V repeated, dropped positions at -inf for question rows.
    """

    def masked(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any) -> Any:
        length, read_tokens = q.shape[2], context.tokens
        visible = torch.ones(length, length, dtype=torch.bool).tril().repeat(KV_HEADS, 1, 1)
        for head in range(KV_HEADS):
            dropped = torch.ones(read_tokens, dtype=torch.bool)
            dropped[context.layers[module.layer_idx].kept_positions(0, head)] = False
            visible[head, read_tokens:, :read_tokens] &= ~dropped
        group = q.shape[1] // KV_HEADS
        k, v, visible = (x.repeat_interleave(group, dim) for x, dim in ((k, 1), (v, 1), (visible, 0)))
        logits = (q @ k.transpose(2, 3) * scaling).masked_fill(~visible, -math.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2), None

    AttentionInterface.register("oracle", masked)
    model.set_attn_implementation("oracle")
    try:
        logits: Tensor = model(ids, use_cache=False).logits[:, context.tokens :]
    finally:
        model.set_attn_implementation(attention.NAME)
    return logits


@torch.inference_mode()
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("recipe", [*RECIPES, "ragged"])
def test_the_answer_is_full_attention_with_dropped_positions_masked(tiny: Any, recipe: str, length: int) -> None:
    ids = torch.randint(0, 99, (1, length + 7), generator=torch.Generator().manual_seed(length))
    how = Recipe(Ragged(amount=parse("streaming:0.5").evictor.amount)) if recipe == "ragged" else parse(recipe)  # type: ignore[union-attr]
    context = read(tiny, ids[:, :length], how)
    expected = oracle(tiny, ids, context)
    cache = context.fork(7, kernels=decode.INTERPRETED)
    # The question in two steps, then token by token: a chunk over a tail, and decoding.
    parts = [tiny(part, past_key_values=cache).logits for part in ids[:, length:].split([3, 2, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(decode.INTERPRETED, reason="this is the test's own child process")
def test_decoding_through_the_kernels_is_the_same() -> None:
    """The test above again, in a process where Triton interprets its kernels."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "dropped_positions_masked",
    ]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stdout
    assert f"{(len(RECIPES) + 1) * len(LENGTHS)} passed" in ran.stdout


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 50, 64, 100])
@pytest.mark.parametrize("recipe", ["full", "snapkv:0.25:window=16"])
def test_a_chunked_prefill_keeps_the_same_slots_and_values(tiny: Any, recipe: str, chunk: int) -> None:
    ids = torch.randint(0, 99, (1, 130), generator=torch.Generator().manual_seed(5))
    whole, chunked = read(tiny, ids, parse(recipe)), read(tiny, ids, parse(recipe), chunk)
    for a, b in zip(whole.layers, chunked.layers, strict=True):
        for head in range(KV_HEADS):
            assert torch.equal(a.kept_positions(0, head), b.kept_positions(0, head))
            for x, y in zip(a.head(head), b.head(head), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_forks_do_not_see_each_other_and_a_rollback_leaves_no_trace(tiny: Any) -> None:
    ids = torch.randint(0, 99, (1, 100))
    context = read(tiny, ids[:, :70], parse("snapkv:0.5"))
    one, other = context.fork(4), context.fork(40)
    first = tiny(ids[:, 70:80], past_key_values=one).logits
    tiny(ids[:, 85:100], past_key_values=other)
    other.rollback(15)
    assert other.get_seq_length() == 70
    assert torch.equal(tiny(ids[:, 70:80], past_key_values=other).logits, first)
    assert one.get_seq_length() == other.get_seq_length() == 80


@torch.inference_mode()
def test_rows_over_one_context_equal_single_questions(tiny: Any) -> None:
    ids = torch.randint(0, 99, (1, 70))
    questions = torch.randint(0, 99, (5, 9))
    for recipe in (parse("streaming:0.5"), Recipe(Ragged(amount=parse("streaming:0.5").evictor.amount))):  # type: ignore[union-attr]
        context = read(tiny, ids, recipe)
        together = tiny(questions, past_key_values=context.fork(9)).logits
        alone = [tiny(q[None], past_key_values=context.fork(9)).logits for q in questions]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("recipe", [*RECIPES, "ragged"])
def test_reported_bytes_are_those_of_the_tensors(tiny: Any, recipe: str) -> None:
    how = Recipe(Ragged(amount=parse("streaming:0.5").evictor.amount)) if recipe == "ragged" else parse(recipe)  # type: ignore[union-attr]
    context = read(tiny, torch.randint(0, 99, (1, 130)), how)
    tensors = [t for p in context.layers for t in (p.k, p.v, p.table, p.lens, p.positions) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert context.allocated_bytes == sum(storages.values())
    slots = sum(int(p.lens.sum()) for p in context.layers)
    slot_bytes = 2 * 16 * 4 + (0 if recipe == "full" else 4)
    assert context.kept_bytes == slots * slot_bytes <= context.allocated_bytes
    assert context.full_bytes == LAYERS * KV_HEADS * 130 * 2 * 16 * 4
    # Ragged heads free pages for real: nothing is padded to the longest head.
    pages = sum(-(-int(n) // paged.PAGE) for p in context.layers for n in p.lens.flatten())
    assert sum(p.k.shape[0] for p in context.layers) == pages


def test_kept_slots_come_from_the_positions_they_name() -> None:
    k, v = torch.randn(2, 3, 100, 8), torch.randn(2, 3, 100, 8)
    keep = torch.rand(2, 3, 100) < torch.tensor([0.0, 0.3, 1.0])[None, :, None]
    kv = PagedKV.gather(k, v, keep)
    for b in range(2):
        for h in range(3):
            kept = keep[b, h].nonzero().squeeze(-1)
            assert torch.equal(kv.kept_positions(b, h), kept)
            ours_k, ours_v = kv.head(b * 3 + h)
            assert torch.equal(ours_k, k[b, h, kept])
            assert torch.equal(ours_v, v[b, h, kept])
            pages = kv.table[b, h, : -(-len(kept) // paged.PAGE)].long()
            assert torch.equal(kv.k[pages].flatten(0, 1)[: len(kept)], ours_k)


def test_splitting_the_keys_and_merging_equals_the_whole() -> None:
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 90, 8), torch.randn(1, 2, 90, 8)
    keep = torch.zeros(1, 2, 90, dtype=torch.bool)
    keep[:, :, :37] = True
    a, b = (paged.attend(q, PagedKV.gather(k, v, part), 0.3) for part in (keep, ~keep))
    whole, lse = paged.attend(q, PagedKV.gather(k, v, torch.ones_like(keep)), 0.3)
    torch.testing.assert_close(paged.merge(*a, *b), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.logaddexp(a[1], b[1]), lse)


def test_an_empty_head_gives_zeros_and_minus_infinity() -> None:
    k = torch.randn(1, 2, 10, 8)
    keep = torch.zeros(1, 2, 10, dtype=torch.bool)
    keep[:, 0] = True
    o, lse = paged.attend(torch.randn(1, 6, 3, 8), PagedKV.gather(k, k, keep), 1.0)
    assert o[:, 3:].eq(0).all()
    assert lse[:, 3:].eq(-math.inf).all()
    assert lse[:, :3].isfinite().all()


def test_long_questions_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 6, 50, 8), torch.randn(1, 2, 90, 8)
    kv = PagedKV.gather(k, k, torch.ones(1, 2, 90, dtype=torch.bool))
    whole = paged.attend(q, kv, 1.0)
    monkeypatch.setattr(paged, "MAX_SCORES", 1000)
    for ours, expected in zip(paged.attend(q, kv, 1.0), whole, strict=True):
        torch.testing.assert_close(ours, expected)
