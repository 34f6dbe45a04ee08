"""Every causal-LM architecture of transformers through the cache: tiny random models against transformers itself."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from lceval.core.errors import UserError
from lceval.models import attention, context_file, selfcheck
from lceval.models.compressed import CompressedContext, QuestionCache
from lceval.models.engine import Engine
from lceval.models.recipe import parse
from lceval.models.reconstruction import Repetition

SERVED = families.SERVED
EVICTING = ["snapkv:0.4:window=8", "adakv:0.4:window=8", "expected_attention:0.4", "kvzip:0.4"]
CONTEXT = 70


@pytest.fixture(scope="module", params=SERVED)
def family(request: pytest.FixtureRequest) -> Any:
    return families.model(request.param)


def engine_of(model: Any, base: Any = None, chunk: int = 0) -> Engine:
    base = base or model
    attention.install(base)
    return Engine(model, base, chunk=chunk, kernels=False, autocast=nullcontext, repetition=Repetition((5,), (7,)))


def token_ids(*shape: int) -> Tensor:
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(sum(shape)))


def compressed(engine: Engine, ids: Tensor, text: str) -> CompressedContext:
    recipe = parse(text)
    engine.check(recipe)
    return engine.prefill(ids.tolist(), recipe.stats_spec).compress(recipe, consume=True)


def eager(model: Any, base: Any, ids: Tensor) -> Tensor:
    base.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [0, 17])
def test_nothing_evicted_is_the_model_as_transformers_runs_it(family: Any, chunk: int) -> None:
    ids = token_ids(1, CONTEXT + 20)
    expected = eager(family, family, ids)[:, CONTEXT:]
    engine = engine_of(family, chunk=chunk)
    context = compressed(engine, ids[0, :CONTEXT], "full")
    cache, parts = context.fork(20), torch.tensor_split(ids[:, CONTEXT:], [7, 8, 9], 1)
    logits = torch.cat([engine.forward(cache, part) for part in parts], 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    if not chunk:
        assert context.kept_bytes == context.full_bytes == transformers_bytes(family, ids[:, :CONTEXT])


def transformers_bytes(model: Any, ids: Tensor) -> int:
    """Bytes of keys, values and states in transformers' own cache."""
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation("eager")
    model(input_ids=ids, cache=cache, use_cache=True)
    total = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            total += layer.keys.nbytes + layer.values.nbytes
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        total += sum(x.nbytes for x in states if x is not None)
    return total


@torch.inference_mode()
def test_rows_over_different_contexts_equal_single_questions(family: Any) -> None:
    engine = engine_of(family)
    if engine.geometry.counts_positions:
        pytest.skip("the model takes positions from the length of the cache: its rows have equal lengths")
    contexts = [compressed(engine, token_ids(n), "full") for n in (60, 33, 71)]
    questions = [token_ids(n).tolist() for n in (9, 4, 1)]
    following = token_ids(3, 3)
    if engine.geometry.has_states:
        caches = [engine.batch([c], [q], 1) for c, q in zip(contexts, questions, strict=True)]
        for cache, question in zip(caches, questions, strict=True):
            if question[:-1]:
                engine.forward(cache, torch.tensor([question[:-1]]))
        cache = QuestionCache.joined(caches, 4)
        together = [engine.forward(cache, torch.tensor([q[-1:] for q in questions]))]
    else:
        cache = engine.batch(contexts, questions, 4)
        together = [engine.forward(cache, torch.tensor([[0] * (9 - len(q)) + q for q in questions]), keep=1)]
    together += [engine.forward(cache, part) for part in following.split(1, 1)]
    for row, (context, question) in enumerate(zip(contexts, questions, strict=True)):
        alone = context.fork(4)
        parts = [torch.tensor([question]), *following[row : row + 1].split(1, 1)]
        for batched, part in zip(together, parts, strict=True):
            expected = engine.forward(alone, part)[:, -1:]
            torch.testing.assert_close(batched[row : row + 1], expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_an_adapter_on_all_linear_layers_is_the_adapter_as_transformers_runs_it(family: Any) -> None:
    torch.manual_seed(3)
    # PEFT refuses an adapter on what a Mamba kernel reads itself, and cannot run one on a router that returns a tuple.
    fused = ["out_proj", "conv1d"] if engine_of(family).geometry.has_states else []
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules="all-linear",
        exclude_modules=["router", *fused],
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # families whose experts are no modules
        adapted = get_peft_model(family, config).eval()
    try:
        ids = token_ids(1, CONTEXT + 9)
        expected = eager(adapted, family, ids)[:, CONTEXT:]
        engine = engine_of(adapted, family)
        cache = compressed(engine, ids[0, :CONTEXT], "full").fork(9)
        torch.testing.assert_close(engine.forward(cache, ids[:, CONTEXT:]), expected, rtol=1e-4, atol=1e-4)
    finally:
        adapted.unload()


@torch.inference_mode()
@pytest.mark.parametrize("text", EVICTING)
def test_an_answer_does_not_attend_to_what_was_evicted(family: Any, text: str) -> None:
    engine, ids = engine_of(family), token_ids(1, CONTEXT + 9)
    if not engine.geometry.full:
        with pytest.raises(UserError, match="has no full-attention layer that"):
            engine.check(parse(text))
        return
    if text.startswith("expected_attention"):
        try:
            engine.check(parse(text))
        except UserError as refusal:
            assert "expected_attention" in str(refusal)  # noqa: PT017
            return
    context = compressed(engine, ids[0, :CONTEXT], text)
    cache = context.fork(9)
    logits = torch.cat([engine.forward(cache, part) for part in torch.tensor_split(ids[:, CONTEXT:], [6, 7], 1)], 1)
    torch.testing.assert_close(logits, masked(family, engine, ids, context), rtol=1e-4, atol=1e-4)
    heads = sum(len(layer.counts) for layer in context.full_attention_layers)
    assert sum(sum(layer.counts) for layer in context.full_attention_layers) == heads * 28


def masked(model: Any, engine: Engine, ids: Tensor, context: CompressedContext) -> Tensor:
    """Logits after the context, in one pass without a cache in which no later token attends to what was evicted."""
    owners: dict[int, int] = {}
    order = [index for index, kind in enumerate(engine.geometry.layers) if kind.attends]

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, scaling: float, **more: Any) -> Any:
        total, kv_heads = q.shape[2], k.shape[1]
        # Layers without keys of their own get the tensor of the layer that they share.
        layer = order[owners.setdefault(id(k), len(owners))]
        keep_alive.append(k)
        kind, at = engine.geometry.layers[layer], torch.arange(total)
        visible = (at <= at[:, None]).repeat(kv_heads, 1, 1)
        if kind.window is not None:
            first = at - at % kind.window if kind.chunked else at - kind.window + 1
            visible &= at >= first[:, None]
        else:
            for head in range(kv_heads):
                dropped = torch.ones(CONTEXT, dtype=torch.bool)
                # All heads share a latent.
                own = 0 if engine.geometry.latent else head
                dropped[context.layers[layer].kept_positions(0, own)] = False  # type: ignore[union-attr]
                visible[head, CONTEXT:, :CONTEXT] &= ~dropped
        group = q.shape[1] // kv_heads
        k, v, visible = (x.repeat_interleave(group, dim) for x, dim in ((k, 1), (v, 1), (visible, 0)))
        logits = q @ k.transpose(2, 3) * scaling
        if more.get("softcap"):
            logits = more["softcap"] * torch.tanh(logits / more["softcap"])
        logits = logits.masked_fill(~visible, -math.inf)
        if more.get("s_aux") is not None:
            logits = torch.cat([logits, more["s_aux"][:, None, None].expand(1, -1, total, 1)], -1)
        return (logits.softmax(-1)[..., :total] @ v).transpose(1, 2).contiguous(), None

    keep_alive: list[Tensor] = []
    AttentionInterface.register("masked", attend)
    model.set_attn_implementation("masked")
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, CONTEXT:]
    finally:
        model.set_attn_implementation(attention.NAME)
    return logits


