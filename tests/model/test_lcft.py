"""The lcft model on the real model: eviction, telemetry, shared prefills, and refused input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from lceval.core.errors import UserError
from lceval.models import attention
from lceval.models.boundary import ContextEnd
from lceval.models.prefix import Job

pytestmark = pytest.mark.model


@pytest.mark.parametrize("recipe", ["snapkv:0.25", "streaming:0.25"])
def test_a_quarter_is_a_quarter_of_the_bytes(lcft: Any, requests: list[Any], recipe: str) -> None:
    for text in lcft(recipe).generate_until(requests[:4]):
        assert text.meta["kv_bytes"] == pytest.approx(0.25 * text.meta["kv_bytes_full"], rel=0.02)
        assert text.meta["kv"]["kept_share"] == text.meta["kv_bytes"] / text.meta["kv_bytes_full"]
        # Rounded up to a page of 64 slots for each layer and head.
        page = 64 * 30 * 3 * (2 * 64 * 4 + 4)
        assert text.meta["kv"]["bytes_allocated"] <= text.meta["kv_bytes"] + page


def test_the_context_setting_determines_what_is_compressed(lcft: Any, instances: Any) -> None:
    model = lcft("snapkv:0.5", diagnose="gold")
    texts = {}
    for name, metadata in {
        "full": {},
        "gold": {"context": "gold"},
        "rag": {"context": "rag", "retriever": "bm25", "chunk": 64, "budget": 128},
        "none": {"context": "none"},
    }.items():
        (request,) = instances("lc_filings_ao_1k", 1, **metadata)
        request.arguments = (request.args[0], {**request.args[1], "max_gen_toks": 8})
        (texts[name],) = model.generate_until([request])
    sizes = {name: text.meta["kv_bytes_full"] for name, text in texts.items()}
    assert sizes["none"] < sizes["rag"] < sizes["full"]
    assert sizes["none"] < sizes["gold"] < sizes["full"]
    # Half of all slots, and the context is the gold passage and its instruction.
    assert 0.45 < texts["gold"].meta["gold_kept"] < 0.6
    assert texts["none"].meta["gold_kept"] is None
    assert all(text.meta["gold_nll"] > 0 for text in texts.values())
    # With context=none no boundary is missing: no warning and no count.
    assert model.totals["no_boundary"] == 0
    assert texts["none"].meta["kv"]["kept_share"] == 1


def test_full_keeps_every_byte(lcft: Any, requests: list[Any]) -> None:
    (text,) = lcft().generate_until(requests[:1])
    tokens = text.meta["kv"]["context_tokens"]
    # 30 layers, 3 KV heads, keys and values of 64 float32.
    assert text.meta["kv_bytes"] == text.meta["kv_bytes_full"] == tokens * 30 * 3 * 2 * 64 * 4
    assert text.meta["kv"]["kept_tokens"] == [{"min": tokens, "mean": tokens, "max": tokens}] * 30


def test_each_context_is_prefilled_once_and_charged_to_its_first_question(lcft: Any, requests: list[Any]) -> None:
    model = lcft("snapkv:0.5")
    # Interleaved, so that requests must be grouped.
    order = [requests[i] for i in (0, 4, 1, 5, 2, 6)]
    metas = [text.meta["kv"] for text in model.generate_until(order)]
    assert model.totals["contexts"] == 2
    assert [m["shared_prefix"] for m in metas] == [False, False, True, True, True, True]
    assert [m["prefill_s"] > 0 for m in metas] == [not m["shared_prefix"] for m in metas]
    assert [m["prefill_tokens"] > 0 for m in metas] == [not m["shared_prefix"] for m in metas]
    assert all(m["new_tokens"] > 0 and m["question_s"] > 0 for m in metas)


def test_the_context_ends_where_the_documents_do(lcft: Any, requests: list[Any]) -> None:
    model = lcft()
    prompt = requests[0].args[0]
    job = Job(**model._split(0, requests[0], model.tok_encode(prompt)))
    assert job.has_context
    assert model.tok_decode(list(job.context), skip_special_tokens=False).endswith(requests[0].doc["context"])
    assert requests[0].doc["question"] in model.tok_decode(list(job.question))


def test_query_agnostic_compression_does_not_depend_on_the_question(lcft: Any, requests: list[Any]) -> None:
    model = lcft("snapkv:0.25")
    jobs = [Job(**model._split(0, r, model.tok_encode(r.args[0]))) for r in requests[:2]]
    assert jobs[0].question != jobs[1].question
    assert jobs[0].context == jobs[1].context


def test_compression_changes_scores_and_keeps_them_finite(lcft: Any, requests: list[Any]) -> None:
    pairs = [Instance("loglikelihood", r.doc, (r.args[0], f" {r.doc['answers'][0]}"), 0) for r in requests[:4]]
    full, quarter = lcft().loglikelihood(pairs), lcft("streaming:0.25").loglikelihood(pairs)
    assert full != quarter
    assert all(score <= 0 and torch.tensor(score).isfinite() for score, _ in quarter)
    assert all(score.meta["kv"]["kept_share"] < 0.26 for score in quarter)


def test_choices_of_one_question_equal_each_scored_alone(lcft: Any, requests: list[Any]) -> None:
    answers = ["Lyon", "$4,211 million in the year 2021", "a", "Mara Ellison and the whole of her board"]
    pairs = [Instance("loglikelihood", requests[0].doc, (requests[0].args[0], f" {a}"), 0) for a in answers]
    model = lcft("snapkv:0.25")
    together = model.loglikelihood(pairs)
    for pair, (score, greedy) in zip(pairs, together, strict=True):
        ((alone, alone_greedy),) = model.loglikelihood([pair])
        assert score == pytest.approx(alone, abs=1e-4)
        assert greedy == alone_greedy


def test_a_prompt_whose_context_is_not_found_is_refused_unless_that_is_intended(lcft: Any, requests: list[Any]) -> None:
    foreign = Instance("generate_until", {"text": "no such field"}, requests[0].args, 0, metadata=("mine", 0, 1))
    with pytest.raises(UserError, match=r"^mine: no context to compress under kv=snapkv:0.25: .*context_from=FIELD"):
        lcft("snapkv:0.25").generate_until([foreign])
    whole = lcft()
    (expected,) = whole.generate_until([foreign])
    assert whole.get_model_info()["lcft"]["no_boundary"] == 1
    model = lcft("snapkv:0.25")
    model.context_end = ContextEnd("none")
    (text,) = model.generate_until([foreign])
    assert not text.meta["kv"]["boundary"]
    assert text == expected


def test_a_prompt_of_one_token_has_no_context(lcft: Any, hf: Any) -> None:
    one = Instance("loglikelihood", {}, ("", " Paris is a city"), 0)
    scores = lcft("snapkv:0.25").loglikelihood([one])
    assert scores[0].meta["kv_bytes"] == 0
    assert scores[0][0] == pytest.approx(hf.loglikelihood([one], disable_tqdm=True)[0][0], abs=1e-4)


def test_an_overlong_prompt_stops_the_run_before_the_first_prefill(lcft: Any, requests: list[Any]) -> None:
    model = lcft(max_length=256)
    with pytest.raises(UserError, match=r"8 of 8 prompts do not fit the model's 256 tokens: lc_filings_ao_1k \(8x"):
        model.generate_until(requests)
    assert model.totals["contexts"] == 0


def test_skip_records_the_overlong_as_errors_and_runs_the_rest(lcft: Any, requests: list[Any]) -> None:
    model = lcft(max_length=256, overlong="skip")
    short = Instance("generate_until", {}, ("Say yes.", {"max_gen_toks": 3}), 0)
    long, ran = model.generate_until([requests[0], short])
    assert long == ""
    assert long.meta["kv"]["status"] == "error"
    assert ran.meta["kv"]["status"] == "ok"
    assert model.get_model_info()["lcft"]["too_long"] == 1
    (score,) = model.loglikelihood([Instance("loglikelihood", requests[0].doc, (requests[0].args[0], " x"), 0)])
    assert score[0] == -float("inf")
    assert score.meta["kv"]["status"] == "error"


@pytest.mark.parametrize("where", ["middle", "end"])
def test_truncation_is_recorded_and_leaves_the_question_whole(lcft: Any, requests: list[Any], where: str) -> None:
    (text,) = lcft(max_length=256, overlong=where).generate_until(requests[:1])
    assert text.meta["kv"]["truncated"]
    assert text.meta["kv"]["context_tokens"] < 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv": "snapvk:0.5"}, "did you mean 'snapkv'"),
        ({"overlong": "cut"}, "one of error, middle, end, skip"),
        ({"attn": "triton"}, "attn=triton requires triton and a CUDA device, got cpu"),
        ({"attn": "flash"}, "one of auto, torch, triton"),
        ({"prefill_chunk": -1}, "a number of tokens, or 0"),
        ({"batch_size": "most"}, "a number of questions, at least 1, or auto"),
        ({"attn_implementation": "sdpa"}, "lcft sets attn_implementation itself"),
        ({"device_map": "auto"}, "bad model argument device_map='auto': .* parallelize=True"),
        ({"tp_plan": "auto"}, "bad model argument tp_plan='auto': .* parallelize=True"),
        ({"kvv": "full"}, "unknown model argument 'kvv': did you mean 'kv'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(smollm2: str, arguments: dict[str, Any], message: str) -> None:
    from lceval.models.lcft import LCFT

    with pytest.raises(UserError, match=message) as refusal:
        LCFT(pretrained=smollm2, device="cpu", **arguments)
    assert "\n" not in str(refusal.value)


def test_a_prefill_is_in_chunks_on_cuda_and_whole_elsewhere_and_the_number_is_recorded(lcft: Any) -> None:
    model = lcft()
    recorded = model.get_model_info()["lcft"]["prefill_chunk"]
    assert model.engine._chunk == model.output_settings["prefill_chunk"] == recorded == 0
    assert lcft(prefill_chunk=300).output_settings["prefill_chunk"] == 300
    assert attention.prefill_chunk("auto", torch.device("cuda")) == 8192


def test_rolling_log_likelihood_runs_under_full_and_is_refused_under_compression(lcft: Any, hf: Any) -> None:
    text = Instance("loglikelihood_rolling", {}, ("The quick brown fox jumps over the lazy dog.",), 0)
    assert lcft().loglikelihood_rolling([text]) == pytest.approx(hf.loglikelihood_rolling([text]), abs=1e-4)
    with pytest.raises(UserError, match="use kv=full"):
        lcft("snapkv:0.5").loglikelihood_rolling([text])


def test_sampling_follows_the_seed(lcft: Any, requests: list[Any]) -> None:
    prompt = requests[0].args[0]
    sampled = Instance(
        "generate_until",
        requests[0].doc,
        (prompt, {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}),
        0,
    )
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts += [str(t) for t in lcft("snapkv:0.5").generate_until([sampled])]
    assert texts[0] == texts[1] != texts[2]


def test_a_use_cache_file_of_another_recipe_is_refused(lcft: Any) -> None:
    class Hook:
        def __init__(self) -> None:
            self.dbdict: dict[str, Any] = {}

    hook = Hook()
    lcft("snapkv:0.5").set_cache_hook(hook)
    lcft("snapkv:0.5").set_cache_hook(hook)
    with pytest.raises(UserError, match="use another file"):
        lcft("snapkv:0.25").set_cache_hook(hook)
    hook.dbdict = {"some-hash": "an answer that hf wrote"}
    with pytest.raises(UserError, match="another model"):
        lcft("snapkv:0.5").set_cache_hook(hook)
