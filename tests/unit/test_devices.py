"""Contexts, questions and diagnoses on accelerators that are pretended (tests/fake_devices.py), under every method.

Where Triton interprets its kernels (a child process of the last test), the pretended run goes through them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_devices import FIRST, SECOND, DeviceError, FakeDevices, place, spread
from scorers import random_pattern, random_scorer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import Qwen2Config, Qwen2ForCausalLM

from lceval.kernels import launch
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.softmax import Softmax
from lceval.models import attention, context_file
from lceval.models.bounded import BoundedKV, BoundedLayer
from lceval.models.diagnosis import Diagnosis, question_attention
from lceval.models.engine import Engine
from lceval.models.policies import EVICTORS, SPARSE_ATTENTION, Evictor, retrieval
from lceval.models.prefix import Job
from lceval.models.question import QuestionLayer, Rows
from lceval.models.recipe import parse
from lceval.models.reconstruction import Repetition
from lceval.models.scorer import Scorer

STEPPING = [f"{name}:40:when=always" for name in ("streaming", "lacache", "h2o", "tova")]
SPARSE = [f"{name}:0.2:skip=0" for name in SPARSE_ATTENTION]
WINDOWED = ("snapkv", "pyramidkv", "adakv", "criticalkv", "chunkkv")
RECIPES = [
    "full",
    *(
        f"{name}:0.4" + (":window=16" if name in ("snapkv", "pyramidkv", "adakv") else "")
        for name in EVICTORS
        if name != "finch"
    ),
    "kvzap:threshold=0.1:recent=5",
    "kvzip:0.4:plus=true",
    "keydiff:0.4:block=16",
    *(f"{name}:residual=10" for name in ("int8", "int4", "int2", "kv8v4")),
    *("int4:residual=10:rotate=hadamard", "fp8"),
    *("snapkv:0.9:window=16+int4:residual=10", "adakv:0.9:of=knorm+int2:residual=10"),
    *SPARSE,
    *("retrieval:0.2:index=exact", "int4:residual=10+fier:0.3:skip=0", "adakv:0.8:of=knorm+quest:0.2:skip=0:page=4"),
    *STEPPING,
]
# Recipes whose kernels are those of another one: under the interpreter that one runs.
SAME_KERNELS = ("streaming", "lacache", "keydiff", "kvzip", "lagkv", "rkv", "compactor", "duo", "random", "chunkkv")
SAME_KERNELS += ("expected_attention", "criticalkv", "kvzap:0.4", "int8", "kv8v4", "tova", "pyramidkv", "knorm")
SAME_KERNELS += ("retrieval:0.2:index", "int4:residual=10+fier")
KERNEL_RECIPES = [recipe for recipe in RECIPES if not recipe.startswith(SAME_KERNELS)]
CONTEXTS, QUESTIONS, STEPS = (100, 80), ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3]), ([8, 9, 7], [9, 3, 2])


def build() -> Any:
    """Full-attention and sliding-window layers with random weights, attention ours."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=99,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=24,
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )
    model = Qwen2ForCausalLM(config).eval()
    model.set_attn_implementation(attention.register())
    return model


def engine_of(model: Any, *, kernels: bool = False) -> Engine:
    engine = Engine(model, model, chunk=60, kernels=kernels, autocast=nullcontext, repetition=Repetition((5,), (7,)))
    engine.add_scorer(scorer())
    # `Module.to` moves parameters where FakeDevices does not see it.
    for module, layer in zip(engine.scorers[scorer().digest].layers, (0, 2), strict=True):
        for x in module.parameters():
            x._fake_device = place(next(model.model.layers[layer].parameters()))
    return engine


def scorer() -> Scorer:
    return random_scorer(96, 2, 2)


def context_ids(tokens: int) -> list[int]:
    return torch.randint(0, 99, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def padded(engine: Engine, rows: Any) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(row)) + [*row] for row in rows], device=engine.device)


@torch.inference_mode()
def everything(engine: Engine, text: str, file: Path | None = None) -> list[Tensor]:
    """What lcft computes under a recipe, on the CPU: logits of padded questions over two contexts and of steps, the
    gold answer's likelihood, gold slots kept, the question's attention, and a query-aware question's logits.

    file: where the first context is saved and opened before it is used."""
    recipe = parse(text).bound(scorer().digest, random_pattern(2, 2))
    spec = recipe.stats_spec | Diagnosis("attention", None, str.encode).stats_spec
    prefills = [engine.prefill(context_ids(tokens), spec) for tokens in CONTEXTS]
    one, two = (prefill.compress(recipe, consume=False) for prefill in prefills)
    if file is not None:
        context_file.write(file, one, context_ids(CONTEXTS[0]), {})
        one, _ = context_file.read(file, {}, recipe.evictor, engine.layer_devices)
    cache = engine.batch([one, one, two], QUESTIONS, 4)
    results = [engine.forward(cache, padded(engine, QUESTIONS), keep=1)]
    probe = cache.fork()
    results += [engine.forward(cache, padded(engine, [[token] for token in step])) for step in STEPS]

    jobs = [Job(i, (1, 2), 1, has_context=True, prompt="A:", doc={"answers": ["b" * (i + 1)]}) for i in range(3)]
    gold = Diagnosis("gold", None, lambda text: [ord(c) % 99 for c in text])
    results += [torch.tensor(x["gold_nll"]) for x in gold.of_answers(jobs, engine, probe, [[7], [8], [9]])]
    results.append(torch.tensor(one.kept_share_of(torch.arange(CONTEXTS[0]) < 40)))

    question = engine.prefill_question(prefills[0], QUESTIONS[0], 4)
    results.append(question_attention(prefills[0], question, 5))
    if isinstance(recipe.evictor, Evictor) and text not in STEPPING:
        question.rebase(prefills[0].compress(recipe, consume=False, question_cache=question))
        question.rollback(1)
        results.append(engine.forward(question, padded(engine, [QUESTIONS[0][-1:]])))
    return [x.cpu() for x in results]


