"""Batches, query-aware compression, diagnosis and cached contexts, on the real model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from lceval.core.errors import UserError
from lceval.models.recipe import parse

pytestmark = pytest.mark.model


def pairs(requests: list[Any]) -> list[Instance]:
    """Each question with an answer of its context and one that is longer."""
    return [
        Instance("loglikelihood", r.doc, (r.args[0], f" {answer}"), 0, (r.task_name, r.doc_id, 1))
        for r in requests
        for answer in (r.doc["answers"][0], "There is no answer to this question")
    ]


def test_a_batch_gives_the_answers_of_hf(lcft: Any, hf: Any, requests: list[Any]) -> None:
    order = [requests[i] for i in (0, 4, 1, 5)]  # two contexts in turn
    ours = lcft(batch_size=4).generate_until(order)
    assert [str(text) for text in ours] == hf.generate_until(order, disable_tqdm=True)


@pytest.mark.parametrize(
    ("recipe", "query_aware"),
    [
        ("quest:0.5", False),
        ("h2o:0.5:when=always", False),
        ("adakv:0.5+int8", True),
    ],
)
def test_a_batch_gives_the_answers_and_scores_of_single_questions(
    lcft: Any, requests: list[Any], recipe: str, query_aware: bool
) -> None:
    few = [requests[i] for i in (0, 4, 1)]
    alone, together = (lcft(recipe, query_aware=query_aware, batch_size=n) for n in (1, 3))
    texts = together.generate_until(few)
    assert texts == alone.generate_until(few)
    assert len({text.meta["kv"]["question_s"] for text in texts}) == 1
    batched, single = together.loglikelihood(pairs(few)), alone.loglikelihood(pairs(few))
    for (score, greedy), (expected, expected_greedy) in zip(batched, single, strict=True):
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy


def test_a_query_aware_batch_is_diagnosed_as_its_single_questions(lcft: Any, requests: list[Any]) -> None:
    few = [requests[i] for i in (0, 4, 1)]
    alone, together = (
        [text.meta for text in lcft("snapkv:0.5", query_aware=True, batch_size=n, diagnose="gold").generate_until(few)]
        for n in (1, 3)
    )
    for measured, expected in zip(together, alone, strict=True):
        assert measured["gold_nll"] == pytest.approx(expected["gold_nll"], abs=1e-3)
        assert measured["gold_kept"] == expected["gold_kept"]


def test_a_batch_is_charged_to_its_questions_in_equal_parts(lcft: Any, requests: list[Any]) -> None:
    metas = [text.meta["kv"] for text in lcft("snapkv:0.5", batch_size=4).generate_until(requests[:4])]
    assert len({meta["question_s"] for meta in metas}) == 1
    assert all(0 < meta["new_tokens"] <= 8 for meta in metas)


def test_sampling_draws_from_the_compressed_cache(lcft: Any, requests: list[Any]) -> None:
    import torch

    sampled = [
        Instance("generate_until", r.doc, (r.args[0], {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}), 0)
        for r in requests[:2]
    ]
    model = lcft("snapkv:0.5", batch_size=2)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate_until(sampled))
    assert runs[0] == runs[1] != runs[2]


def test_in_query_aware_mode_each_question_keeps_its_own_slots(lcft: Any, requests: list[Any]) -> None:
    kept: dict[str, set[float]] = {}
    for query_aware in (False, True):
        model = lcft("snapkv:0.25", query_aware=query_aware, diagnose="gold")
        texts = model.generate_until(requests[:4])
        assert model.totals["contexts"] == 1
        for text in texts:
            assert text.meta["kv_bytes"] == pytest.approx(0.25 * text.meta["kv_bytes_full"], rel=0.02)
        kept[query_aware] = {text.meta["gold_kept"] for text in texts}
    # In query-agnostic mode the kept share of a document is the same for every question.
    assert len(kept[False]) <= len({r.doc["gold_pids"][0] for r in requests[:4]})
    assert len(kept[True]) == 4


def test_query_aware_scores_are_finite_and_need_one_prefill(lcft: Any, requests: list[Any]) -> None:
    for score, _ in (model := lcft("tova:0.25", query_aware=True)).loglikelihood(pairs(requests[:2])):
        assert score < 0
    assert model.totals["contexts"] == 1


def test_gold_nll_is_the_likelihood_that_hf_gives_the_answer(lcft: Any, hf: Any, requests: list[Any]) -> None:
    few = requests[:3]
    metas = [text.meta for text in lcft("full", diagnose="gold", batch_size=3).generate_until(few)]
    gold = [(f"{r.args[0]}Answer:", f" {r.doc['answers'][0]}") for r in few]
    scores = hf.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in gold], disable_tqdm=True)
    for meta, (score, _), (prompt, answer) in zip(metas, scores, gold, strict=True):
        tokens = len(hf._encode_pair(prompt, answer)[1])
        assert meta["gold_kept"] == 1.0
        assert meta["gold_nll"] == pytest.approx(-score / tokens, abs=1e-4)
    # Nothing is generated; a reply prefix that ends the prompt is not repeated.
    for prefix in ("", "Answer:"):
        silent = [replace(r, arguments=(r.args[0] + prefix, {**r.args[1], "max_gen_toks": 0})) for r in few]
        for text, meta in zip(lcft("full", diagnose="gold", batch_size=3).generate_until(silent), metas, strict=True):
            assert text == ""
            assert text.meta["gold_nll"] == pytest.approx(meta["gold_nll"], abs=1e-4)


def test_diagnosis_changes_no_answer(lcft: Any, requests: list[Any]) -> None:
    few = requests[:2]
    plain = lcft("snapkv:0.5").generate_until(few)
    for kind, key in (("gold", "gold_nll"), ("attention", "ndcg10")):
        diagnosed = lcft("snapkv:0.5", diagnose=kind).generate_until(few)
        assert diagnosed == plain
        assert all(text.meta[key] is not None for text in diagnosed)
    assert all(0 <= text.meta["ndcg10"] <= 1 for text in diagnosed)


def test_a_cached_context_is_not_prefilled_again(lcft: Any, requests: list[Any]) -> None:
    model = lcft("snapkv:0.5")
    model.generate_until(requests[:1])
    texts = model.generate_until(requests[1:2])
    scores = model.loglikelihood(pairs(requests[:2]))
    assert model.totals["contexts"] == 1
    assert all(r.meta["kv"]["shared_prefix"] and r.meta["kv"]["prefill_s"] == 0 for r in [*texts, *scores])
    uncached = lcft("snapkv:0.5", prefix_cache_gib=0)
    uncached.generate_until(requests[:1])
    assert uncached.generate_until(requests[1:2]) == texts
    assert uncached.totals["contexts"] == 2


@pytest.mark.parametrize(("query_aware", "question_prefills"), [(False, 0), (True, 1)])
def test_one_prefill_serves_all_recipes(
    lcft: Any, requests: list[Any], query_aware: bool, question_prefills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = ["full", "knorm:0.5", "snapkv:0.5+int4"]
    alone = [lcft(recipe, query_aware=query_aware).loglikelihood(pairs(requests[:1])) for recipe in recipes]
    model = lcft(query_aware=query_aware)
    questions: list[Any] = []
    prefill_question = model.engine.prefill_question
    monkeypatch.setattr(
        model.engine, "prefill_question", lambda *args: questions.append(args) or prefill_question(*args)
    )
    prefills = 0
    with model.sharing_prefills(map(parse, recipes)):
        for recipe, expected in zip(recipes, alone, strict=True):
            model.use(recipe)
            assert model.loglikelihood(pairs(requests[:1])) == expected
            prefills += model.totals["contexts"]
    assert prefills == 1
    assert len(questions) == question_prefills


def test_a_kept_prefill_with_insufficient_statistics_is_repeated(lcft: Any, requests: list[Any]) -> None:
    model = lcft("knorm:0.5")
    with model.sharing_prefills([parse("knorm:0.5")]):
        model.loglikelihood(pairs(requests[:1]))
        model.use("snapkv:0.5")
        assert model.loglikelihood(pairs(requests[:1])) == lcft("snapkv:0.5").loglikelihood(pairs(requests[:1]))
        assert model.totals["contexts"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_aware": "blind"}, "bad model argument query_aware='blind': true or false"),
        ({"diagnose": "all"}, "bad model argument diagnose='all'"),
        ({"kv": "tova:0.5:when=always", "query_aware": True}, "use query_aware=false"),
        ({"prefix_cache_gib": -1}, "bad model argument prefix_cache_gib=-1"),
        ({"merge": True}, "bad model argument merge=True: no adapter to merge"),
        ({"batch_size": "most"}, "a number of questions, at least 1, or auto"),
    ],
)
def test_unsupported_arguments_are_refused(lcft: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lcft(**{"kv": "full", **arguments})
