"""Rows: leakage, length in the model's tokens, answers, determinism, caching, invalid input."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, prompts, rows, tokens
from lceval.tasks.finance import filings
from lceval.tasks.finance.companies import filings as invent
from lceval.tasks.parsing import normalize
from lceval.tasks.request import Request

CHAT_TEMPLATE = (
    "{{ bos_token }}<|im_start|>system\nYou are a careful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROW_FIELDS = set(rows.Row.__required_keys__)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on synthetic filings, with a start token and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((filing.body for filing in invent(random.Random(0))), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark; no chat template."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two saved tokenizers."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, make in (("bytes", byte_tokenizer), ("words", word_tokenizer)):
        make().save_pretrained(root / name)
    return {name: str(root / name) for name in ("bytes", "words")}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows_of(task: str, tokenizer: str | None = None, **metadata: Any) -> list[Any]:
    """The rows of a task."""
    return build.rows_of(catalogue.find(task), ({"pretrained": tokenizer} if tokenizer else {}) | metadata)


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def request_for(task: str, tokenizer: str, seed: int = 1234) -> build.Request:
    known = catalogue.find(task)
    assert known.length_k is not None
    meter = tokens.meter_for(task, {"pretrained": tokenizer})
    return Request(task, known.dataset, known.output_format, meter, known.length_k * 1024, seed)


def check_lengths(built: list[Any], meter: tokens.TokenMeter, limit: int) -> None:
    """Check every row by counting its complete prompt; the builder counts only one row per context."""
    totals = [count + 32 for count in meter.prompts([prompts.prompt(row) for row in built])]
    assert [row["length_tokens"] for row in built] == totals
    assert 0.98 * limit <= min(totals)
    assert max(totals) <= limit


def check_rows(built: list[Any]) -> None:
    assert len({row["id"] for row in built}) == len(built)
    for row in built:
        assert set(row) >= ROW_FIELDS
        assert row["context"] == prompts.block("documents", [document["text"] for document in row["docs"]])
        assert prompts.prompt(row).count(row["context"]) == 1
        pids = [document["pid"] for document in row["docs"]]
        assert len(set(pids)) == len(pids)
        assert set(row["gold_pids"]) <= set(pids)


def clusters(built: list[Any]) -> list[list[Any]]:
    by_cluster: dict[str, list[Any]] = {}
    for row in built:
        by_cluster.setdefault(row["cluster"], []).append(row)
    return list(by_cluster.values())


# Filings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
@pytest.mark.parametrize("limit", [1024, 2048])
def test_filings_meet_the_length_and_answers_occur_once(folders: dict[str, str], tokenizer: str, limit: int) -> None:
    meter = tokens.meter_for("t", {"pretrained": folders[tokenizer]})
    built = rows_of(f"lc_filings_ao_{limit // 1024}k", folders[tokenizer])
    check_rows(built)
    check_lengths(built, meter, limit)
    assert len(built) == 48
    assert [len(of) for of in clusters(built)] == [4] * 12
    for row in built:
        (answer,) = row["answers"]
        containing = [document["pid"] for document in row["docs"] if answer in document["text"]]
        assert containing == row["gold_pids"]
        assert normalize(row["context"]).count(normalize(answer)) == 1


def test_questions_on_a_context_are_on_different_facts(folders: dict[str, str]) -> None:
    for of in clusters(rows_of("lc_filings_ao_2k", folders["words"])):
        assert len({row["question"] for row in of}) == 4
        assert len({row["gold_pids"][0] for row in of}) == 4
        assert len({row["context"] for row in of}) == 1


def test_the_figures_of_a_filing_add_up() -> None:
    for filing in invent(random.Random(5)):
        amounts = {
            line.rsplit(" of ", 1)[0] if "segment" not in line else line: int(
                line.split(" | ")[1].strip("$ milon").replace(",", "")
            )
            for line in filing.body.split("\n")
            if line.endswith("million")
        }
        segments = [amount for item, amount in amounts.items() if "segment" in item]
        assert sum(segments) == amounts["Revenue"]
        assert 0 < amounts["Operating income"] < amounts["Revenue"] - amounts["Cost of sales"]


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_the_seed_determines_the_rows(folders: dict[str, str], tokenizer: str) -> None:
    first, again, other = (
        json.dumps(filings.rows(request_for("lc_filings_ao_1k", folders[tokenizer], seed)).build())
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


# Natural Questions --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bytes", "words"])
def nq(request: pytest.FixtureRequest, folders: dict[str, str], data_folder: Path) -> tuple[list[Any], Any]:
    """All rows of 2k with one of the tokenizers, and its meter."""
    row_request = request_for("lc_nqopen_ao_2k", folders[request.param])
    return build.row_builder(row_request.dataset)(row_request).build(), row_request.meter


def test_nqopen_meets_the_length(nq: tuple[list[Any], Any]) -> None:
    built, meter = nq
    check_lengths(built, meter, 2048)


def test_nqopen_has_four_hundred_questions_four_per_context(nq: tuple[list[Any], Any]) -> None:
    built, _ = nq
    check_rows(built)
    assert len(built) == 400
    assert [len(of) for of in clusters(built)] == [4] * 100
    assert all(len({row["context"] for row in of}) == 1 for of in clusters(built))


def test_only_a_questions_own_gold_passages_contain_its_answers(
    nq: tuple[list[Any], Any],
) -> None:
    for of in clusters(nq[0]):
        normal = {document["pid"]: normalize(document["text"]) for document in of[0]["docs"]}
        for row in of:
            answers = [normalize(answer) for answer in row["answers"]]
            assert all(answers)
            containing = {pid for pid, text in normal.items() if any(answer in text for answer in answers)}
            assert containing == set(row["gold_pids"])


def test_gold_passages_are_complete_and_one_is_in_each_quarter(nq: tuple[list[Any], Any], data_folder: Path) -> None:
    lines = (data_folder / "nq_open/passages.jsonl").read_text(encoding="utf-8").splitlines()
    pool = {record["pid"]: record["text"].strip() for record in map(json.loads, lines)}
    ends = {"first": 0, "last": 0}
    for of in clusters(nq[0]):
        pids = [document["pid"] for document in of[0]["docs"]]
        places = sorted(pids.index(row["gold_pids"][0]) for row in of)
        for quarter, place in enumerate(places):
            assert len(pids) * quarter // 4 <= place < len(pids) * (quarter + 1) // 4
        ends["first"] += places[0] == 0
        ends["last"] += places[-1] == len(pids) - 1
        assert all(document["text"] == pool[document["pid"]] for document in of[0]["docs"])
    assert min(ends.values()) >= 5


def test_lengths_share_their_questions(folders: dict[str, str], data_folder: Path) -> None:
    ids = [{row["id"] for row in rows_of(f"lc_nqopen_ao_{length}", folders["words"])} for length in ("2k", "4k")]
    assert len(ids[0] & ids[1]) >= 380


# QuALITY ------------------------------------------------------------------------------------------


def test_quality_has_every_question_with_and_without_a_tokenizer(folders: dict[str, str], data_folder: Path) -> None:
    measured, plain = rows_of("lc_quality_mc", folders["words"]), rows_of("lc_quality_mc")
    assert len(measured) == 111
    assert all(row["length_tokens"] > 2000 for row in measured)
    assert [{**row, "length_tokens": None} for row in measured] == plain
    for row in plain:
        assert row["answers"] == [row["choices"][row["gold"]]]
        assert row["cluster"] == row["gold_pids"][0] == row["docs"][0]["pid"]
        assert prompts.prompt(row).count(row["context"]) == 1


# The cache ----------------------------------------------------------------------------------------


def test_rows_are_built_once_and_cached_byte_for_byte(
    folders: dict[str, str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = {"lc_task": "lc_filings_ao_1k", "pretrained": folders["words"], "version": "1.0"}
    first = build.dataset(**metadata)["test"].to_list()
    (entry,) = (own_cache / "rows").iterdir()
    content = entry.read_bytes()
    entry.unlink()
    build.dataset(**metadata)
    assert entry.read_bytes() == content
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert build.dataset(**metadata)["test"].to_list() == first


@pytest.mark.parametrize("damage", [b"", b"[]\n", b'{"rows": 2}\n{}\n', b"\xff\xfe"])
def test_a_damaged_cache_entry_is_rebuilt(own_cache: Path, damage: bytes) -> None:
    built = [{"id": "a"}, {"id": "b"}]
    rows.cached_rows("t", {"x": 1}, lambda: built)
    (entry,) = (own_cache / "rows").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    assert rows.cached_rows("t", {"x": 1}, lambda: built) == built
    assert entry.read_bytes() == whole


def test_every_input_is_part_of_the_cache_key(own_cache: Path) -> None:
    for inputs in ({"seed": 1}, {"seed": 2}, {"seed": 1, "limit": 3}):
        rows.cached_rows("t", inputs, list)
    assert len(list((own_cache / "rows").iterdir())) == 3


@pytest.mark.parametrize("name", ["compose.py", "modes/ao.yaml", "icr/nqopen.yaml"])
def test_a_changed_source_or_template_changes_the_cache_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, read = rows.code_digest.__wrapped__, Path.read_bytes
    before = digest()
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" " * path.match(name))
    assert digest() != before


def test_an_unwritable_cache_is_reported_and_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "file"))
    assert rows.cached_rows("t", {}, lambda: [{"id": "a"}]) == [{"id": "a"}]
    assert "LCEVAL_CACHE" in caplog.text


# Invalid input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["lc_nqopen_ao_2k", "lc_filings_ao_2k"])
def test_without_a_tokenizer_the_error_names_the_arguments(task: str) -> None:
    with pytest.raises(UserError, match=r"pretrained=\.\.\. or tokenizer=\.\.\.") as caught:
        rows_of(task)
    assert one_line(caught).startswith("lc_")


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-folder") as caught:
        rows_of("lc_filings_ao_1k", str(tmp_path / "no-such-folder"))
    one_line(caught)


def test_aliases_resolve_to_a_folder(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokens.ALIASES, "a-short-name", lambda: folders["words"])
    meter = tokens.meter_for("t", {"pretrained": "a-short-name"})
    assert meter.fingerprint == tokens.meter_for("t", {"pretrained": folders["words"]}).fingerprint


def test_without_a_data_folder_the_error_names_the_variable_and_the_files(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LCEVAL_DATA", raising=False)
    with pytest.raises(UserError, match=r"LCEVAL_DATA is not set.*nq_open/questions\.jsonl") as caught:
        rows_of("lc_nqopen_ao_2k", folders["words"])
    one_line(caught)
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"quality/stories\.jsonl and quality/questions\.jsonl") as caught:
        rows_of("lc_quality_mc")
    one_line(caught)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not a JSON object"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"question": "q", "gold_pids": ["p"]}', "answers=None"),
        ('{"question": "q", "answers": [], "gold_pids": ["p"]}', r"answers=\[\]"),
        ('{"question": "q", "answers": ["a"], "gold_pids": ["other"]}', "other"),
        ("", "is empty"),
    ],
)
def test_invalid_data_raises_with_its_location(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    (tmp_path / "nq_open").mkdir()
    (tmp_path / "nq_open/questions.jsonl").write_text(line)
    (tmp_path / "nq_open/passages.jsonl").write_text('{"pid": "p", "title": "", "text": "a"}\n')
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        rows_of("lc_nqopen_ao_2k", folders["words"])
    assert "nq_open" in one_line(caught)


def test_a_pool_that_is_too_small_is_an_error_not_a_short_task(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nq_open").mkdir()
    questions = [{"question": f"q{n}", "answers": [f"x{n}y"], "gold_pids": [f"p{n}"]} for n in range(8)]
    passages = [{"pid": f"p{n}", "title": "", "text": f"about x{n}y"} for n in range(8)]
    for name, records in (("nq_open/questions.jsonl", questions), ("nq_open/passages.jsonl", passages)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    with pytest.raises(UserError, match="larger pool") as caught:
        rows_of("lc_nqopen_ao_2k", folders["words"])
    one_line(caught)


@pytest.mark.parametrize("seed", ["abc", 1.5, None, True])
def test_a_seed_that_is_not_an_integer_raises(folders: dict[str, str], seed: object) -> None:
    with pytest.raises(UserError, match="data_seed") as caught:
        rows_of("lc_filings_ao_1k", folders["words"], data_seed=seed)
    one_line(caught)


# The meter ----------------------------------------------------------------------------------------


def test_the_start_token_is_counted_once_with_and_without_the_template(folders: dict[str, str]) -> None:
    with_template = byte_tokenizer()
    plain = byte_tokenizer()
    plain.chat_template = None
    rendered = with_template.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    expected = len(with_template(rendered, add_special_tokens=False)["input_ids"])
    assert tokens.TokenMeter(with_template).prompts(["hello"]) == [expected]
    alone = len(plain("hello", add_special_tokens=False)["input_ids"])
    assert tokens.TokenMeter(plain).prompts(["hello"]) == [alone + 1]
    assert tokens.TokenMeter(plain, add_bos=False).prompts(["hello"]) == [alone]
    assert tokens.TokenMeter(with_template).template_tokens == expected - alone - 1


def test_a_template_without_a_system_turn_does_not_make_a_prompt_too_long() -> None:
    """lm-eval drops the instruction with such a template, and writes it before the prompt without one."""
    tokenizer = byte_tokenizer()
    plain = len(tokenizer("Be brief.hello")["input_ids"])
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + CHAT_TEMPLATE
    (total,) = tokens.TokenMeter(tokenizer, system="Be brief.").prompts(["hello"])
    (without,) = tokens.TokenMeter(tokenizer).prompts(["hello"])
    assert total >= max(plain, without)


def test_the_fingerprint_differs_between_tokenizers_and_templates() -> None:
    other = byte_tokenizer()
    other.chat_template = None
    meters = [
        tokens.TokenMeter(byte_tokenizer()),
        tokens.TokenMeter(byte_tokenizer(), add_bos=False),
        tokens.TokenMeter(byte_tokenizer(), template_args={"enable_thinking": False}),
        tokens.TokenMeter(byte_tokenizer(), system="Be brief."),
        tokens.TokenMeter(other),
        tokens.TokenMeter(word_tokenizer()),
    ]
    assert len({meter.fingerprint for meter in meters}) == len(meters)
    assert meters[0].fingerprint == tokens.TokenMeter(byte_tokenizer()).fingerprint
