"""Every KV recipe through the engine: its logits against those of the same model in a wider dtype over the same slots.

The yardstick is the error of transformers' own SDPA in the weights' dtype over the same full cache, so a bound says
how many times worse than SDPA a recipe may compute. What a recipe drops is no error: both sides read the slots that it
kept.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from recording import LeftOutError, bounded
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from workload import (
    KEY_BIAS,
    OUTLIER,
    OUTLIER_EVERY,
    Setup,
    build_model,
    random_layer,
    random_queries,
    relative_error,
    token_ids,
)

from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.paged import PAGE, PagedKV
from lceval.kernels.quant import QuantKV
from lceval.kernels.rotated import Rotated
from lceval.kernels.select import Selective
from lceval.kernels.softmax import Softmax
from lceval.models.policies import EVICTORS, SPARSE_ATTENTION
from lceval.models.recipe import Recipe, parse

QUESTION, STEP = token_ids(12, seed=1), 3
RECIPES = (
    "full",
    # finch requires a question, duo a pattern of heads.
    *(f"{name}:0.25" for name in EVICTORS if name not in ("finch", "duo")),
    *("int8", "int4", "int2", "kv8v4", "fp8", "int4:rotate=hadamard"),
    *("snapkv:0.25+int4:residual=64", "adakv:0.25+int2:residual=64"),
    *(f"{name}:0.1" for name in SPARSE_ATTENTION),
    *("fier:0.1:skip=0", "retrieval:0.1:index=exact", "snapkv:0.5+quest:0.1:skip=0", "int4+fier:0.1:skip=0"),
    "h2o:256:when=always",
)
# Times the error of SDPA, and a floor for float32, where both are rounding alone (measured 2e-6 in a dry run).
EXACT_FACTOR, FLOOR = 2.0, 1e-5
# Kernels fold scales into 16-bit queries, and close units may be chosen differently. No GPU has measured it yet.
ROUNDED_FACTOR = 10.0
# Of the slots that the PyTorch path keeps, at most this share may differ: ties within rounding.
MOVED_SLOTS = 0.01


class EngineChecks:
    """The checks share one model, which is built when the first of them needs it."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def checks(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Name and function of each check."""
        for tokens in (len(QUESTION), 1):
            yield f"error attention over key biases, {tokens} tokens", partial(self._attention, tokens)
        yield "error SDPA", self._sdpa
        for recipe in RECIPES:
            yield f"recipe {recipe}", partial(self._recipe, recipe)
        yield "gold kept (diagnose)", self._gold_kept
        yield "rows of two contexts, padded", self._padded_rows
        yield "query-aware snapkv:0.25", self._query_aware

    @cached_property
    def model(self) -> Any:
        """Random weights, Qwen2.5-7B's shape, attention ours."""
        from lceval.models import attention

        model = build_model(self.setup)
        model.set_attn_implementation(attention.register())
        return model

    @cached_property
    def wide_model(self) -> Any:
        """The same weights in a wider dtype."""
        return copy.deepcopy(self.model).to(self.setup.wide)

    def engine(self, *, chunk_tokens: int = 0, kernels: bool = True, wide: bool = False) -> Any:
        """An engine over the model."""
        from lceval.models.engine import Engine
        from lceval.models.reconstruction import Repetition

        model = self.wide_model if wide else self.model
        engine = Engine(
            model, model, chunk=chunk_tokens, kernels=kernels, autocast=nullcontext, repetition=Repetition((5,), (7,))
        )
        engine.add_scorer(copy.deepcopy(self.scorer))
        return engine

    @cached_property
    def scorer(self) -> Any:
        """Random linear maps from the attention inputs to scores."""
        from lceval.models.scorer import Scorer

        config = self.model.config
        torch.manual_seed(0)
        scorer = Scorer(config.hidden_size, config.num_key_value_heads, config.num_hidden_layers)
        assert scorer.digest  # computed before the copies are converted
        return scorer.requires_grad_(False)

    def forget_wide(self) -> None:
        """Free the wide model: 28 GiB on CUDA."""
        self.__dict__.pop("wide_model", None)
        self.setup.free()

    @cached_property
    def context_ids(self) -> list[int]:
        """The context that every recipe compresses."""
        return token_ids(self.setup.recipe_tokens)

    @cached_property
    def sdpa_error(self) -> float:
        """Relative error of SDPA's logits over a prefilled cache: question and step in the weights' dtype."""
        layers = self.engine().prefill(self.context_ids, Recipe().stats_spec).layers
        cache = [(layer.keys[:, :, : layer.seen], layer.values[:, :, : layer.seen]) for layer in layers]
        logits, exact = (self._by_transformers(model, cache) for model in (self.model, self.wide_model))
        return relative_error(logits, exact)

    @cached_property
    def wide_logits(self) -> Tensor:
        """[2, V]: transformers in the wider dtype, prefill and all."""
        return self._by_transformers(self.wide_model)

    @cached_property
    def end_to_end_error(self) -> float:
        """Relative error of transformers' logits in the weights' dtype, prefill and all."""
        return relative_error(self._by_transformers(self.model), self.wide_logits)

    @torch.inference_mode()
    def _by_transformers(self, model: Any, prefilled: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """[2, V] logits by SDPA: after the question and after one step, over `prefilled` or the context's tokens."""
        from transformers import DynamicCache

        from lceval.models import attention

        cache, logits = DynamicCache(config=model.config), []
        for index, kv in enumerate(prefilled):
            cache.update(*(x.to(model.dtype, copy=True) for x in kv), index)
        model.set_attn_implementation("sdpa")
        try:
            for ids in ([*([] if prefilled else self.context_ids), *QUESTION], [STEP]):
                ids = torch.tensor([ids], device=self.setup.device)
                logits.append(model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1])
        finally:
            model.set_attn_implementation(attention.NAME)
        return torch.stack(logits)

    def _answer(self, engine: Any, context: Any) -> Tensor:
        """[2, V] logits: after the question and after one step over a compressed context."""
        return self._continue(engine, engine.batch([context], [QUESTION], 8), [QUESTION])

    def _continue(self, engine: Any, cache: Any, rows: list[list[int]]) -> Tensor:
        """[2 * rows, V] logits: after questions padded on the left, then after one step."""
        longest = max(map(len, rows))
        padded = [[0] * (longest - len(row)) + row for row in rows]
        inputs = (torch.tensor(ids, device=self.setup.device) for ids in (padded, [[STEP]] * len(rows)))
        return torch.cat([engine.forward(cache, ids, keep=1)[:, -1] for ids in inputs])

    def _sdpa(self) -> dict[str, Any]:
        values = {"context_tokens": self.setup.recipe_tokens, "over_a_cache": self.sdpa_error}
        values["end_to_end"] = self.end_to_end_error
        # A yardstick that is itself off measures nothing. bfloat16 has a step of 2^-8, and layers add theirs up.
        most = 0.1 if self.setup.dtype == torch.bfloat16 else FLOOR
        return bounded(values, over_a_cache=most, end_to_end=most)

    @torch.inference_mode()
    def _attention(self, tokens: int) -> dict[str, Any]:
        """A layer's attention for the tokens of a question or step, where keys have outlier channels: large logits."""
        from lceval.models.question import QuestionLayer, Rows

        k, v, _, _ = random_layer(self.setup)
        k[..., ::OUTLIER_EVERY] += OUTLIER * KEY_BIAS
        seen, heads = k.shape[2] // PAGE * PAGE - tokens, 7 * k.shape[1]
        q, scaling = random_queries(self.setup, 1, heads, tokens, k.shape[3]), k.shape[3] ** -0.5
        padded = (F.pad(x[:, :, :seen], (0, 0, 0, -seen % PAGE)).contiguous() for x in (k, v))
        layer = QuestionLayer([PagedKV.full(*padded, seen)], Rows((0,), (seen,)), tokens, kernels=True)
        k, v = k[:, :, : seen + tokens], v[:, :, : seen + tokens]
        layer.update(k[:, :, seen:], v[:, :, seen:])
        mask = torch.ones(tokens, seen + tokens, dtype=torch.bool, device=q.device).tril_(seen)
        expected, sdpa = (
            F.scaled_dot_product_attention(
                *(x.to(dtype) for x in (q, k, v)), attn_mask=mask, scale=scaling, enable_gqa=True
            )
            for dtype in (torch.float64, self.setup.dtype)
        )
        values = {
            "error": relative_error(layer.attend(q, Softmax(scaling)), expected),
            "sdpa_error": relative_error(sdpa, expected),
        }
        return bounded(values, error=max(FLOOR, EXACT_FACTOR * values["sdpa_error"]))

    def _recipe(self, text: str) -> dict[str, Any]:
        recipe = parse(text).bound(self.scorer.digest)
        if getattr(recipe.sparse_attention, "index", None) == "ivf":
            try:
                importlib.import_module("faiss")
            except ImportError:
                raise LeftOutError("needs faiss") from None
        engine = self.engine()
        prefill = engine.prefill(self.context_ids, recipe.stats_spec)
        context = prefill.compress(recipe, consume=False)
        logits = self._answer(engine, context)
        exact = self._answer(self.engine(kernels=False, wide=True), widened(context, self.setup.wide))
        errors = {
            "question_error": relative_error(logits[0], exact[0]),
            "step_error": relative_error(logits[1], exact[1]),
        }
        precise = recipe.quantizer is None and recipe.sparse_attention is None
        bound = max(FLOOR, (EXACT_FACTOR if precise else ROUNDED_FACTOR) * self.sdpa_error)
        values: dict[str, Any] = {"kept": kept_share(context), **errors, "bound": bound}
        bounds = dict.fromkeys(errors, bound)
        if text == "full":
            values["error_vs_transformers"] = relative_error(logits, self.wide_logits)
            bounds["error_vs_transformers"] = max(FLOOR, EXACT_FACTOR * self.end_to_end_error)
        if recipe.evictor is not None:
            plain = self.engine(kernels=False)
            other = plain.prefill(self.context_ids, recipe.stats_spec).compress(recipe, consume=True)
            values["moved_slots"] = moved_slots(context, other)
            bounds["moved_slots"] = MOVED_SLOTS
        return bounded(values, **bounds)

    def _gold_kept(self) -> dict[str, Any]:
        recipe = parse("snapkv:0.25")
        context = self.engine().prefill(self.context_ids, recipe.stats_spec).compress(recipe, consume=True)
        gold = torch.arange(context.tokens) < context.tokens // 4
        shares = [
            float(gold[layer.kept_positions(0, head).cpu()].sum() / gold.sum())
            for layer in context.layers
            for head in range(len(layer.counts))
        ]
        values = {"gold_kept": context.kept_share_of(gold), "expected": sum(shares) / len(shares)}
        values["difference"] = abs(values["gold_kept"] - values["expected"])
        return bounded(values, difference=1e-6)

    def _padded_rows(self) -> dict[str, Any]:
        """Questions of three lengths over two contexts of two lengths: each row as if it were alone."""
        engine, recipe = self.engine(), parse("snapkv:0.25")
        one, two = (
            engine.prefill(ids, recipe.stats_spec).compress(recipe, consume=True)
            for ids in (self.context_ids, self.context_ids[5:-32])
        )
        contexts, questions = [one, one, two], [QUESTION, QUESTION[:5], QUESTION[:9]]
        together = self._continue(engine, engine.batch(contexts, questions, 8), questions)
        alone = [
            self._continue(engine, engine.batch([c], [q], 8), [q]) for c, q in zip(contexts, questions, strict=True)
        ]
        error = max(relative_error(together[row::3], logits) for row, logits in enumerate(alone))
        bound = max(FLOOR, EXACT_FACTOR * self.sdpa_error)
        return bounded({"error": error, "bound": bound}, error=bound)

    def _query_aware(self) -> dict[str, Any]:
        """The question takes part in the scores; its last token is read again over what stays."""
        engine, recipe = self.engine(), parse("snapkv:0.25")
        prefill = engine.prefill(self.context_ids, recipe.stats_spec)
        cache = engine.prefill_question(prefill, QUESTION, 8)
        context = prefill.compress(recipe, consume=False, question_cache=cache)
        cache.rebase(context)
        cache.rollback(1)
        last = torch.tensor([QUESTION[-1:]], device=self.setup.device)
        logits = engine.forward(cache, last, keep=1)
        query_agnostic = prefill.compress(recipe, consume=True)
        values = {"kept": kept_share(context), "differing_from_query_agnostic": moved_slots(context, query_agnostic)}
        if not bool(torch.isfinite(logits).all()):
            values["failed"] = "the logits are not finite"
        return values


