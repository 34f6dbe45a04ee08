"""HELMET's files: schemas, length, depth of gold passages, skipped questions, and the archive."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lceval.core.errors import InfrastructureError, UserError
from lceval.tasks import build, catalogue, prompts, rows, tokens
from lceval.tasks.icr import helmet, helmet_archive, helmet_files
from lceval.tasks.request import Request
from lceval.tasks.rows import Document

DATASETS = ("nq", "triviaqa", "hotpotqa", "popqa")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token for a word, a punctuation mark or a run of white space."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+| |\w+|[^\w\s]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    fast.chat_template = template
    return fast


METERS = {name: tokens.TokenMeter(tokenizer(template)) for name, template in (("plain", None), ("chat", TEMPLATE))}


def passage(question: int, rank: int) -> dict[str, Any]:
    """About 55 words: 110 tokens of the tokenizer above."""
    rng = random.Random(f"{question} {rank}")
    words = [f"w{rng.randrange(10**6)}" for _ in range(rng.randrange(48, 62))]
    return {"title": f"Title {rank}", "text": f" p{question}x{rank} {' '.join(words)}."}


def record(dataset: str, question: int, depth: int, count: int, depths: int = 6) -> dict[str, Any]:
    """A record in the schema of the dataset's file, with the gold passage at one of `depths` positions of `count`."""
    key = "id" if dataset == "popqa" else "psg_id"
    own = [{**passage(question, rank), key: str(1000 * question + rank)} for rank in range(1, count)]
    gold = {"title": "Gold", "text": f"The answer to it is answer{question}.", key: str(1000 * question)}
    place = round(depth * (count - 1) / (depths - 1))
    ctxs = [*own[:place], gold, *own[place:]]
    fields: dict[str, Any] = {"question": f"What is the answer to number {question}?", "answers": [f"answer{question}"]}
    if dataset == "popqa":
        ctxs = [{**ctx, "has_answer": ctx is gold, "score": 1.0} for ctx in ctxs]
        return {**fields, "id": 7000 + question, "s_pop": 10 * question + 1, "ctxs": ctxs}
    if dataset != "nq":
        fields["id"] = f"dev-{question}"
    return {**fields, "ctxs": ctxs, "positive_ctxs": [{key: gold[key], "title": "Gold", "text": gold["text"]}]}


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes a dataset's file of K passages, as in the archive, into the data folder."""
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))

    def make(dataset: str, k: int, records: list[Any]) -> Path:
        hub = catalogue.datasets()[dataset].hub
        assert hub is not None
        file = tmp_path / "hub" / hub.repo / hub.files[str(k)]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return file

    return make


def request(name: str, meter: str = "plain", seed: int = 1234) -> build.Request:
    task = catalogue.find(name)
    assert task.length_k is not None
    return Request(name, task.dataset, task.output_format, METERS[meter], task.length_k * 1024, seed)


def built(name: str, meter: str = "plain", seed: int = 1234) -> list[Any]:
    return helmet.rows(request(name, meter, seed)).build()


def check(task_rows: list[Any], meter: str, limit: int, reply: int) -> None:
    for row in task_rows:
        assert set(row) >= set(rows.Row.__required_keys__)
        (counted,) = METERS[meter].prompts([prompts.prompt(row)])
        assert row["length_tokens"] == counted + reply
        assert 0.98 * limit <= row["length_tokens"] <= limit
        pids = [document["pid"] for document in row["docs"]]
        assert len(set(pids)) == len(pids)
        assert row["context"].count(row["answers"][0]) == 1
        assert "Title" not in row["context"]


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_record_of_each_file_becomes_a_row(dataset: str, put: Callable[..., Path]) -> None:
    put(dataset, 20, [record(dataset, 3, 2, 60)])
    put(dataset, 50, [record(dataset, 3, 2, 60)])
    (row,) = built(f"lc_{dataset}_id_4k")
    check([row], "plain", 4096, 96)
    assert row["question"] == "What is the answer to number 3?"
    assert row["answers"] == ["answer3"]
    assert row["gold_pids"] == ["3000"]
    assert next(d for d in row["docs"] if d["pid"] == "3000") == {
        "pid": "3000",
        "title": "Gold",
        "text": "The answer to it is answer3.",
    }
    assert row["id"] == f"{row['cluster']}-0"
    assert row["cluster"].startswith(f"{dataset}-")
    assert row["source"].startswith(f"princeton-nlp/HELMET/{catalogue.datasets()[dataset].hub.files['20']} sha256:")  # type: ignore[union-attr]
    assert row["context_setting"] == "full"
    assert row["reply_prefix"] == prompts.FINAL_PREFIX
    assert "MIT" in row["licence"]
    assert row["context"].startswith("[DOC 0]\np3x1 ")


