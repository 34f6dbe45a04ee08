"""Rows of the key-value lookup: length, depth of the target pair, documents, invalid input."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lceval.core.errors import UserError
from lceval.tasks import build as tasks_build
from lceval.tasks import catalogue, prompts, rows, scoring, tokens
from lceval.tasks.icr import kvlookup
from lceval.tasks.request import Request

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer(pattern: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each match of a pattern and each segment between matches."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    fast.chat_template = template
    return fast


DIGITS = r"\s|[0-9]|[a-z]+|[^a-z0-9\s]"
TOKENIZERS = {
    "digits": tokenizer(DIGITS),
    "digits in a template": tokenizer(DIGITS, CHAT_TEMPLATE),
    "characters": tokenizer(r"[\s\S]"),
    "words": tokenizer(r"\s|\w+|[^\w\s]"),
}


def uuids(count: int, name: str) -> list[str]:
    return [str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name} {number}")) for number in range(count)]


def record(pairs: int, target: int, name: str = "") -> dict[str, Any]:
    records = [list(pair) for pair in zip(uuids(pairs, f"{name} key"), uuids(pairs, f"{name} value"), strict=True)]
    return {"ordered_kv_records": records, "key": records[target][0], "value": records[target][1]}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes lines or records into a data folder."""
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))

    def write(*records: Any) -> Any:
        file = tmp_path / kvlookup.RECORDS
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))

    return write


def build(_: None, name: str, limit: int) -> tuple[list[Any], tokens.TokenMeter]:
    meter = tokens.TokenMeter(TOKENIZERS[name])
    return rows_with(meter, limit), meter


def rows_with(meter: tokens.TokenMeter, limit: int) -> list[Any]:
    dataset = catalogue.datasets()["kvlookup"]
    return kvlookup.rows(Request("lc_kvlookup_ao", dataset, "pair", meter, limit, 1234)).build()


def check(built: list[Any], meter: tokens.TokenMeter, limit: int) -> None:
    for row in built:
        assert set(row) >= set(rows.Row.__required_keys__)
        (counted,) = meter.prompts([prompts.prompt(row)])
        assert row["length_tokens"] == counted + 64
        assert 0.98 * limit <= row["length_tokens"] <= limit
        assert row["context"].split("\n") == [document["text"] for document in row["docs"]]
        assert prompts.prompt(row).count(row["context"]) == 1
        assert "[DOC" not in prompts.prompt(row)
        pairs = json.loads("{" + row["context"].replace("\n", ",") + "}")
        assert list(pairs) == [document["pid"] for document in row["docs"]]
        assert row["answers"] == [pairs[row["gold_pids"][0]]]
        assert f'"{row["gold_pids"][0]}"' in row["question"]
        assert row["context"].count(row["answers"][0]) == 1
    for field in ("id", "cluster", "context"):
        assert len({row[field] for row in built}) == len(built)


@pytest.mark.parametrize(("name", "limit"), [("digits", 4096), ("digits in a template", 4096), ("characters", 4096)])
def test_rows_meet_the_length_and_have_one_pair_per_line(source: Any, name: str, limit: int) -> None:
    built, meter = build(source(*(record(140, target, str(target)) for target in (0, 63, 139))), name, limit)
    assert len(built) == 3
    check(built, meter, limit)


def test_every_list_of_the_published_data_becomes_a_row(data_folder: Path) -> None:
    built, meter = build(None, "digits in a template", 4096)
    assert len(built) == 50
    check(built, meter, 4096)
    places = [[d["pid"] for d in row["docs"]].index(row["gold_pids"][0]) / len(row["docs"]) for row in built]
    assert {int(4 * place) for place in places} == {0, 1, 2, 3}
    assert sum(place > 0.95 for place in places) <= 5


def test_every_reply_fits_in_the_packaged_models_tokens(data_folder: Path, smollm2: str) -> None:
    meter = tokens.meter_for("t", {"pretrained": smollm2})
    built = rows_with(meter, 4096)
    check(built, meter, 4096)
    replies = meter.pieces([f'{row["reply_prefix"]} "{row["answers"][0]}".\n' for row in built])
    assert max(replies) < 64


# Selected pairs -----------------------------------------------------------------------------------


@given(st.integers(1, 150).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(1, n))))
def test_truncation_drops_pairs_from_the_end_and_keeps_the_depth_of_the_target(sizes: tuple[int, int, int]) -> None:
    total, target, count = sizes
    pairs = tuple((f"k{number}", f"v{number}") for number in range(total))
    included = kvlookup.Lookup("id", pairs, target).first(count)
    assert len(included) == count
    others = [pair for pair in included if pair != pairs[target]]
    assert others == [pair for pair in pairs if pair != pairs[target]][: count - 1]
    assert included.index(pairs[target]) == pytest.approx(target * (count - 1) / max(total - 1, 1), abs=0.5)
    assert count < total or tuple(included) == pairs


