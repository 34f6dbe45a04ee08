"""A local model as the judge: its verdict is the most likely label under any tokenization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lceval.core.errors import UserError
from lceval.judge import backends, during_run, rubrics, verdicts
from lceval.judge.backends.hf import SCORES
from lceval.judge.protocol import RefusedError
from lceval.judge.rubrics import Case

pytestmark = pytest.mark.model
CASE = Case(
    "What is the capital of France?", ("Paris",), "[DOC 0] says Paris.\nThe answer is: Paris", ("[DOC 0]\nParis.",)
)
SHORT = rubrics.Prompt("Grade the answer.", f"{CASE.question}\n{CASE.solution}")


@pytest.fixture(scope="module")
def judge() -> Any:
    loaded = backends.make("hf:smollm2-135m", timeout=1, max_tokens=4)
    yield loaded
    loaded.close()


@torch.inference_mode()
def log_likelihood(judge: Any, prompt: rubrics.Prompt, before: str, label: str) -> float:
    """The definition: one forward pass over everything, no cache."""
    head, whole = (judge._encode(prompt) + judge._tokens(text) for text in (before, f"{before} {label}"))
    assert whole[: len(head)] == head
    logits = judge._model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return float(sum(logits[place - 1, whole[place]] for place in range(len(head), len(whole))))


@pytest.mark.parametrize("name", ["financebench", "rj", "relevance"])
def test_label_scores_match_a_pass_without_cache_and_the_best_is_the_verdict(judge: Any, name: str) -> None:
    rubric = rubrics.load(name)
    prompt = SHORT
    reply = judge.ask(rubric, CASE, prompt)
    grades = json.loads(reply.text)
    before = "{"
    for place, (field, labels) in enumerate(rubric.labels.items()):
        before += ", " * bool(place) + f'"{field}":'
        expected = {str(label): log_likelihood(judge, prompt, before, json.dumps(label)) for label in labels}
        # Differences are compared, because a common first token shifts all labels equally.
        first = next(iter(expected))
        for label in expected:
            ours = grades[SCORES][field][label] - grades[SCORES][field][first]
            assert ours == pytest.approx(expected[label] - expected[first], abs=2e-3)  # fp32, other summation order
        assert str(grades[field]) == max(expected, key=expected.__getitem__)
        before += f" {json.dumps(grades[field])}"
    assert verdicts.parse(rubric, reply.text) == {field: grades[field] for field in rubric.labels}


def test_a_rating_is_generated_and_a_reply_at_its_limit_is_marked_as_truncated(judge: Any) -> None:
    rubric = rubrics.load("loong")
    reply = judge.ask(rubric, CASE, SHORT)
    assert reply.cut == (reply.tokens_out == 4)
    assert reply.text
    assert reply.served == judge.revision
    assert len(judge.revision) == 16


def test_a_prompt_beyond_the_context_window_is_refused_and_never_truncated(judge: Any) -> None:
    rubric = rubrics.load("financebench")
    case = Case("Q?", ("G",), "word " * 9000)
    with pytest.raises(RefusedError, match="the judge's limit is 8192"):
        judge.ask(rubric, case, rubrics.render(rubric, case, limit=10**6))


def test_a_missing_model_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot load the judge '/no/such/model'") as raised:
        backends.make("hf:/no/such/model", timeout=1)
    assert "\n" not in str(raised.value)


def test_a_local_judge_of_a_run_is_a_subprocess_and_stores_its_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lceval.judge.backends.hf import LocalJudge

    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path))
    # The subprocess has the real class.
    monkeypatch.setattr(
        LocalJudge, "__init__", lambda *_, **__: pytest.fail("loaded in the process of the evaluated model")
    )
    report, verdicts = during_run._in_subprocess([("rj", [CASE])], "hf:smollm2-135m")
    ((verdict,),) = verdicts
    assert verdict.grades is not None
    assert set(verdict.grades) == {"reasoning", "grounding", "answer"}
    assert (report["judge"], report["reused"]) == ("hf:smollm2-135m", 0)
    assert report["revision"]
    assert during_run._in_subprocess([("rj", [CASE])], "hf:smollm2-135m")[0]["reused"] == 1
