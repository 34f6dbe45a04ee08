"""The compressed cache against full attention with the evicted positions masked."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from scorers import random_pattern, random_scorer
from tiny_models import llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from lceval.kernels import decode, dense, gather_decode, launch, merge, paged, quant_decode, scan, step
from lceval.kernels.paged import PagedKV
from lceval.kernels.rotated import Rotated
from lceval.kernels.softmax import Softmax
from lceval.models import attention
from lceval.models.compressed import CompressedContext
from lceval.models.engine import Engine
from lceval.models.policies import EVICTORS, Amount, Evictor, LayerView
from lceval.models.question import QuestionLayer
from lceval.models.recipe import Recipe, parse
from lceval.models.reconstruction import Repetition
from lceval.models.scorer import Scorer

LAYERS, HEADS, KV_HEADS = 3, 6, 2
EVICTING = [
    "full",
    "snapkv:0.25",
    "snapkv:0.5:window=8:pool=3",
    "snapkv:3",
    "streaming:0.25",
    "streaming:1:sinks=0",
    "adakv:0.5:of=knorm:floor=0.0",
    "pyramidkv:0.5:window=4:beta=3",
    # finch requires a question; tests below have it.
    *(f"{name}:0.3" for name in EVICTORS if name not in ("snapkv", "streaming", "finch")),
    "keydiff:0.3:block=7",
    "lagkv:0.3:lag=16",
    "criticalkv:0.3:of=knorm",
    "kvzap:0.3:scope=layer:recent=9",
    "kvzap:0.3:scope=head",
    "kvzap:threshold=0.2:recent=3",
    "kvzip:threshold=0.05",
    "knorm:threshold=-1.2",
    "keydiff:threshold=0",
    "kvzip:0.3:plus=true",
    "ragged",
]
QUANTIZING = [
    f"{evict}{quantization}"
    for evict in ("", "ragged+", "kvzap:threshold=0.1:recent=70+")
    for quantization in ("int8", "int4:residual=10", "kv8v2", "int4:residual=10:rotate=hadamard", "fp8")
]
LENGTHS = [1, 2, 63, 64, 65, 130]


@pytest.fixture(scope="module")
def tiny() -> Any:
    model = llama(num_hidden_layers=LAYERS)
    model.set_attn_implementation(attention.register())
    return model


class Ragged(Evictor):
    """A test policy: heads and layers keep different counts, one head of each layer keeps nothing."""

    def scores(self, layer: LayerView) -> Tensor:
        return torch.rand(layer.keys.shape[:3], generator=torch.Generator().manual_seed(layer.layer))

    def select(self, scores: Any) -> list[Tensor]:
        masks = [s < 0.2 + 0.2 * layer for layer, s in enumerate(scores)]
        for layer, mask in enumerate(masks):
            mask[:, layer % KV_HEADS] = False
        return masks


def parse_recipe(text: str) -> Recipe:
    """As `parse`, with `ragged` as an additional evictor."""
    if not text.startswith("ragged"):
        return parse(text).bound(scorer().digest, random_pattern(LAYERS, KV_HEADS))
    rest = parse(text.removeprefix("ragged").removeprefix("+") or "full")
    return Recipe(Ragged(amount=Amount(1)), rest.quantizer, rest.sparse_attention)


def scorer() -> Scorer:
    return random_scorer(96, KV_HEADS, LAYERS)


def engine(model: Any, chunk: int = 0) -> Engine:
    built = Engine(
        model, model, chunk=chunk, kernels=launch.INTERPRETED, autocast=nullcontext, repetition=Repetition((5,), (7,))
    )
    built.add_scorer(scorer())
    return built


def compressed(model: Any, ids: Tensor, recipe: Recipe, chunk: int = 0) -> CompressedContext:
    return engine(model, chunk).prefill(ids[0].tolist(), recipe.stats_spec).compress(recipe, consume=True)


def oracle(model: Any, ids: Tensor, context: CompressedContext) -> Tensor:
    """Logits of one plain forward pass in which the question does not attend to evicted positions.

    Written without the cache: eager attention, K and V repeated, evicted positions at -inf for question rows.
    """

    def masked(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any) -> Any:
        length, context_tokens = q.shape[2], context.tokens
        visible = torch.ones(length, length, dtype=torch.bool).tril().repeat(KV_HEADS, 1, 1)
        for head in range(KV_HEADS):
            dropped = torch.ones(context_tokens, dtype=torch.bool)
            dropped[context.layers[module.layer_idx].kept_positions(0, head)] = False
            visible[head, context_tokens:, :context_tokens] &= ~dropped
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
@pytest.mark.parametrize("recipe", EVICTING)
def test_the_answer_is_full_attention_with_evicted_positions_masked(tiny: Any, recipe: str, length: int) -> None:
    ids = torch.randint(0, 99, (1, length + 7), generator=torch.Generator().manual_seed(length))
    context = compressed(tiny, ids[:, :length], parse_recipe(recipe))
    expected = oracle(tiny, ids, context)
    cache = context.fork(7, kernels=launch.INTERPRETED)
    # The question in two steps, then token by token: a chunk over a tail, and decoding.
    parts = [tiny(part, cache=cache).logits for part in ids[:, length:].split([3, 2, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)


KINDS = ["int4", "int2:residual=64", "kv8v4", "ragged+int4:residual=64"]
KINDS += ["fier:0.3:skip=0", "quest:0.3", "quest:0.3:page=4", "snapkv:0.6:window=16+fier:0.3:skip=0"]
KINDS += ["kvzap:threshold=0:recent=20+int4:residual=10", "kvzap:0.6+quest:0.3:skip=0", "int2:rotate=hadamard", "fp8"]
KINDS += ["ragged+fp8"]
STEPS = ["full", "ragged", *KINDS]


@torch.inference_mode()
@pytest.mark.skipif(not launch.INTERPRETED, reason="the next test runs it where Triton interprets its kernels")
@pytest.mark.parametrize("recipe", STEPS)
def test_every_kind_of_context_is_read_through_its_kernel(tiny: Any, recipe: str, monkeypatch: Any) -> None:
    ids = torch.randint(0, 99, (1, 200), generator=torch.Generator().manual_seed(3))
    questions = torch.randint(0, 99, (2, 3), generator=torch.Generator().manual_seed(4))
    context = compressed(tiny, ids, parse_recipe(recipe))
    answers, torch_tokens = [], []
    for kernels in (False, True):
        kinds = {type(layer.kv if isinstance(layer, Rotated) else layer) for layer in context.layers}
        for kind in kinds if kernels else ():
            # Called for everything that has no kernel.
            def attend(kv: Any, q: Tensor, *softmax: Any, original: Any = kind.attend) -> Any:
                torch_tokens.append(q.shape[2])
                return original(kv, q, *softmax)

            monkeypatch.setattr(kind, "attend", attend)
        cache = context.fork(6, kernels=kernels)
        cache.select([0, 0])
        answers.append(torch.cat([tiny(part, cache=cache).logits for part in questions.split([2, 1], 1)], 1))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    # Only sparse attention of several tokens has no kernel.
    assert set(torch_tokens) == ({2} if parse_recipe(recipe).sparse_attention else set())


class Launched:
    """Stands for a kernel and counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.count += 1
        return self.kernel[grid]