def test_a_longer_task_only_adds_pairs(source: Any) -> None:
    records = source(record(140, 100))
    (short,), (long,) = (build(records, "digits", limit)[0] for limit in (4096, 8192))
    assert {d["pid"] for d in short["docs"]} < {d["pid"] for d in long["docs"]}
    assert (short["id"], short["question"]) == (long["id"], long["question"])
    assert short["cluster"] != long["cluster"]


# The reply ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('Answer: "{}"', 1.0),
        ("Answer: {}", 1.0),
        ("The value is {}.", 1.0),
        ('Answer: "{}', 1.0),
        ("Answer: 0d7b", 0.0),
    ],
)
def test_a_value_matches_with_and_without_quotes(reply: str, score: float) -> None:
    value = uuids(1, "value")[0]
    assert scoring.answer_results({"answers": [value]}, [reply.format(value)])["subem"] == score


def test_a_truncated_value_is_wrong() -> None:
    value = uuids(1, "value")[0]
    assert scoring.answer_results({"answers": [value]}, [f"Answer: {value[:-1]}"])["subem"] == 0.0


# Invalid input ------------------------------------------------------------------------------------


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_list_too_short_for_the_length_raises_with_its_size(source: Any) -> None:
    records = source(record(140, 3), record(20, 3))
    with pytest.raises(UserError, match=r"20 pairs of kvlookup-001 .* choose a shorter task") as caught:
        build(records, "digits", 4096)
    assert one_line(caught).startswith("lc_kvlookup_ao")
    with pytest.raises(UserError, match="140 pairs of kvlookup-000"):
        build(records, "words", 4096)


def test_pairs_too_long_for_the_length_tolerance_raise(source: Any) -> None:
    records = source(*(record(140, number, str(number)) for number in range(9)))
    with pytest.raises(UserError, match=r"1024 tokens of this tokenizer within 2%: use a longer task") as caught:
        build(records, "digits", 1024)
    one_line(caught)


PAIRS = [["k", "v"], ["g", "w"]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"key": "k"}', "line 1: invalid value=None"),
        ({"key": "k", "value": "v"}, "record 1: invalid ordered_kv_records"),
        ({"key": "k", "value": "v", "ordered_kv_records": {"k": "v"}}, "record 1: invalid ordered_kv_records"),
        ({"key": "k", "value": "v", "ordered_kv_records": [*PAIRS, ["h"]]}, "record 1: invalid ordered_kv_records"),
        ({"key": "k", "value": "v", "ordered_kv_records": [*PAIRS, ["h", 1]]}, "record 1: invalid ordered_kv_records"),
        ({"key": "k", "value": "v", "ordered_kv_records": [*PAIRS, ["k", "x"]]}, "record 1: duplicate key"),
        ({"key": "k", "value": "w", "ordered_kv_records": PAIRS}, r"the pair \['k', 'w'\] is not in"),
        ({"key": "k", "value": "v", "ordered_kv_records": []}, r"the pair \['k', 'v'\] is not in"),
    ],
)
def test_invalid_data_raises_with_its_location(source: Any, bad: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(source(bad), "digits", 4096)
    assert kvlookup.RECORDS in one_line(caught)


def test_a_missing_tokenizer_or_data_folder_is_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"lc_kvlookup_ao_4k .*pretrained=\.\.\."):
        tasks_build.dataset(lc_task="lc_kvlookup_ao_4k")
    with pytest.raises(UserError, match=r"unknown task 'lc_kvlookup_ao_3k'; did you mean lc_kvlookup_ao_"):
        tasks_build.dataset(lc_task="lc_kvlookup_ao_3k")
    monkeypatch.delenv("LCEVAL_DATA", raising=False)
    TOKENIZERS["digits"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"LCEVAL_DATA is not set.*{kvlookup.RECORDS}") as caught:
        tasks_build.dataset(lc_task="lc_kvlookup_ao_4k", pretrained=str(tmp_path))
    one_line(caught)


def test_rows_are_loaded_from_the_cache(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(record(140, 70))
    TOKENIZERS["digits"].save_pretrained(tmp_path / "tokenizer")
    metadata = {"lc_task": "lc_kvlookup_ao_4k", "pretrained": str(tmp_path / "tokenizer"), "version": "1.0"}
    first = tasks_build.dataset(**metadata)["test"].to_list()
    monkeypatch.setattr(tasks_build, "_build", lambda *_: pytest.fail("built again"))
    assert tasks_build.dataset(**metadata)["test"].to_list() == first