def test_a_tensor_of_another_device_is_refused_and_traffic_is_seen() -> None:
    with FakeDevices() as devices:
        x, y = torch.arange(4, device=FIRST), torch.arange(4)
        for wrong in (
            lambda: x + y,
            lambda: y[x],
            lambda: torch.stack([x, x.to(SECOND)]),
            lambda: torch.arange(4, device=SECOND).masked_fill(x > 1, 0),
        ):
            with pytest.raises(DeviceError):
                wrong()
        devices.traffic.clear()
        assert (x + 1)[None].T.device == (x * torch.tensor(2)).device == torch.zeros_like(x).device == FIRST
        assert not devices.traffic
        x[y], x.tolist(), int(x[0]), x[x > 1], torch.tensor([1], device=FIRST), x.cpu(), x[[1, 2]]
        x[:] = y
        assert len(devices.traffic) == 8


@pytest.mark.parametrize("recipe", KERNEL_RECIPES if launch.INTERPRETED else RECIPES)
def test_everything_stays_on_its_device_and_equals_the_cpu(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(retrieval, "SMALL", 50)  # so that faiss takes part
    expected = everything(engine_of(build()), recipe)
    with FakeDevices():
        engine = engine_of(spread(build(), (FIRST, SECOND)), kernels=launch.INTERPRETED)
        actual = everything(engine, recipe, tmp_path / "context.safetensors")
    # Equal but for the kernels, which sum in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r not in SPARSE or "retrieval" not in r])
def test_a_step_moves_nothing_between_host_and_device(recipe: str) -> None:
    """Rows of two contexts, questions of three lengths, sliding layers. (faiss searches on the CPU: left out.)"""
    with FakeDevices() as devices:
        engine, kv = engine_of(spread(build(), (FIRST,))), parse(recipe).bound(scorer().digest, random_pattern(2, 2))
        one, two = (engine.prefill(context_ids(n), kv.stats_spec).compress(kv, consume=True) for n in CONTEXTS)
        cache = engine.batch([one, one, two], QUESTIONS, 4)
        inputs = [padded(engine, QUESTIONS), *(padded(engine, [[token] for token in step]) for step in STEPS)]
        traffic = []
        for ids in inputs:
            devices.traffic.clear()
            engine.forward(cache, ids, keep=1)
            traffic.append([*devices.traffic])
    # Once a batch, not once a layer: padding and positions.
    assert len([x for x in traffic[0] if x.startswith("tensor")]) <= 2
    assert traffic[1:] == [[], []]


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("stepping", [False, True])
def test_bfloat16_over_large_key_biases_is_as_precise_as_sdpa(tokens: int, stepping: bool) -> None:
    """Keys with outlier channels as those of Qwen2.5: logits of hundreds, which bfloat16 rounds to whole numbers."""
    generator, seen, dim = torch.Generator().manual_seed(tokens), 5 * PAGE, 64
    q, k, v = (torch.randn(1, heads, seen + tokens, dim, generator=generator) for heads in (8, 2, 2))
    k[..., ::16] += 40
    q, k, v = (x.bfloat16() for x in (q[:, :, seen:], k, v))
    kv, rows = PagedKV.full(*(x[:, :, :seen].contiguous() for x in (k, v)), seen), Rows((0,), (seen,))
    layer: Any = QuestionLayer([kv], rows, tokens, kernels=False)
    if stepping:
        evictor: Any = parse("streaming:1000:when=always").evictor
        layer = BoundedLayer([BoundedKV(kv, evictor, torch.zeros(1, 2, seen), 1000, 0, 1, seen)], rows)
    layer.update(k[:, :, seen:], v[:, :, seen:])
    mask = torch.ones(tokens, seen + tokens, dtype=torch.bool).tril(seen)
    exact, sdpa = (
        F.scaled_dot_product_attention(*(x.to(dtype) for x in (q, k, v)), attn_mask=mask, enable_gqa=True).double()
        for dtype in (torch.float64, torch.bfloat16)
    )
    ours = layer.attend(q, Softmax(dim**-0.5)).double()
    assert (ours - exact).norm() <= 2 * (sdpa - exact).norm()


@pytest.mark.slow
@pytest.mark.skipif(launch.INTERPRETED, reason="runs in the child process of this test")
def test_everything_through_the_kernels_equals_pytorch() -> None:
    """The tests above again, in a process where Triton interprets its kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "equals_the_cpu"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stdout
    assert f"{len(KERNEL_RECIPES)} passed" in ran.stdout