@torch.inference_mode()
@pytest.mark.skipif(not launch.INTERPRETED, reason="a test below runs it where Triton interprets its kernels")
@pytest.mark.parametrize(
    ("recipe", "of_step", "of_question"), [("full", 1, 2), ("ragged", 1, 2), ("fp8", 1, 2), ("int4", 1, 4)]
)
def test_the_launches_of_a_question_do_not_depend_on_its_length(
    tiny: Any, recipe: str, of_step: int, of_question: int, monkeypatch: Any
) -> None:
    places = [(decode, "split_kernel"), (merge, "merge_kernel"), (quant_decode, "quant_split_kernel")]
    places.append((step, "step_kernel"))
    kernels = [Launched(getattr(*place)) for place in places]
    for place, kernel in zip(places, kernels, strict=True):
        monkeypatch.setattr(*place, kernel)
    ids = torch.randint(0, 99, (1, 200), generator=torch.Generator().manual_seed(3))
    context, launches = compressed(tiny, ids, parse_recipe(recipe)), []
    # Eleven tokens take three tiles of query heads.
    for tokens in (1, 11):
        before = sum(kernel.count for kernel in kernels)
        tiny(torch.full((1, tokens), 7), cache=context.fork(tokens, kernels=True))
        launches.append(sum(kernel.count for kernel in kernels) - before)
    assert 0 < launches[0] <= of_step * LAYERS
    assert 0 < launches[1] <= of_question * LAYERS