@torch.inference_mode()
def test_stores_and_sparse_attention_change_little(family: Any) -> None:
    engine, ids = engine_of(family), token_ids(1, CONTEXT + 9)
    if not engine.geometry.full:
        pytest.skip("nothing to compress")
    full = engine.forward(compressed(engine, ids[0, :CONTEXT], "full").fork(9), ids[:, CONTEXT:])
    spread = full.std()
    for text in ("int4:residual=0", "quest:0.5:skip=0:page=4", "fp8"):
        context = compressed(engine, ids[0, :CONTEXT], text)
        logits = engine.forward(context.fork(9), ids[:, CONTEXT:])
        assert 0 < (logits - full).abs().mean() < spread


@torch.inference_mode()
def test_a_saved_context_is_the_context(family: Any, tmp_path: Path) -> None:
    engine, ids = engine_of(family), token_ids(1, CONTEXT + 9)
    recipe = parse("knorm:0.5" if engine.geometry.full else "full")
    context = compressed(engine, ids[0, :CONTEXT], str(recipe))
    context_file.write(tmp_path / "context", context, ids[0, :CONTEXT].tolist(), {})
    opened, _ = context_file.read(tmp_path / "context", {}, recipe.evictor, engine.layer_devices)
    assert (opened.kept_bytes, opened.full_bytes) == (context.kept_bytes, context.full_bytes)
    logits, expected = (engine.forward(one.fork(9), ids[:, CONTEXT:]) for one in (opened, context))
    assert torch.equal(logits, expected)


def test_rounding_to_16_bits_is_no_reason_to_refuse(family: Any) -> None:
    model = copy.deepcopy(family).to(torch.bfloat16)
    # It raises where it refuses.
    selfcheck.verify(engine_of(model), model)
    assert model.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", families.REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line(family: str, dtype: torch.dtype) -> None:
    model = families.model(family).to(dtype)
    with pytest.raises(UserError, match=families.REFUSED[family]) as error:
        selfcheck.verify(engine_of(model), model)
    assert "\n" not in str(error.value)


def test_the_page_on_models_has_every_family(family: Any) -> None:
    assert families.row(family) in families.PAGE.read_text()


def test_most_families_are_served() -> None:
    page = families.PAGE.read_text()
    assert len(families.SERVED) >= 90
    assert f"{len(families.SERVED)} architectures run" in page
    assert (
        f"{len(families.SERVED)} architectures of transformers run"
        in (families.PAGE.parents[1] / "README.md").read_text()
    )
    assert {*families.REFUSED, *families.NOT_BUILT} <= {*families.FAMILIES}
    assert all(f"`{name}`" in page for name in families.FAMILIES)