@pytest.mark.parametrize(("meter", "limit"), [("plain", 4096), ("chat", 4096), ("chat", 8192)])
def test_rows_meet_the_length_in_the_order_of_the_file(meter: str, limit: int, put: Callable[..., Path]) -> None:
    k = {4096: 20, 8192: 50}[limit]
    records = [record("nq", question, depth, 100) for question in range(4) for depth in range(6)]
    put("nq", k, records)
    put("nq", {20: 50, 50: 105}[k], [])
    task_rows = built(f"lc_nq_ao_{limit // 1024}k", meter)
    assert len(task_rows) == 24
    check(task_rows, meter, limit, 32)
    for row in task_rows:
        ranks = [int(d["pid"]) % 1000 for d in row["docs"] if d["pid"] not in row["gold_pids"]]
        assert ranks == sorted(ranks)
        # Passages are left out only at the end, where the last few fill the length.
        assert ranks[: len(ranks) - 5] == list(range(1, len(ranks) - 4))
        assert max(ranks) <= len(ranks) + 14


def test_gold_passages_are_at_the_depths_of_the_file(put: Callable[..., Path]) -> None:
    put("nq", 20, [record("nq", 1, depth, 100) for depth in range(6)])
    put("nq", 50, [])
    places = [[d["pid"] for d in row["docs"]].index("1000") / (len(row["docs"]) - 1) for row in built("lc_nq_ao_4k")]
    assert places == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1], abs=0.02)


def test_a_question_with_too_few_passages_is_taken_from_the_next_file_or_skipped(
    put: Callable[..., Path],
) -> None:
    put("hotpotqa", 20, [record("hotpotqa", q, depth, 20, 3) for q in range(3) for depth in range(3)])
    put("hotpotqa", 50, [record("hotpotqa", q, depth, 50, 3) for q in (0, 2) for depth in range(3)])
    task_rows = built("lc_hotpotqa_ao_4k")
    check(task_rows, "plain", 4096, 32)
    assert {row["answers"][0] for row in task_rows} == {"answer0", "answer2"}
    assert all("k50_dep3" in row["source"] for row in task_rows)
    assert [row["id"][-2:] for row in task_rows] == ["-0", "-1", "-2"] * 2
    assert len({row["cluster"] for row in task_rows}) == 2


def test_too_few_passages_for_every_question_raises(put: Callable[..., Path]) -> None:
    put("nq", 440, [record("nq", 1, 0, 20)])
    put("nq", 1000, [record("nq", 1, 0, 40)])
    with pytest.raises(
        UserError, match=r"lc_nq_ao_64k: no question has passages of 65536 tokens .*k440.* or .*k1000"
    ) as caught:
        built("lc_nq_ao_64k")
    one_line(caught)
    with pytest.raises(UserError, match=r"lc_nq_ao_128k: no question"):
        built("lc_nq_ao_128k")