class Waits(TorchDispatchMode):
    """Collects the operations that make the host wait for the device: reading a value, or a shape from values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        mask = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in (args[1] if isinstance(args[1], list) else ())
        )
        if mask or name.startswith(self.NAMES):
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


def test_operations_that_wait_for_the_device_are_detected() -> None:
    with Waits() as waits:
        x = torch.arange(3)
        x[x > 1], x.tolist(), int(x[0]), (x > 1).nonzero()
    assert {*waits.operations} >= {"index", "_local_scalar_dense", "nonzero"}


@torch.inference_mode()
@pytest.mark.skipif(not launch.INTERPRETED, reason="a test below runs it where Triton interprets its kernels")
@pytest.mark.parametrize("recipe", STEPS)
def test_a_step_never_makes_the_host_wait(tiny: Any, recipe: str, monkeypatch: Any) -> None:
    ids = torch.randint(0, 99, (1, 150), generator=torch.Generator().manual_seed(3))
    cache = compressed(tiny, ids, parse_recipe(recipe)).fork(6, kernels=True)
    tiny(torch.tensor([[5, 7, 11]]), cache=cache)
    operations: list[str] = []

    def attend(layer: Any, *args: Any, original: Any = QuestionLayer.attend) -> Any:
        with Waits() as waits:
            o = original(layer, *args)
        operations.extend(waits.operations)
        return o

    monkeypatch.setattr(QuestionLayer, "attend", attend)
    for module in (decode, gather_decode, quant_decode, scan):
        # The checks read values only on a CPU.
        monkeypatch.setattr(module, "_check", lambda *_: None)
    tiny(torch.tensor([[13]]), cache=cache)
    assert operations == []


@pytest.mark.slow
@pytest.mark.skipif(launch.INTERPRETED, reason="runs in the child process of this test")
def test_decoding_through_the_kernels_gives_the_same_results() -> None:
    """The tests above again, in a process where Triton interprets its kernels. (test_devices.py has all evictors.)"""
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
        "(evicted_positions_masked and ragged) or through_its_kernel or of_a_question or host_wait",
    ]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stdout
    assert f"{len(LENGTHS) + 2 * len(STEPS) + 4} passed" in ran.stdout


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 50, 64, 100])
@pytest.mark.parametrize(
    "recipe",
    [
        "full",
        "snapkv:0.25:window=16",
        "h2o:0.3",
        "expected_attention:0.4",
        "kvzip:0.5",
        "kvzap:0.5",
        "kvzip:0.5:plus=true",
        "compactor:0.5:chunk=32",
        "criticalkv:0.5:window=16",
    ],
)
def test_a_chunked_prefill_keeps_the_same_slots_and_values(tiny: Any, recipe: str, chunk: int) -> None:
    ids = torch.randint(0, 99, (1, 130), generator=torch.Generator().manual_seed(5))
    whole, chunked = (compressed(tiny, ids, parse_recipe(recipe), size) for size in (0, chunk))
    for a, b in zip(whole.layers, chunked.layers, strict=True):
        for head in range(KV_HEADS):
            assert torch.equal(a.kept_positions(0, head), b.kept_positions(0, head))
            for x, y in zip(a.head(head), b.head(head), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_forks_are_independent_and_a_rollback_leaves_no_trace(tiny: Any) -> None:
    ids = torch.randint(0, 99, (1, 100))
    context = compressed(tiny, ids[:, :70], parse("snapkv:0.5"))
    one, other = context.fork(4), context.fork(40)
    first = tiny(ids[:, 70:80], cache=one).logits
    tiny(ids[:, 85:100], cache=other)
    other.rollback(15)
    assert other.get_seq_length() == 70
    assert torch.equal(tiny(ids[:, 70:80], cache=other).logits, first)
    assert one.get_seq_length() == other.get_seq_length() == 80


@torch.inference_mode()
def test_rows_over_one_context_equal_single_questions(tiny: Any) -> None:
    ids = torch.randint(0, 99, (1, 70))
    questions = torch.randint(0, 99, (5, 9))
    for recipe in ("streaming:0.5", "ragged", "int4", "fier:0.3", "tova:0.3:when=always"):
        context = compressed(tiny, ids, parse_recipe(recipe))
        cache = context.fork(9)
        cache.select([0] * 5)
        together = tiny(questions, cache=cache).logits
        alone = [tiny(q[None], cache=context.fork(9)).logits for q in questions]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("recipe", EVICTING)
def test_reported_bytes_are_those_of_the_tensors(tiny: Any, recipe: str) -> None:
    context = compressed(tiny, torch.randint(0, 99, (1, 130)), parse_recipe(recipe))
    tensors = [t for p in context.layers for t in (p.k, p.v, p.table, p.lens, p.positions) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert context.allocated_bytes == sum(storages.values())
    slots = sum(int(p.lens.sum()) for p in context.layers)
    slot_bytes = 2 * 16 * 4 + (0 if recipe == "full" else 4)
    assert context.kept_bytes == slots * slot_bytes <= context.allocated_bytes
    assert context.full_bytes == LAYERS * KV_HEADS * 130 * 2 * 16 * 4
    # Ragged heads free whole pages: nothing is padded to the longest head.
    pages = sum(-(-int(n) // paged.PAGE) for p in context.layers for n in p.lens.flatten())
    assert sum(p.k.shape[0] for p in context.layers) == pages


@torch.inference_mode()
@pytest.mark.parametrize("recipe", ["knorm:0.5", "adakv:0.3", "int4:residual=0", "knorm:0.5+int8", "fier:0.2:skip=0"])
def test_compressing_needs_one_layer_beyond_the_dense_context(tiny: Any, recipe: str) -> None:
    context = compressed(tiny, torch.randint(0, 99, (1, 256)), parse_recipe(recipe))
    one_layer = context.full_bytes // LAYERS
    assert context.full_bytes < context.peak_bytes <= context.full_bytes + 1.1 * one_layer
    kept = compressed(tiny, torch.randint(0, 99, (1, 256)), parse_recipe("full"))
    assert kept.peak_bytes == kept.full_bytes


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 65, 300])
@pytest.mark.parametrize("recipe", QUANTIZING)
def test_attention_over_a_quantized_context_is_that_over_its_dequantized_slots(
    tiny: Any, recipe: str, length: int
) -> None:
    ids = torch.randint(0, 99, (1, length + 6), generator=torch.Generator().manual_seed(length))
    context = compressed(tiny, ids[:, :length], parse_recipe(recipe))
    cache = context.fork(6)
    parts = [tiny(part, cache=cache).logits for part in ids[:, length:].split([4, 1, 1], 1)]
    dequantized = [[layer.head(h) for h in range(KV_HEADS)] for layer in context.layers]

    def eager(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any) -> Any:
        outs = []
        for head in range(q.shape[1]):
            kv_head = head * KV_HEADS // q.shape[1]
            past_k, past_v = dequantized[module.layer_idx][kv_head]
            logits = q[0, head] @ torch.cat([past_k, k[0, kv_head]]).T * scaling
            logits = logits.masked_fill(torch.ones_like(logits).triu(len(past_k) + 1).bool(), -math.inf)
            outs.append(logits.softmax(-1) @ torch.cat([past_v, v[0, kv_head]]))
        return torch.stack(outs, 1)[None], None

    AttentionInterface.register("eager-over-codes", eager)
    tiny.set_attn_implementation("eager-over-codes")
    try:
        positions = torch.arange(length, length + 6)[None]
        expected = tiny(ids[:, length:], position_ids=positions, use_cache=False).logits
    finally:
        tiny.set_attn_implementation(attention.NAME)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(
    "sparse_attention", ["fier:1.0:skip=0", "quest:1.0:skip=0", "retrieval:1.0", "retrieval:1.0:index=exact"]
)
def test_sparse_attention_with_the_whole_budget_is_dense(tiny: Any, sparse_attention: str) -> None:
    ids = torch.randint(0, 99, (1, 150))
    for base in ("full", "knorm:0.5", "ragged", "int4:residual=32"):
        sparse, dense = parse_recipe(f"{base}+{sparse_attention}"), parse_recipe(base)
        logits = [
            tiny(ids[:, 140:], cache=compressed(tiny, ids[:, :140], recipe).fork(10)).logits
            for recipe in (sparse, dense)
        ]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(
    "recipe", ["streaming:40:when=always", "tova:40:when=always", "h2o:40:when=always", "lacache:40:when=always"]
)
def test_evicting_while_decoding_keeps_the_budget_and_attends_to_the_kept_slots(tiny: Any, recipe: str) -> None:
    ids = torch.randint(0, 99, (1, 120), generator=torch.Generator().manual_seed(3))
    context = compressed(tiny, ids[:, :100], parse(recipe))
    cache = context.fork(20)
    for at in range(100, 120):
        logits = tiny(ids[:, at : at + 1], cache=cache).logits
        assert logits.isfinite().all()
        for layer in cache.layers:
            assert layer.slots[0].k.shape[2] <= 40
            # Every slot has the key of its position: the newest is the token just processed.
            assert (layer.slots[0].positions[..., -1] == at).all()
    assert cache.get_seq_length() == 120
    # With a budget above the length nothing is evicted, and the result is full attention.
    roomy = compressed(tiny, ids[:, :100], parse(recipe.replace("40", "500"))).fork(20)
    parts = [tiny(part, cache=roomy).logits for part in ids[:, 100:].split([10, 5, 5], 1)]
    full = tiny(ids[:, 100:], cache=compressed(tiny, ids[:, :100], parse("full")).fork(20)).logits
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_streaming_while_decoding_is_a_window_with_sinks(tiny: Any) -> None:
    """Against one forward pass whose rows attend to the sinks and the last 36 positions before them."""
    ids = torch.randint(0, 99, (1, 90), generator=torch.Generator().manual_seed(4))
    cache = compressed(tiny, ids[:, :60], parse("streaming:40:when=always")).fork(30)
    parts = [tiny(part, cache=cache).logits for part in ids[:, 60:].split(1, 1)]
    row, column = torch.arange(90)[:, None], torch.arange(90)
    # A step attends to 40 slots and its own token; the context was prefilled with full attention.
    seen = (column <= row) & ((column < 4) | (column >= row - 36) | (row < 60))

    def masked(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        weights = (q @ k.transpose(2, 3) * scaling).masked_fill(~seen, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2), None

    AttentionInterface.register("window-with-sinks", masked)
    tiny.set_attn_implementation("window-with-sinks")
    try:
        expected = tiny(ids, use_cache=False).logits[:, 60:]
    finally:
        tiny.set_attn_implementation(attention.NAME)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)


def test_kept_slots_have_the_keys_and_values_of_their_positions() -> None:
    k, v = torch.randn(2, 3, 100, 8), torch.randn(2, 3, 100, 8)
    keep = torch.rand(2, 3, 100) < torch.tensor([0.0, 0.3, 1.0])[None, :, None]
    kv = PagedKV.gather(k, v, keep)
    for b in range(2):
        for h in range(3):
            kept = keep[b, h].nonzero().squeeze(-1)
            assert torch.equal(kv.kept_positions(b, h), kept)
            kept_k, kept_v = kv.head(b * 3 + h)
            assert torch.equal(kept_k, k[b, h, kept])
            assert torch.equal(kept_v, v[b, h, kept])
            pages = kv.table[b, h, : -(-len(kept) // paged.PAGE)].long()
            assert torch.equal(kv.k[pages].flatten(0, 1)[: len(kept)], kept_k)


def test_splitting_the_keys_and_merging_equals_the_whole() -> None:
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 90, 8), torch.randn(1, 2, 90, 8)
    keep = torch.zeros(1, 2, 90, dtype=torch.bool)
    keep[:, :, :37] = True
    a, b = (paged.attend(q, PagedKV.gather(k, v, part), 0.3) for part in (keep, ~keep))
    whole, lse = paged.attend(q, PagedKV.gather(k, v, torch.ones_like(keep)), 0.3)
    torch.testing.assert_close(dense.merge(*a, *b), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.logaddexp(a[1], b[1]), lse)


def test_an_empty_head_gives_zeros_and_minus_infinity() -> None:
    k = torch.randn(1, 2, 10, 8)
    keep = torch.zeros(1, 2, 10, dtype=torch.bool)
    keep[:, 0] = True
    o, lse = paged.attend(torch.randn(1, 6, 3, 8), PagedKV.gather(k, k, keep), 1.0)
    assert o[:, 3:].eq(0).all()
    assert lse[:, 3:].eq(-math.inf).all()
    assert lse[:, :3].isfinite().all()


@pytest.mark.parametrize("bias", [0.0, 300.0])
@pytest.mark.parametrize(("dtype", "of_o"), [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
def test_attention_on_a_cpu_keeps_large_logits_apart_in_16_bits(dtype: torch.dtype, of_o: float, bias: float) -> None:
    """Keys of Qwen2.5 have biases of hundreds, which leave a 16-bit logit no decimals."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 64, generator=rng) for n in (3, 200, 200))
    k[..., 5] += bias
    q, k, v = (x.to(dtype) for x in (q, k, v))
    logits = (q.double() @ k.double().mT) / 8
    for o, lse in (
        paged.attend(q, PagedKV.gather(k, v, torch.ones(1, 2, 200, dtype=torch.bool)), 0.125),
        dense.attend_causal(q[:, :, :1], k, v, Softmax(0.125)),
    ):
        rows = o.shape[2]
        torch.testing.assert_close(o.double(), (logits.softmax(-1) @ v.double())[:, :, :rows], rtol=0, atol=of_o)
        torch.testing.assert_close(lse.double(), logits.logsumexp(-1)[:, :, :rows], rtol=1e-5, atol=1e-4)


def test_long_questions_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 6, 50, 8), torch.randn(1, 2, 90, 8)
    kv = PagedKV.gather(k, k, torch.ones(1, 2, 90, dtype=torch.bool))
    # With a cap: without one, a CPU has a fused attention.
    whole = paged.attend(q, kv, 1.0, 9.0)
    monkeypatch.setattr(dense, "MAX_SCORES", 1000)
    for blocks, expected in zip(paged.attend(q, kv, 1.0, 9.0), whole, strict=True):
        torch.testing.assert_close(blocks, expected)
