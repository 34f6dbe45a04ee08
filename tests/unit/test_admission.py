"""Batches hold as many questions as the free memory has room for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_models import SHAPE, save_model

from lceval.models import admission
from lceval.models.lcft import LCFT

CONTEXT, QUESTION, ANSWER = 150, 5, 4
PER_CONTEXT = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path)
    return str(path)


def requests() -> list[Instance]:
    """Four questions on each of three contexts."""
    instances = []
    for n in range(3 * PER_CONTEXT):
        context = " ".join(f"w{(n // PER_CONTEXT * 31 + i * i) % 97}" for i in range(CONTEXT))
        question = " ".join(f"w{(n + 7 * i) % 97}" for i in range(QUESTION))
        arguments = f"{context} {question}", {"max_gen_toks": ANSWER, "until": []}
        instances.append(Instance("generate_until", {"context": context}, arguments, n, ("t", n, 1)))
    return instances


def answered(model: LCFT) -> tuple[list[str], list[int]]:
    """The texts, and the sizes of the batches."""
    texts = model.generate_until(requests(), disable_tqdm=True)
    sizes, at = [], 0
    while at < len(texts):
        sizes.append(texts[at].meta["kv"]["batch"])
        at += sizes[-1]
    return [str(text) for text in texts], sizes


@pytest.mark.parametrize(
    ("tokens", "query_aware", "sizes"),
    [
        (10**6, False, [12]),
        # Two contexts and their questions; the prefill of a third counts twice its context.
        (2 * CONTEXT + 8 * (QUESTION + ANSWER), False, [8, 4]),
        # Three questions, and no context beside another.
        (3 * (QUESTION + ANSWER), False, [3, 1] * 3),
        (0, False, [1] * 12),
        # Query-aware, every question has a context of its own.
        (2 * CONTEXT + 2 * (QUESTION + ANSWER), True, [2] * 6),
    ],
)
@pytest.mark.parametrize("batch_size", ["auto", 12])
def test_a_batch_ends_where_the_memory_does(
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: str | int,
    tokens: int,
    query_aware: bool,
    sizes: list[int],
) -> None:
    token_bytes = 2 * 4 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    monkeypatch.setattr(admission, "free_bytes", lambda _: tokens * token_bytes / admission.USABLE + 1)
    model = LCFT(folder, kv="snapkv:0.5", query_aware=query_aware, batch_size=batch_size, device="cpu")
    alone = LCFT(folder, kv="snapkv:0.5", query_aware=query_aware, device="cpu")
    assert answered(model) == (answered(alone)[0], sizes)
    assert model.totals["failed"] == 0


def test_an_automatic_batch_has_at_most_the_given_number_of_questions(folder: str) -> None:
    assert answered(LCFT(folder, batch_size="auto:2", max_batch_size=5, device="cpu"))[1] == [5, 5, 2]
    assert LCFT(folder, batch_size="auto", device="cpu").batch_rows == 64


def test_texts_without_a_question_run_one_by_one_under_auto(folder: str) -> None:
    texts = [Instance("loglikelihood_rolling", {}, (f"w1 w2 w{n}",), n, ("t", n, 1)) for n in range(3)]
    automatic, alone = (
        LCFT(folder, batch_size=size, device="cpu").loglikelihood_rolling(texts, disable_tqdm=True)
        for size in ("auto", 1)
    )
    assert automatic == alone


def test_free_memory_is_that_of_the_machine_or_of_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "CONTAINER", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert admission.free_bytes({CPU}) == 1000
    (tmp_path / "memory.stat").write_text("anon 250\nfile 90000\n")
    for limit, free in {"max": 1000, "600": 350, "200": 0, "5000": 1000}.items():
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert admission.free_bytes({CPU}) == free


def test_free_memory_of_gpus_is_that_of_the_fullest_times_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    free: dict[Any, int] = {0: 700, 1: 300}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    assert admission.free_bytes({torch.device("cuda", 0), torch.device("cuda", 1)}) == 2 * 350
