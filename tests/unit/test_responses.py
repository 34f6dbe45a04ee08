"""A stored response is not generated again."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from lceval.core.answers import Score, Text
from lceval.core.errors import InfrastructureError
from lceval.records.responses import Responses


class Model:
    """Answers with the number of the call; stores its responses through the hook, or not."""

    def __init__(self, hooked: bool = True, fail_after: int | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.hooked, self.fail_after = hooked, fail_after

    def set_cache_hook(self, hook: Responses) -> None:
        self.hook = hook

    def _answer(self, method: str, requests: list[Instance], make: Any) -> list[Any]:
        responses = []
        for request in requests:
            if self.fail_after is not None and len(self.calls) >= self.fail_after:
                raise RuntimeError("killed")
            self.calls.append(request.args)
            responses.append(make(len(self.calls)))
            if self.hooked:
                self.hook.add_partial(method, request.args, responses[-1])
        return responses

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        return self._answer("generate_until", requests, lambda n: Text(f"answer {n}", {"kv": {"n": n}}))

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        return self._answer("loglikelihood", requests, lambda n: Score((-float(n) / 3, n % 2 == 0), {"n": n}))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[Any]:
        return self._answer("loglikelihood_rolling", requests, lambda n: -float(n))


def request(doc_id: int, *args: Any, kind: str = "generate_until") -> Instance:
    return Instance(kind, {}, args, 0, metadata=("task", doc_id, 1))


def attached(path: Path, **kwargs: Any) -> tuple[Model, Responses]:
    model, store = Model(**kwargs), Responses(path)
    store.attach(model)
    return model, store


@pytest.mark.parametrize("hooked", [True, False])
def test_a_resumed_run_does_not_call_the_model_and_returns_the_same(tmp_path: Path, hooked: bool) -> None:
    requests = [request(i, f"q{i}", {"until": ["x"]}) for i in range(3)]
    model, store = attached(tmp_path / "r", hooked=hooked)
    first = model.generate_until(requests)
    store.close()
    model, store = attached(tmp_path / "r")
    again = model.generate_until(requests)
    assert again == first
    assert [r.meta for r in again] == [r.meta for r in first]
    assert model.calls == []
    assert len(store.reused) == len(store.requested) == 3


def test_after_a_crash_only_missing_responses_are_generated(tmp_path: Path) -> None:
    requests = [request(i, f"q{i}", {}) for i in range(5)]
    model, store = attached(tmp_path / "r", fail_after=2)
    with pytest.raises(RuntimeError):
        model.generate_until(requests)
    store.close()
    model, store = attached(tmp_path / "r")
    answers = model.generate_until(requests)
    assert [args[0] for args in model.calls] == ["q2", "q3", "q4"]
    assert [str(a) for a in answers] == ["answer 1", "answer 2", "answer 1", "answer 2", "answer 3"]
    assert len(store.reused) == 2


def test_a_sample_counts_as_reused_only_when_all_its_choices_are(tmp_path: Path) -> None:
    choices = [request(doc, f"q{doc}", c, kind="loglikelihood") for doc in range(2) for c in "ab"]
    model, store = attached(tmp_path / "r", fail_after=3)
    with pytest.raises(RuntimeError):
        model.loglikelihood(choices)
    store.close()
    model, store = attached(tmp_path / "r")
    scores = model.loglikelihood(choices)
    assert store.reused == {("task", 0)}
    assert all(isinstance(s, tuple) and isinstance(s[1], bool) for s in scores)
    assert scores[0] == (-1 / 3, False)


@pytest.mark.parametrize("hooked", [True, False])
def test_each_repeat_has_its_own_response(tmp_path: Path, hooked: bool) -> None:
    repeats = [request(0, "q", {"do_sample": True})] * 3
    model, store = attached(tmp_path / "r", hooked=hooked)
    first = model.generate_until(repeats)
    store.close()
    assert len(set(first)) == 3
    model, _ = attached(tmp_path / "r")
    assert model.generate_until(repeats) == first
    model, _ = attached(tmp_path / "r")
    assert model.generate_until([*repeats, repeats[0]])[:3] == first
    assert len(model.calls) == 1


def test_different_arguments_are_a_different_request(tmp_path: Path) -> None:
    model, _ = attached(tmp_path / "r")
    model.generate_until([request(0, "q", {"max_gen_toks": 8})])
    model.generate_until([request(0, "q", {"max_gen_toks": 9})])
    assert len(model.calls) == 2


def test_stored_values_are_json(tmp_path: Path) -> None:
    model, store = attached(tmp_path / "r")
    model.loglikelihood_rolling([request(0, "text", kind="loglikelihood_rolling")])
    store.close()
    content = (tmp_path / "r").read_bytes()
    assert b'{"value": -1.0, "meta": null}' in content
    model, _ = attached(tmp_path / "r")
    assert model.loglikelihood_rolling([request(0, "text", kind="loglikelihood_rolling")]) == [-1.0]


def test_a_full_disk_is_one_line_and_loses_no_stored_answer(tmp_path: Path) -> None:
    store, stored = Responses(tmp_path / "r"), []
    store._db.execute("PRAGMA max_page_count = 8")

    def fill() -> None:
        for number in range(100):
            store.add_partial("generate_until", (str(number),), "x" * 1000)
            stored.append(number)

    with pytest.raises(InfrastructureError, match=r"cannot store .*/r \(database or disk is full\): those so"):
        fill()
    store.close()
    with sqlite3.connect(tmp_path / "r") as db:
        assert db.execute("SELECT count(*) FROM response").fetchone() == (len(stored),)
    assert 0 < len(stored) < 32


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.6, 0.99])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, keep: float) -> None:
    """Half a file, with and without its first page; an empty one is a new one."""
    file = tmp_path / "r"
    store = Responses(file)
    keys = [str(number) for number in range(20)]
    for key in keys:
        store.add_partial("generate_until", (key,), "x" * 1000)
    store.close()
    content = file.read_bytes()
    file.write_bytes(b"?" * 100 + content[100 : int(len(content) * keep)] if keep else b"")
    if not keep:
        Responses(file).close()
        return
    with pytest.raises(InfrastructureError, match=r"/r is damaged \(.*\): delete it to answer again"):
        Responses(file)