def test_popqa_has_only_long_tail_entities(put: Callable[..., Path]) -> None:
    records = [record("popqa", question, 0, 60) for question in (1, 98, 99, 100, 500)]
    records[2]["s_pop"] = 1000
    put("popqa", 20, records)
    put("popqa", 50, [])
    assert {row["answers"][0] for row in built("lc_popqa_ao_4k")} == {"answer1", "answer98"}


def test_the_seed_determines_the_questions(put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    put("nq", 20, [record("nq", question, 0, 60) for question in range(12)])
    put("nq", 50, [])
    monkeypatch.setattr(helmet, "_USUAL_QUESTIONS", 4)
    first, again, other = (built("lc_nq_ao_4k", seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert len(first) == len(other) == 4
    assert {row["cluster"] for row in first} != {row["cluster"] for row in other}


def test_lengths_share_their_first_questions(put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for k in (20, 50, 105):
        put("nq", k, [record("nq", question, 0, 100) for question in range(8)])
    monkeypatch.setattr(helmet, "_USUAL_QUESTIONS", 3)
    assert [row["id"] for row in built("lc_nq_ao_4k")] == [row["id"] for row in built("lc_nq_ao_8k")]


def test_a_duplicate_passage_is_used_once(put: Callable[..., Path]) -> None:
    twice = record("nq", 1, 0, 60)
    twice["ctxs"] += twice["ctxs"][:3]
    put("nq", 20, [twice])
    put("nq", 50, [])
    check(built("lc_nq_ao_4k"), "plain", 4096, 32)


def test_gold_ids_without_a_passage_raise(put: Callable[..., Path]) -> None:
    other = record("nq", 1, 0, 60)
    other["positive_ctxs"] = [{"psg_id": "elsewhere"}]
    put("nq", 20, [other])
    put("nq", 50, [])
    with pytest.raises(UserError, match="no gold id of") as caught:
        built("lc_nq_ao_4k")
    one_line(caught)


def test_gold_context_and_none_come_from_the_same_rows(put: Callable[..., Path], tmp_path: Path) -> None:
    put("nq", 20, [record("nq", 1, depth, 60) for depth in range(6)])
    put("nq", 50, [])
    tokenizer(None).save_pretrained(tmp_path / "words")
    task, metadata = catalogue.find("lc_nq_ao_4k"), {"pretrained": str(tmp_path / "words")}
    gold = build.rows_of(task, {**metadata, "context": "gold"})
    assert {row["context"] for row in gold} == {"[DOC 0]\nThe answer to it is answer1."}
    assert {row["context"] for row in build.rows_of(task, {**metadata, "context": "none"})} == {""}


@given(st.data())
def test_gold_documents_keep_their_order_and_relative_depth(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    documents = [Document(pid=str(n), title="", text="") for n in range(count)]
    gold = sorted(data.draw(st.sets(st.integers(0, count - 1), max_size=4)))
    others = [n for n in range(count) if n not in gold]
    kept = sorted(data.draw(st.sets(st.sampled_from(others)))) if others else []
    order = [int(d["pid"]) for d in helmet.arrange(documents, [str(n) for n in gold], [str(n) for n in kept])]
    assert [n for n in order if n in gold] == gold
    assert [n for n in order if n not in gold] == kept
    for n in gold:
        before, share = sum(o < n for o in others), len(kept) / max(len(others), 1)
        assert sum(o not in gold for o in order[: order.index(n)]) == pytest.approx(before * share, abs=0.5)
    assert kept != others or order == list(range(count))


@given(st.lists(st.integers(90, 160), min_size=1, max_size=60), st.integers(-50, 9000))
def test_packed_never_exceeds_the_capacity_and_fills_it_in_order(costs: list[int], capacity: int) -> None:
    chosen = helmet.packed(capacity, costs)
    total = sum(costs[index] for index in chosen)
    assert total <= max(capacity, 0)
    assert chosen == sorted(set(chosen))
    assert capacity < sum(costs) or len(chosen) == len(costs)
    front = max(len(chosen) - 5, 0)
    assert chosen[:front] == list(range(front))


# Invalid input ------------------------------------------------------------------------------------


def without(field: str, dataset: str = "nq") -> dict[str, Any]:
    incomplete = record(dataset, 1, 0, 3)
    del incomplete[field]
    return incomplete


@pytest.mark.parametrize(
    ("dataset", "bad", "message"),
    [
        ("nq", "{", "line 2 is not a JSON object"),
        ("nq", "[]", "line 2 is not a JSON object"),
        ("nq", without("question"), "line 2: invalid question=None"),
        ("nq", {**record("nq", 1, 0, 3), "answers": []}, r"line 2: invalid answers=\[\]"),
        ("nq", {**record("nq", 1, 0, 3), "ctxs": [{"title": "", "text": "no id"}]}, "line 2: invalid ctxs="),
        ("nq", without("positive_ctxs"), "line 2: invalid positive_ctxs=None"),
        (
            "triviaqa",
            {**record("triviaqa", 1, 0, 3), "positive_ctxs": [{"title": ""}]},
            "line 2: invalid positive_ctxs=",
        ),
        ("popqa", {**record("popqa", 1, 0, 3), "s_pop": "many"}, "line 2: invalid s_pop='many'"),
        ("popqa", {**record("nq", 1, 0, 3), "s_pop": 5}, "line 2: invalid ctxs="),
    ],
)
def test_an_invalid_line_raises_with_its_location(
    dataset: str, bad: Any, message: str, put: Callable[..., Path]
) -> None:
    put(dataset, 20, [record(dataset, 0, 0, 60), bad])
    put(dataset, 50, [])
    with pytest.raises(UserError, match=message) as caught:
        built(f"lc_{dataset}_ao_4k")
    assert "princeton-nlp/HELMET/data/kilt/" in one_line(caught)


def test_without_the_files_the_error_names_the_fetch_command(
    put: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"missing hub/princeton-nlp/HELMET/data/kilt/nq-.*k20_.*data fetch nq`"
    ) as caught:
        built("lc_nq_ao_4k")
    assert str(tmp_path) in one_line(caught)
    monkeypatch.delenv("LCEVAL_DATA")
    with pytest.raises(UserError, match=r"LCEVAL_DATA is not set: `lceval data fetch popqa`") as caught:
        built("lc_popqa_ao_8k")
    one_line(caught)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_length_has_its_file_and_no_group_requires_the_archive(dataset: str) -> None:
    known = catalogue.datasets()[dataset]
    assert known.hub is not None
    assert list(known.hub.files) == ["20", "50", "105", "220", "440", "1000"]
    assert all(f"_k{k}_dep" in name for k, name in known.hub.files.items())
    assert len(known.lengths) == len(known.hub.files)
    assert set(known.modes) == {"ao", "id", "idc", "idq", "rj", "docid"}
    assert not any(f"lc_{dataset}_" in member for member in catalogue.groups()["lc_icr"])


# The archive --------------------------------------------------------------------------------------


def archive(members: dict[str, bytes | None]) -> bytes:
    """A gzipped tar; None is a folder."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return archive.getvalue()


class Stream(io.RawIOBase):
    """Bytes that can be read once, with a count of those read."""

    def __init__(self, content: bytes) -> None:
        self._content, self.taken = io.BytesIO(content), 0

    def read(self, size: int = -1) -> bytes:
        got = self._content.read(size)
        self.taken += len(got)
        return got


NOISE = random.Random(5).randbytes(6_000_000)
MEMBERS = {
    "data": None,
    "data/kilt/a.jsonl": b"a\n",
    "data/other": b"x",
    "./data/kilt/b.jsonl": b"b" * 9000,
    "z": NOISE,
}


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_only_required_files_are_extracted_and_reading_stops_after_them(tmp_path: Path) -> None:
    stream = Stream(archive(MEMBERS))
    required = {"data/kilt/a.jsonl", "data/kilt/b.jsonl"}
    assert helmet_archive.fetch_members(stream, required, tmp_path) == required  # type: ignore[arg-type]
    assert files(tmp_path) == sorted(required)
    assert (tmp_path / "data/kilt/b.jsonl").read_bytes() == b"b" * 9000
    assert stream.taken < 3_000_000


def test_a_name_that_is_not_in_the_archive_is_not_extracted(tmp_path: Path) -> None:
    whole = io.BytesIO(archive(MEMBERS))
    assert helmet_archive.fetch_members(whole, {"data", "other", "data/kilt/a.jsonl"}, tmp_path) == {
        "data/kilt/a.jsonl"
    }
    assert files(tmp_path) == ["data/kilt/a.jsonl"]


@pytest.mark.parametrize("name", ["../out", "/etc/out", "data/../../out"])
def test_a_name_outside_of_the_folder_raises(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside of the folder"):
        helmet_archive.fetch_members(io.BytesIO(archive({name: b"x"})), {name}, tmp_path / "in")
    assert files(tmp_path) == []


def test_a_truncated_archive_leaves_only_complete_files(tmp_path: Path) -> None:
    whole = archive({"first": b"1" * 100, "second": NOISE})
    with pytest.raises((EOFError, tarfile.TarError, OSError)):
        helmet_archive.fetch_members(io.BytesIO(whole[:3_000_000]), {"first", "second"}, tmp_path)
    assert files(tmp_path) == ["first"]
    assert (tmp_path / "first").read_bytes() == b"1" * 100


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub whose archive has the files of "members"; "opened" lists opened files."""
    state: dict[str, Any] = {"members": {}, "opened": []}

    class FileSystem:
        def open(self, path: str, mode: str, *, revision: str, block_size: int) -> io.BytesIO:
            state["opened"].append((path, revision))
            if isinstance(state["members"], Exception):
                raise state["members"]
            return io.BytesIO(archive(state["members"]))

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    return state


def test_fetch_downloads_missing_files_from_the_pinned_archive(hub: dict[str, Any], put: Callable[..., Path]) -> None:
    dataset = catalogue.datasets()["nq"]
    assert dataset.hub is not None
    own = put("nq", 20, [record("nq", 1, 0, 60)])
    kept = own.read_bytes()
    hub["members"] = dict.fromkeys(dataset.hub.files.values(), b"new\n")
    root = Path(str(own).split("/hub/")[0])
    helmet_archive.fetch(dataset, root)
    assert hub["opened"] == [("datasets/princeton-nlp/HELMET/data.tar.gz", dataset.hub.revision)]
    assert own.read_bytes() == kept
    assert files(root / "hub" / dataset.hub.repo) == sorted(dataset.hub.files.values())
    helmet_archive.fetch(dataset, root)
    assert len(hub["opened"]) == 1


def test_fetch_errors_name_missing_members_and_the_reason(hub: dict[str, Any], tmp_path: Path) -> None:
    dataset = catalogue.datasets()["popqa"]
    assert dataset.hub is not None
    absent = dataset.hub.files["1000"]
    hub["members"] = {name: b"x" for name in dataset.hub.files.values() if name != absent}
    with pytest.raises(InfrastructureError, match=f"does not contain {absent}") as caught:
        helmet_archive.fetch(dataset, tmp_path)
    one_line(caught)
    hub["members"] = RuntimeError("no route\nto it")
    with pytest.raises(InfrastructureError, match=r"cannot fetch the files of popqa .*\(no route\)") as caught:
        helmet_archive.fetch(dataset, tmp_path)
    one_line(caught)


def test_a_record_without_an_id_is_identified_by_its_question() -> None:
    line = json.dumps(record("nq", 1, 0, 3)).encode()
    assert helmet_files.key_of(helmet_files.checked(line, "here")) == "What is the answer to number 1?"
    assert helmet_files.key_of(record("popqa", 1, 0, 3)) == "7001"