def kept_share(context: Any) -> float:
    """Slots kept, as a share of all."""
    counts = [n for layer in context.layers for n in layer.counts]
    return sum(counts) / len(counts) / context.tokens


def moved_slots(context: Any, other: Any) -> float:
    """The share of the slots of `other` that `context` did not keep."""
    moved = total = 0
    for layer, its in zip(context.layers, other.layers, strict=True):
        for head in range(len(its.counts)):
            theirs = its.kept_positions(0, head)
            moved += int((~torch.isin(theirs, layer.kept_positions(0, head))).sum())
            total += len(theirs)
    return moved / total


def widened(context: Any, dtype: torch.dtype) -> Any:
    """The same compressed context in another dtype; quantised slots as they read back."""
    return replace(context, layers=tuple(_widen(layer, dtype) for layer in context.layers), dtype=dtype)


def _widen(kv: Any, dtype: torch.dtype) -> Any:
    if isinstance(kv, PagedKV):
        return replace(kv, k=kv.k.to(dtype), v=kv.v.to(dtype))
    if isinstance(kv, QuantKV | Rotated | Fp8KV):
        return _dequantised(kv, dtype)
    if isinstance(kv, Selective):
        # An index keeps its own precision, except where it multiplies queries by what it holds.
        own = {name: getattr(kv.index, name).to(dtype) for name in ("bounds", "keys") if hasattr(kv.index, name)}
        return replace(kv, kv=_widen(kv.kv, dtype), index=replace(kv.index, **own))
    return replace(kv, kv=_widen(kv.kv, dtype))


def _dequantised(kv: QuantKV | Rotated | Fp8KV, dtype: torch.dtype) -> PagedKV:
    """Pages of what a quantised layer reads back, heads side by side."""
    heads = [kv.head(head) for head in range(len(kv.counts))]
    padded = [[F.pad(x, (0, 0, 0, -len(x) % PAGE)).to(dtype) for x in head] for head in heads]
    k, v = (torch.cat(x).view(-1, PAGE, x[0].shape[-1]) for x in zip(*padded, strict=True))
    pages = [-(-n // PAGE) for n in kv.counts]
    table = torch.zeros(1, len(pages), max(pages), dtype=torch.int32, device=k.device)
    for head, count in enumerate(pages):
        first = sum(pages[:head])
        table[0, head, :count] = torch.arange(first, first + count, dtype=torch.int32)
    return PagedKV(k, v, table, kv.lens, None, kv.counts)
