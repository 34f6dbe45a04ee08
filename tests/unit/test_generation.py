"""The loop that writes answers: the texts of transformers' `generate`, under whatever ends them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_models import save_model
from transformers import GenerationConfig

from lceval.models import generation
from lceval.models.lcft import LCFT

# Under each of five lists of stop strings.
QUESTIONS = 40
# Stop strings that begin and end within a token, lie across two, or are one; and the tokens that they need.
STOPS: list[list[str]] = [[], ["7 w"], ["w5", "9 w1"], ["3"], ["w1 w", "w22"]]
SAMPLED = {"do_sample": True, "temperature": 3.0, "top_k": 60, "top_p": 0.95}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def requests(until: Sequence[str], **sampling: Any) -> list[Instance]:
    """Questions of one to five tokens, 8 on each context."""
    instances = []
    for number in range(QUESTIONS):
        context = " ".join(f"w{3 + (n * n + number // 8) % 96}" for n in range(60))
        question = " ".join(f"w{2 + (number * 7 + n) % 97}" for n in range(1 + number % 5))
        arguments = (f"{context} {question}", {"until": [*until], "max_gen_toks": 12, **sampling})
        instances.append(Instance("generate_until", {"context": context}, arguments, 0, ("t", number, 1)))
    return instances


def texts(model: LCFT, instances: list[Instance]) -> tuple[list[str], list[int]]:
    """The answers, and how many tokens each has."""
    torch.manual_seed(7)
    answers = model.generate_until(instances, disable_tqdm=True)
    return [str(answer) for answer in answers], [answer.meta["kv"]["new_tokens"] for answer in answers]


@pytest.mark.parametrize(
    ("rows", "sampled", "every"), [(1, False, 1), (1, True, 1), (8, False, 1), (8, False, 8), (8, True, 1)]
)
def test_texts_are_those_of_generate(
    folder: str, rows: int, sampled: bool, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LCFT(folder, kv="snapkv:0.5:window=8", device="cpu", dtype="float32", batch_size=rows)
    # Random logits are flat: these let some answers end by the end token, early and late.
    model.model.lm_head.weight.data[1] += 0.02
    monkeypatch.setitem(generation.LOOK_EVERY, "cpu", every)
    written, own = [], generation.selection
    # Rows that wait for others draw random numbers too, in generate for longer: batches are sampled without stops.
    for until in STOPS[: 1 if sampled and rows > 1 else None]:
        instances = requests(until, **(SAMPLED if sampled else {}))
        monkeypatch.setattr(generation, "selection", own)
        ours, counts = texts(model, instances)
        monkeypatch.setattr(generation, "selection", lambda *_: None)
        theirs, of_theirs = texts(model, instances)
        assert ours == theirs
        assert counts == of_theirs
        written += counts
    assert len(set(written)) > 4, "answers of many lengths"


def test_an_answer_ends_with_the_first_token_that_completes_a_stop_or_is_an_end() -> None:
    ends = generation.Ends(frozenset([1]), ("b c", "zz"), lambda tokens: " ".join("abcdz"[t - 2] for t in tokens))
    assert ends.after([2, 3, 4, 5]) == 3
    assert ends.after([2, 3, 3, 4], seen=3) == 4
    assert ends.after([6, 6]) is None, "z z is not zz"
    assert generation.Ends(frozenset([4]), (), str).after([2, 3, 4, 5]) == 3


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({}, {"num_beams": 2}),
        ({}, {"repetition_penalty": 1.1}),
        ({"repetition_penalty": 1.1}, {}),
        ({"max_new_tokens": 5}, {}),
        ({"suppress_tokens": [3]}, {}),
        ({}, {"do_sample": True}),
        ({}, {"do_sample": True, "temperature": -1.0}),
        ({}, {"do_sample": True, "temperature": 1.0, "typical_p": 0.5}),
        ({}, {"unknown": 3}),
    ],
)
def test_what_the_loop_does_not_do_is_left_to_generate(config: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert generation.selection(GenerationConfig(**config), sampling) is None


def test_settings_without_effect_are_no_reason_to_leave_the_loop() -> None:
    config = GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True, repetition_penalty=1.0, eos_token_id=[1, 2])
    greedy = generation.selection(config, {"do_sample": False, "temperature": 0.0})
    assert greedy is not None
    assert greedy.warpers is None
    sampled = generation.selection(config, {"do_sample": True, "temperature": 0.7})
    assert sampled is not None
    assert [type(warper).__name__[:4] for warper in sampled.warpers] == ["Temp", "TopK", "TopP"]
