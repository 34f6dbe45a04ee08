"""`lceval methods`: every KV method with the keys, defaults and text of its policy."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from torch import Tensor

from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.models import recipe
from lceval.models.policies import EVICTORS, QUANTIZERS, SPARSE_ATTENTION, Evictor, LayerView, Wrapper
from lceval.runs import methods

NAMES = ["full", *EVICTORS, *QUANTIZERS, *SPARSE_ATTENTION]
AXES = {
    **dict.fromkeys(EVICTORS, "evict"),
    **dict.fromkeys(QUANTIZERS, "quantize"),
    **dict.fromkeys(SPARSE_ATTENTION, "sparse attention"),
    "full": None,
}


def test_all_methods_are_listed_with_their_axis() -> None:
    assert {record["method"]: record["axis"] for record in methods.records()} == AXES
    first_words = [line.split(" ")[0].split(":")[0] for line in methods.text().splitlines()[1:-6]]
    mixed = [name for name in NAMES if re.fullmatch("kv.*v.*", name)]
    assert first_words == list(dict.fromkeys("kvAvB" if name in mixed else name for name in NAMES))


@pytest.mark.parametrize("name", NAMES[1:])
def test_keys_defaults_and_types_are_those_of_the_dataclass(name: str) -> None:
    cls: Any = QUANTIZERS.get(name) or EVICTORS.get(name) or SPARSE_ATTENTION[name]
    expected = {
        f.name: {"default": f.default, "type": str(f.type).partition(" |")[0]}
        for f in dataclasses.fields(cls)
        if f.default is not dataclasses.MISSING and f.metadata.get("key", True)
    }
    if issubclass(cls, Wrapper):
        expected["of"] = {"default": "snapkv", "type": "str"}
    record = methods.record(name)
    assert record["keys"] == expected
    assert ("always" in record["when"]) == ("when" in expected)
    assert ("chunk" in record["when"]) == (
        name in ("streaming", "lacache", "tova", "snapkv", "knorm", "keydiff", "rkv", "kvzap")
    )
    text = methods.text(name)
    spelled = {
        k: v["type"].upper() if v["default"] is None else recipe.spelled(v["default"]) for k, v in expected.items()
    }
    assert all(f"{key}={value}" in text for key, value in spelled.items() if key != "when")
    assert not record["when"] or "when: prefill" in text
    assert record["threshold"] == ("threshold=FLOAT" in text) == (name in ("kvzap", "kvzip", "knorm", "keydiff"))


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_valid_recipes_and_the_description_is_one_sentence(name: str) -> None:
    record = methods.record(name)
    for example in record["examples"]:
        assert name in str(recipe.parse(example))
        assert example in methods.text(name)
    assert record["description"].endswith(".")
    assert "\n" not in record["description"]
    # Each method but the full cache and the random baseline is from a paper.
    assert (record["source"] is None) == (name in ("full", "random"))


def test_every_value_of_when_is_accepted_and_no_other() -> None:
    for name in EVICTORS:
        for when in methods.record(name)["when"]:
            recipe.parse(f"{name}:25:when={when}")
        with pytest.raises(UserError):
            recipe.parse(f"{name}:0.25:when=never")


def test_source_details_differences_and_cost_are_parts_of_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class New(Evictor):
        """Keep the best tokens
        (Doe et al. 2026, eq. 3).

        More on that.

        Differs from the paper: in
        one point.

        Cost: none.
        """

        width: int = 3

        def scores(self, layer: LayerView) -> Tensor:
            raise NotImplementedError

    monkeypatch.setitem(EVICTORS, "new", New)
    monkeypatch.setattr(recipe, "NAMES", [*recipe.NAMES, "new"])
    assert methods.record("new") == {
        "method": "new",
        "axis": "evict",
        "amount": True,
        "threshold": False,
        "keys": {"width": {"default": 3, "type": "int"}},
        "when": ["prefill"],
        "description": "Keep the best tokens.",
        "source": "Doe et al. 2026, eq. 3",
        "details": "More on that.",
        "differences": "in one point.",
        "cost": "none.",
        "examples": ["new:0.25", "new:0.25+int4+quest:0.1"],
    }


def test_the_command_prints_a_table_one_method_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["methods"]) == 0
    assert "METHOD" in capsys.readouterr().out
    assert invoke(["methods", "snapkv"]) == 0
    assert "window=64 (int)" in capsys.readouterr().out
    assert invoke(["methods", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == methods.records()
    assert invoke(["methods", "quest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == methods.record("quest")


@pytest.mark.parametrize(("name", "message"), [("snapk", "did you mean 'snapkv'?"), ("zzz", "known: full, streaming")])
def test_an_unknown_method_is_one_line_and_exit_2(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["methods", name]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
