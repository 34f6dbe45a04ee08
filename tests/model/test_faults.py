"""Faults of single samples: the sample is an error that says why, and the others are answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

pytestmark = pytest.mark.model

SHORT = "The capital of France is Paris. The river of Rome is the Tiber."
LONG = f"{SHORT} " * 12
QUESTIONS = (" The capital of France is", " The river of Rome is the", " Rome lies at the", " Paris is in")
BROKEN = " Tiber"  # in no question but this one


def requests(contexts: list[str], questions: tuple[str, ...] = QUESTIONS, **kwargs: Any) -> list[Instance]:
    arguments = {"max_gen_toks": 3, "until": [], **kwargs}
    return [
        Instance("generate_until", {"context": context}, (context + question, arguments), place)
        for place, (context, question) in enumerate((c, q) for c in contexts for q in questions)
    ]


def choices(contexts: list[str], questions: tuple[str, ...] = QUESTIONS) -> list[Instance]:
    return [
        Instance("loglikelihood", r.doc, (r.args[0], choice), r.idx)
        for r in requests(contexts, questions)
        for choice in (" Paris", " Rome lies")
    ]


@contextmanager
def memory(model: Any, suffices: Callable[[Tensor], bool]) -> Iterator[list[Tensor]]:
    """A device on which a forward pass fails, as on CUDA, for input ids [B, T] that memory does not suffice for."""
    failures: list[Tensor] = []

    def allocate(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if not suffices(kwargs["input_ids"]):
            failures.append(kwargs["input_ids"])
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.get_decoder().register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        yield failures
    finally:
        handle.remove()


@pytest.mark.parametrize("query_aware", [False, True])
def test_a_batch_that_does_not_fit_is_halved(lcft: Any, lcft_model: Any, query_aware: bool) -> None:
    recipe = "snapkv:0.5:window=4"
    expected = lcft(recipe, query_aware=query_aware).generate_until(requests([SHORT]))
    model = lcft(recipe, query_aware=query_aware, batch_size=4)
    with memory(lcft_model, lambda ids: len(ids) < 3) as failures:
        assert model.generate_until(requests([SHORT])) == expected
    assert [len(ids) for ids in failures] == [4]
    assert model.totals["failed"] == 0


@pytest.mark.parametrize("query_aware", [False, True])
def test_a_context_that_does_not_fit_is_an_error_and_the_others_are_answered(
    lcft: Any, lcft_model: Any, query_aware: bool
) -> None:
    model = lcft("snapkv:0.5:window=4", query_aware=query_aware, batch_size=3)
    contexts = [SHORT, LONG, SHORT[32:]]
    expected = model.generate_until(requests(contexts, QUESTIONS[:2]))
    expected_scores = model.loglikelihood(choices(contexts, QUESTIONS[:2]))
    model.scheduler.release()
    with memory(lcft_model, lambda ids: ids.shape[1] < 100):
        texts = model.generate_until(requests(contexts, QUESTIONS[:2]))
        scores = model.loglikelihood(choices(contexts, QUESTIONS[:2]))
    assert [text.meta["kv"]["status"] for text in texts] == ["ok"] * 2 + ["error"] * 2 + ["ok"] * 2
    assert texts == [*expected[:2], "", "", *expected[4:]]
    assert texts[2].meta["kv"]["error"] == scores[4].meta["kv"]["error"] == "out of memory"
    assert [score[0] for score in scores[4:8]] == [float("-inf")] * 4
    assert [score[0] for score in scores[:4] + scores[8:]] == pytest.approx(
        [score[0] for score in expected_scores[:4] + expected_scores[8:]], abs=1e-4
    )
    assert model.totals["failed"] == 4


def test_memory_that_caches_hold_is_freed_before_a_sample_fails(lcft: Any, lcft_model: Any) -> None:
    model = lcft("streaming:0.5")
    (expected,) = model.generate_until(requests([LONG], QUESTIONS[:1]))
    model.scheduler.release()
    cached = model.scheduler._context_cache
    with memory(lcft_model, lambda ids: ids.shape[1] < 100 or not cached.cached_bytes) as failures:
        texts = model.generate_until(requests([SHORT, LONG], QUESTIONS[:1]))
    assert len(failures) == 1
    assert texts[1] == expected
    assert texts[1].meta["kv"]["status"] == "ok"


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_of_their_sample_alone(
    lcft: Any, lcft_model: Any, value: float, do_sample: bool
) -> None:
    model = lcft(batch_size=2)
    questions = (QUESTIONS[0], f" Not the{BROKEN}")
    (token,) = model.tok_encode(BROKEN)
    expected = model.generate_until(requests([LONG[:31]], questions))
    embeddings = lcft_model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, ids, out: out.masked_fill((ids[0] == token)[..., None], value))
    try:
        torch.manual_seed(0)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 1} if do_sample else {}
        texts = model.generate_until(requests([LONG[:31]], questions, **sampling))
        scores = model.loglikelihood(choices([LONG[:31]], questions))
    finally:
        handle.remove()
    assert texts == [expected[0], ""]
    assert [text.meta["kv"]["status"] for text in texts] == ["ok", "error"]
    assert texts[1].meta["kv"]["error"] == "the model's logits are NaN or infinite"
    assert [score.meta["kv"]["status"] for score in scores] == ["ok", "ok", "error", "error"]
    assert model.totals["failed"] == 2
