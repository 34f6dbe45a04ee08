"""Each model family through the cache: a tiny random model of its architecture against transformers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_models import SHAPE
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lceval.core.errors import UserError
from lceval.models import attention
from lceval.models.compressed import CompressedContext, QuestionCache
from lceval.models.engine import Engine
from lceval.models.geometry import Geometry
from lceval.models.policies import LayerView
from lceval.models.recipe import parse
from lceval.models.reconstruction import Repetition

LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 24, "layer_types": LAYER_TYPES},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": 24},
    "gemma3_text": {"sliding_window": 24, "layer_types": LAYER_TYPES, "query_pre_attn_scalar": 16},
}
RECIPES = ["full", "snapkv:0.5:window=8", "adakv:0.4:of=knorm", "expected_attention:0.5", "h2o:0.5+int8"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    name = request.param
    torch.manual_seed(1)
    config = AutoConfig.for_model(name.removesuffix("-sliding"), **SHAPE, **FAMILIES[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture
def engine(model: Any) -> Any:
    def make(chunk: int = 0) -> Engine:
        model.set_attn_implementation(attention.register())
        return Engine(model, model, chunk=chunk, kernels=False, autocast=nullcontext, repetition=Repetition((5,), (7,)))

    return make


def compressed(engine: Engine, ids: torch.Tensor, text: str) -> CompressedContext:
    recipe = parse(text)
    return engine.prefill(ids.tolist(), recipe.stats_spec).compress(recipe, consume=True)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [0, 17])
def test_nothing_evicted_is_the_model_as_transformers_runs_it(model: Any, engine: Any, chunk: int) -> None:
    ids = torch.randint(0, 99, (1, 100), generator=torch.Generator().manual_seed(2))
    model.set_attn_implementation("eager")
    expected = model(ids, use_cache=False).logits[:, 70:]
    cache = compressed(engine(chunk), ids[0, :70], "full").fork(30)
    parts = [model(part, cache=cache).logits for part in ids[:, 70:].split([13, 1, 1, 15], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=2e-5)


@torch.inference_mode()
def test_a_plain_forward_pass_is_the_model_as_transformers_runs_it(model: Any, engine: Any) -> None:
    ids = torch.randint(0, 99, (2, 60), generator=torch.Generator().manual_seed(2))
    model.set_attn_implementation("eager")
    expected = model(ids, use_cache=False).logits
    engine()
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("text", RECIPES)
def test_rows_over_different_contexts_equal_single_questions(model: Any, engine: Any, text: str) -> None:
    runs = engine()
    contexts = [compressed(runs, torch.randint(0, 99, (n,)), text) for n in (70, 33, 90)]
    owners, lengths = [0, 0, 1, 2], [9, 4, 1, 6]
    questions = [torch.randint(0, 99, (n,)).tolist() for n in lengths]
    following = torch.randint(0, 99, (4, 5))
    cache = runs.batch([contexts[o] for o in owners], questions, 2)
    padded = torch.tensor([[0] * (9 - len(q)) + q for q in questions])
    together = [
        runs.forward(cache, padded, keep=1),
        runs.forward(cache, following[:, :4]),
        runs.forward(cache, following[:, 4:]),
    ]
    for row, (owner, question) in enumerate(zip(owners, questions, strict=True)):
        alone = contexts[owner].fork(2)
        parts = [torch.tensor([question]), following[row : row + 1, :4], following[row : row + 1, 4:]]
        for batched, part in zip(together, parts, strict=True):
            expected = runs.forward(alone, part)
            torch.testing.assert_close(batched[row : row + 1], expected[:, -batched.shape[1] :], rtol=1e-4, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("text", ["streaming:30:when=always", "tova:30:when=always"])
def test_rows_that_evict_while_decoding_equal_single_questions(model: Any, engine: Any, text: str) -> None:
    runs = engine()
    contexts = [compressed(runs, torch.randint(0, 99, (n,)), text) for n in (70, 33)]
    questions = [torch.randint(0, 99, (n,)).tolist() for n in (3, 8)]
    cache = runs.batch(contexts, questions, 3)
    padded = torch.tensor([[0] * (8 - len(q)) + q for q in questions])
    following = torch.randint(0, 99, (2, 3))
    together = [runs.forward(cache, padded, keep=1), *(runs.forward(cache, part) for part in following.split(1, 1))]
    for row, question in enumerate(questions):
        alone = contexts[row].fork(3)
        parts = [torch.tensor([question]), *following[row : row + 1].split(1, 1)]
        for batched, part in zip(together, parts, strict=True):
            expected = runs.forward(alone, part)
            torch.testing.assert_close(batched[row : row + 1], expected[:, -1:], rtol=1e-4, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize(
    "text", ["snapkv:0.4:window=9", "tova:0.4", "h2o:0.4", "expected_attention:0.4", "keydiff:0.4"]
)
def test_query_aware_scores_equal_those_of_context_and_question_in_one_prefill(
    model: Any, engine: Any, text: str
) -> None:
    recipe, runs = parse(text), engine()
    assert recipe.evictor is not None
    ids = torch.randint(0, 99, (70,), generator=torch.Generator().manual_seed(6)).tolist()
    prefill = runs.prefill(ids[:60], recipe.stats_spec)
    cache = runs.prefill_question(prefill, ids[60:], 0)
    context = prefill.compress(recipe, consume=False, question_cache=cache)
    both = runs.prefill(ids, recipe.stats_spec)
    scores = []
    for layer, keys in zip(both.layers, both.keys, strict=True):
        if keys is not None:
            stats = layer.stats
            view = LayerView(
                keys,
                layer.values[:, :, :70],
                torch.zeros(1, 6, 0, 16) if stats.queries is None else stats.queries,
                layer.softmax,
                len(scores),
                len(runs.geometry.full),
                stats.column_sums,
                stats.query_mean,
                stats.query_cov,
                stats.rotary,
            )
            scores.append(recipe.evictor.scores(view)[..., :60])
    for layer, mask in zip(context.full_attention_layers, recipe.evictor.select(scores), strict=True):
        for head in range(2):
            assert torch.equal(layer.kept_positions(0, head), mask[0, head].nonzero().squeeze(-1))
    # No question token is evicted, and its last token can be fed again.
    cache.rebase(context)
    cache.rollback(1)
    assert runs.forward(cache, torch.tensor([ids[69:]])).isfinite().all()
    assert cache.get_seq_length() == 70


@torch.inference_mode()
def test_query_aware_questions_give_the_same_results_batched_and_alone(model: Any, engine: Any) -> None:
    recipe, runs, caches = parse("tova:0.4"), engine(), []
    for tokens, question_tokens in [(70, 9), (70, 4), (33, 1)]:
        prefill = runs.prefill(torch.randint(0, 99, (tokens,)).tolist(), recipe.stats_spec)
        cache = runs.prefill_question(prefill, torch.randint(0, 99, (question_tokens,)).tolist(), 0)
        cache.rebase(prefill.compress(recipe, consume=False, question_cache=cache))
        cache.rollback(1)
        caches.append(cache)
    together, following = QuestionCache.joined(caches, 5), torch.randint(0, 99, (3, 5))
    for part in following.split([4, 1], 1):
        expected = torch.cat([runs.forward(cache, part[row : row + 1]) for row, cache in enumerate(caches)])
        torch.testing.assert_close(runs.forward(together, part), expected, rtol=1e-4, atol=2e-5)


@torch.inference_mode()
def test_a_sliding_window_layer_stores_only_its_window(model: Any, engine: Any) -> None:
    runs = engine(16)
    context = compressed(runs, torch.randint(0, 99, (100,)), "knorm:0.5")
    windows = [kind.window for kind in runs.geometry.layers]
    for window, layer in zip(windows, context.layers, strict=True):
        if window is None:
            assert layer.counts == (50, 50)
        else:
            assert layer.k.shape[2] == window - 1
    full = sum(2 * 2 * 16 * 4 * (100 if w is None else w - 1) for w in windows)
    assert context.full_bytes == full
    if None in windows:
        assert len(context.kept_tokens()) == len(runs.geometry.full)


@torch.inference_mode()
def test_the_moments_of_the_queries_are_those_before_rope(model: Any, engine: Any) -> None:
    """Against hooks on the projections: means over all tokens except the first four."""
    recipe, runs = parse("expected_attention:0.5"), engine(23)
    if not runs.geometry.full:
        pytest.skip("every layer has a sliding window: nothing is compressed")
    ids = torch.randint(0, 99, (80,)).tolist()
    prefill = runs.prefill(ids, recipe.stats_spec)
    index = runs.geometry.full[0]
    attn = model.model.layers[index].self_attn
    seen = {}
    last = getattr(attn, "q_norm", None) or attn.q_proj
    hook = last.register_forward_hook(lambda _m, _i, out: seen.update(q=out))
    try:
        model.set_attn_implementation("eager")
        model(torch.tensor([ids]), use_cache=False)
    finally:
        hook.remove()
    q = seen["q"].view(1, 80, 6, 16) if seen["q"].dim() == 3 else seen["q"]
    q = (q.transpose(1, 2) if q.shape[1] == 80 else q)[:, :, 4:]
    stats = prefill.layers[index].stats
    torch.testing.assert_close(stats.query_mean, q.mean(2), rtol=1e-4, atol=1e-5)
    centred = q - q.mean(2, keepdim=True)
    torch.testing.assert_close(stats.query_cov, centred.transpose(2, 3) @ centred / 76, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("falcon", {"alibi": True}, "ALiBi"),
        ("bloom", {}, "ALiBi"),
        ("mpt", {}, "ALiBi"),
        ("t5", {"d_kv": 16}, "is an encoder-decoder model"),
    ],
)
def test_unsupported_attention_is_refused(name: str, extra: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        shape = {k: v for k, v in SHAPE.items() if k != "head_dim" or name != "falcon"}
        config = AutoConfig.for_model(name, **shape, **extra)
        model = (AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM).from_config(config)
    with pytest.raises(UserError, match=rf"^{name} .*{message}.*: use --model hf"):
        Geometry.of(model)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gpt2", {}),
        ("opt", {"word_embed_proj_dim": 96}),
        ("cohere", {}),
        ("glm", {}),
        ("smollm3", {}),
        ("exaone4", {"sliding_window": 24, "layer_types": LAYER_TYPES}),
    ],
)
def test_expected_attention_is_refused_without_a_rope_that_can_be_inverted(name: str, extra: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SHAPE, "pad_token_id": 0, **extra}))
    with pytest.raises(UserError, match=rf"^expected_attention requires RoPE.*{name} does not.*such as snapkv$"):
        Geometry.of(model).check(parse("adakv:0.5:of=expected_attention").stats_spec)
    Geometry.of(model).check(parse("snapkv:0.5").stats_spec)
