"""`kv=full` is `--model hf`: same text, same log-likelihoods, on real requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from short_contexts import short_contexts

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def _short_contexts() -> Iterator[None]:
    with short_contexts():
        yield


def choices(requests: list[Any]) -> list[Instance]:
    """Log-likelihood requests out of generative ones: each question with two answers of its context."""
    wrong = "There is no answer to this question in the documents"
    return [
        Instance("loglikelihood", r.doc, (r.args[0], f" {answer}"), 0, (r.task_name, r.doc_id, 1))
        for r in requests
        for answer in (r.doc["answers"][0], wrong)
    ]


def assert_same_texts(lcft: Any, hf: Any, requests: list[Any]) -> None:
    assert [str(text) for text in lcft().generate_until(requests)] == hf.generate_until(requests, disable_tqdm=True)


def assert_same_scores(lcft: Any, hf: Any, requests: list[Any]) -> None:
    ours, theirs = lcft().loglikelihood(requests), hf.loglikelihood(requests, disable_tqdm=True)
    for (our_sum, our_greedy), (their_sum, their_greedy) in zip(ours, theirs, strict=True):
        # Float32 sums in another order: the largest measured difference was 4e-5, on contexts of 1k to 4k tokens.
        assert our_sum == pytest.approx(their_sum, abs=1e-4)
        assert our_greedy == their_greedy


def test_answers_are_token_for_token_those_of_hf(lcft: Any, hf: Any, instances: Any) -> None:
    requests = instances("lc_filings_ao_1k", 5)  # the last one is on another context
    for request in requests:
        request.arguments = (request.args[0], {**request.args[1], "max_gen_toks": 12})
    assert_same_texts(lcft, hf, requests)


def test_scores_are_those_of_hf(lcft: Any, hf: Any, instances: Any) -> None:
    assert_same_scores(lcft, hf, choices(instances("lc_filings_ao_1k", 2)))


@pytest.mark.slow
def test_real_passages_give_the_answers_and_scores_of_hf(data_folder: Path, lcft: Any, hf: Any, instances: Any) -> None:
    requests = instances("lc_nqopen_ao_2k", 1)
    assert_same_texts(lcft, hf, requests)
    assert_same_scores(lcft, hf, choices(requests))


def test_a_chunked_prefill_changes_nothing(lcft: Any, instances: Any) -> None:
    requests = instances("lc_filings_ao_1k", 2)
    whole, chunked = lcft().generate_until(requests), lcft(prefill_chunk=300).generate_until(requests)
    assert whole == chunked


def test_an_adapter_gives_the_answers_and_scores_of_hf(smollm2: str, instances: Any, tmp_path: Path) -> None:
    import torch
    from lm_eval.models.huggingface import HFLM
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lceval.models.lcft import LCFT

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2), config).save_pretrained(tmp_path)
    ours = LCFT(pretrained=smollm2, peft=str(tmp_path), device="cpu")
    theirs = HFLM(pretrained=smollm2, peft=str(tmp_path), device="cpu")
    requests = instances("lc_filings_ao_1k", 2)
    assert_same_texts(lambda: ours, theirs, requests)
    assert_same_scores(lambda: ours, theirs, choices(requests))
    few = choices(requests[:1])
    plain = HFLM(pretrained=smollm2, device="cpu").loglikelihood(few, disable_tqdm=True)
    assert ours.loglikelihood(few) != plain
    merged = LCFT(pretrained=smollm2, peft=str(tmp_path), device="cpu", merge=True)
    assert not hasattr(merged.model, "peft_config")
    assert_same_scores(lambda: merged, theirs, few)
    # The frozen head is not copied for every row.
    with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as profile:
        merged.model(torch.tensor([[1, 2, 3], [4, 5, 6]]), logits_to_keep=1)
    by_head = [e.name for e in profile.events() if any(49152 in shape for shape in e.input_shapes)]
    assert "aten::mm" in by_head
    assert "aten::bmm" not in by_head
