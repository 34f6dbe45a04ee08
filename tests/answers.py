"""Questions to a tiny model (tests/tiny_models.py) as lm-eval asks them, and comparisons of its answers."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.api.instance import Instance

# Tokens of the context, and a question: of different lengths, on two contexts.
QUESTIONS = [(90, "w7 w8 w9"), (90, "w4"), (90, "w5 w6 w7 w8 w9 w10"), (61, "w3 w2"), (61, "w8 w9 w1 w5")]


def requests(method: str) -> list[Instance]:
    instances = []
    for number, (tokens, question) in enumerate(QUESTIONS):
        context = " ".join(f"w{3 + (n * n + tokens) % 96}" for n in range(tokens))
        doc = {"context": context, "docs": [{"pid": "a", "text": context}], "gold_pids": ["a"], "answers": ["w5 w9"]}
        prompt = f"{context} {question}"
        if method == "generate_until":
            arguments: list[Any] = [{"max_gen_toks": 6, "until": []}]
        else:
            arguments = [" w3 w4", " w5"]
        instances += [Instance(method, doc, (prompt, x), i, ("t", number, 1)) for i, x in enumerate(arguments)]
    return instances


def answered(model: Any, method: str) -> list[Any]:
    return list(getattr(model, method)(requests(method), disable_tqdm=True))


def assert_equal(ours: list[Any], theirs: list[Any], method: str) -> None:
    if method == "generate_until":
        assert [str(text) for text in ours] == [str(text) for text in theirs]
    else:
        assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-4)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
