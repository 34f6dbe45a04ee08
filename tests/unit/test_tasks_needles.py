"""Needle tasks and bAbI on real text: length, depth, unique answers, chains, order of facts, invalid input."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lceval.core.errors import UserError
from lceval.tasks import build, catalogue, prompts, rows, scoring, tokens
from lceval.tasks.icr import babi, haystack
from lceval.tasks.request import Request
from lceval.tasks.rows import Document

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CODES = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery")
NEEDLES = (*CODES, "vt")


def tokenizer(pattern: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each match of a pattern and each segment between matches."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    fast.chat_template = template
    return fast


_DIGITS = r"\n+(?=\n\S)|\s|[0-9]|[a-zA-Z]{1,5}|[^a-zA-Z0-9\s]"
METERS = {
    "words": tokens.TokenMeter(tokenizer(r"\w+|[^\w\s]")),
    # Line feeds at the end of a text are one token, those before a word are two.
    "digits in a template": tokens.TokenMeter(
        tokenizer(r"\n+(?=\n\S)|\s|[0-9]|[a-zA-Z]{1,5}|[^a-zA-Z0-9\s]", TEMPLATE)
    ),
}

_WORDS = "the a old ship star of man said and then looked up at his cold hand was not there any more but"


def story(number: int, count: int = 90) -> str:
    """A story in the format of the file: a title, a note, then paragraphs of very different lengths."""
    rng = random.Random(number)
    paragraphs = [
        " ".join(rng.choice(_WORDS.split()) for _ in range(rng.choice([2, 4, 7, 12, 30, 60]))).capitalize()
        + f" {number}.{n}."
        for n in range(count)
    ]
    note = "[Transcriber's Note: This etext was produced from a magazine.]"
    return "\n \n ".join([f"STORY {number}", "By A. WRITER", note, *paragraphs])


QUESTION = {
    "task": "qa2",
    "facts": ["Mary got the milk there.", "John moved to the bedroom.", "Mary went back to the hallway."],
    "question": "Where is the milk?",
    "target": "hallway",
    "supporting": [2, 0],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with twelve synthetic stories and a bAbI story with two questions."""
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    write(tmp_path / haystack.STORIES, [{"metadata": {}, "document": story(n), "questions": []} for n in range(12)])
    later = {**QUESTION, "facts": [*QUESTION["facts"], "John took the apple."], "supporting": [0, 2]}
    for task in ("qa1", "qa2", "qa3"):
        write(tmp_path / f"babi/{task}_test.jsonl", [QUESTION, later, {**QUESTION, "facts": QUESTION["facts"][::-1]}])
    return tmp_path


def write(file: Path, records: list[Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))


def request(name: str, meter: str = "words", seed: int = 1234) -> build.Request:
    task = catalogue.find(name)
    assert task.length_k is not None
    return Request(name, task.dataset, task.output_format, METERS[meter], task.length_k * 1024, seed)


def built(name: str, meter: str = "words", seed: int = 1234) -> list[Any]:
    row_request = request(name, meter, seed)
    return build.row_builder(row_request.dataset)(row_request).build()


def check(task_rows: list[Any], meter: str, limit: int, reply: int) -> None:
    for row in task_rows:
        assert set(row) >= set(rows.Row.__required_keys__)
        (counted,) = METERS[meter].prompts([prompts.prompt(row)])
        assert row["length_tokens"] == counted + reply
        assert 0.98 * limit <= row["length_tokens"] <= limit
        assert row["context"].split("\n\n") == [document["text"] for document in row["docs"]]
        pids = [document["pid"] for document in row["docs"]]
        assert len(set(pids)) == len(pids)
        assert set(row["gold_pids"]) <= set(pids)
        assert 0 <= row["depth"] <= 1
    assert len({row["id"] for row in task_rows}) == len(task_rows)


def hidden(row: dict[str, Any]) -> list[str]:
    return [document["text"] for document in row["docs"] if not document["pid"].startswith("story-")]


def golds(row: dict[str, Any]) -> list[str]:
    return [document["text"] for document in row["docs"] if document["pid"] in row["gold_pids"]]


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Needles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("meter", "limit"), [("words", 2048), ("digits in a template", 2048), ("words", 4096)])
@pytest.mark.parametrize("dataset", NEEDLES)
def test_fifty_rows_meet_the_length_and_have_every_needle_once(
    dataset: str, limit: int, meter: str, folder: Path
) -> None:
    task_rows = built(f"lc_{dataset}_ao_{limit // 1024}k", meter)
    assert len(task_rows) == 50
    check(task_rows, meter, limit, 32 if dataset in ("niah_single", "niah_multikey") else 128)
    for row in task_rows:
        for needle in hidden(row):
            assert row["context"].count(needle) == 1
        haystack_text = "\n".join(d["text"] for d in row["docs"] if d["pid"].startswith("story-")).lower()
        assert not any(answer.lower() in haystack_text for answer in row["answers"])
        for answer in row["answers"]:
            assert any(answer in needle for needle in golds(row))
    clusters = {row["cluster"]: row["context"] for row in task_rows}
    assert len(clusters) == len(set(clusters.values())) == (50 if dataset == "niah_single" else 10)
    assert all(clusters[row["cluster"]] == row["context"] for row in task_rows)


@pytest.mark.parametrize("dataset", CODES)
def test_a_question_is_answered_only_by_the_needles_of_its_keys(dataset: str, folder: Path) -> None:
    options = catalogue.datasets()[dataset].options
    for row in built(f"lc_{dataset}_ao_2k"):
        pairs = [re.fullmatch(r"The access code of the (.+) is (\d{7})\.", needle) for needle in hidden(row)]
        assert all(pairs)
        assert len(pairs) == options["keys"] * options["values"]
        known: dict[str, set[str]] = {}
        for pair in pairs:
            assert pair is not None
            known.setdefault(pair[1], set()).add(pair[2])
        asked_keys = [key for key in known if key in row["question"]]
        assert len(asked_keys) == options["asked"]
        assert {answer for key in asked_keys for answer in known[key]} == set(row["answers"])
        assert len(row["answers"]) == len(set(row["answers"])) == options["asked"] * options["values"]
        assert len(golds(row)) == len(row["answers"])
        assert all(any(key in needle for key in asked_keys) for needle in golds(row))


def resolved(context: str) -> dict[str, str]:
    """Value of every variable of a text, resolved from top to bottom."""
    values: dict[str, str] = {}
    for line in context.split("\n\n"):
        if match := re.fullmatch(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", line):
            assert match[1] not in values
            values[match[1]] = values[match[2]] if match[2] else match[3]
    return values


def test_chains_resolve_from_top_to_bottom_to_exactly_the_answers(folder: Path) -> None:
    for row in built("lc_vt_ao_2k"):
        values = resolved(row["context"])
        (value,) = re.findall(r"\d{5}", row["question"])
        assert len(values) == 25
        assert [name for name, assigned in values.items() if assigned == value] == row["answers"]
        assert len(row["answers"]) == 5
        assert resolved("\n\n".join(golds(row))) == dict.fromkeys(row["answers"], value)


@pytest.mark.parametrize("dataset", ["niah_single", "niah_multikey"])
def test_single_needles_are_uniform_over_all_depths(dataset: str, folder: Path) -> None:
    depths = sorted(row["depth"] for row in built(f"lc_{dataset}_ao_4k"))
    assert depths == pytest.approx([(n + 0.5) / 50 for n in range(50)], abs=0.05)


@pytest.mark.parametrize("dataset", ["niah_multivalue", "niah_multiquery", "vt"])
def test_each_segment_of_a_context_has_one_needle(dataset: str, folder: Path) -> None:
    for row in built(f"lc_{dataset}_ao_4k"):
        needles = [document["pid"] for document in row["docs"] if document["pid"].startswith("needle-")]
        every = [haystack.depth_of("facts", row["docs"], [pid]) for pid in needles]
        assert needles == [f"needle-{n}" for n in range(len(needles))]
        assert every == pytest.approx([(n + 0.5) / len(needles) for n in range(len(needles))], abs=0.08)


@pytest.mark.parametrize("dataset", [*NEEDLES, "babi"])
def test_the_seed_determines_the_rows(dataset: str, folder: Path) -> None:
    name = f"lc_{dataset}_{'qa2' if dataset == 'babi' else 'ao'}_2k"
    first, again, other = (json.dumps(built(name, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_all_lengths_have_the_same_needles(folder: Path) -> None:
    short, long = built("lc_niah_multikey_ao_2k"), built("lc_niah_multikey_ao_4k", "digits in a template")
    for one, other in zip(short, long, strict=True):
        assert [one[field] for field in ("id", "question", "answers")] == [
            other[field] for field in ("id", "question", "answers")
        ]
        assert hidden(one) == hidden(other)
        assert one["cluster"] != other["cluster"]


def test_every_value_of_a_list_is_scored(folder: Path) -> None:
    row = built("lc_niah_multivalue_ao_2k")[0]
    whole = scoring.listed_results(row, ["Answer: " + ", ".join(row["answers"])])
    half = scoring.listed_results(row, ["Answer: " + ", ".join(row["answers"][:2])])
    assert (whole["recall"], whole["all_found"]) == (1, 1)
    assert (half["recall"], half["all_found"]) == (0.5, 0)


# Haystack -----------------------------------------------------------------------------------------


def test_titles_and_edition_notes_are_left_out() -> None:
    head = "\n\nProduced by Somebody at\nhttp://x\n\nTHE END\nOF IT\n \n By A. WRITER\n\n I\n\n"
    text = head + ' He came\nin.\n \n \n "Well?"\n\n***'
    assert haystack.paragraphs(text) == ["He came in.", '"Well?"']


def test_a_text_shorter_than_the_context_is_repeated_with_other_ids(folder: Path) -> None:
    write(folder / haystack.STORIES, [{"document": story(1, 60)}])
    task_rows = built("lc_niah_single_ao_4k")
    check(task_rows, "words", 4096, 32)
    texts = [document["text"] for document in task_rows[0]["docs"]]
    assert len(set(texts)) < len(texts)


@given(st.lists(st.integers(0, 400), max_size=30), st.lists(st.floats(0, 1), max_size=8))
def test_needles_are_at_the_paragraph_boundary_nearest_to_their_depth(sizes: list[int], depths: list[float]) -> None:
    text = [Document(pid=f"t{n}", title="", text="x" * size) for n, size in enumerate(sizes)]
    needles = [Document(pid=f"n{n}", title="", text="") for n in range(len(depths))]
    task_rows = haystack.placed(text, needles, sorted(depths))
    assert [d for d in task_rows if d["pid"].startswith("t")] == text
    assert [d for d in task_rows if d["pid"].startswith("n")] == needles
    edges = [sum(size + 2 for size in sizes[:n]) for n in range(len(sizes) + 1)]
    for needle, depth in zip(needles, sorted(depths), strict=True):
        at = sum(len(d["text"]) + 2 for d in task_rows[: task_rows.index(needle)] if d["pid"].startswith("t"))
        assert abs(at - depth * edges[-1]) == pytest.approx(min(abs(edge - depth * edges[-1]) for edge in edges))


def test_real_stories_contain_no_answer_and_are_mostly_used(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_DATA", str(data_folder))
    lines = (data_folder / haystack.STORIES).read_text(encoding="utf-8").strip().split("\n")
    stories = [json.loads(line)["document"] for line in lines]
    kept = [line for text in stories for line in haystack.paragraphs(text)]
    assert sum(map(len, kept)) > 0.9 * sum(len(" ".join(text.split())) for text in stories)
    assert not any(re.search("gutenberg|transcriber", line, re.IGNORECASE) for line in kept)
    task_rows = built("lc_vt_ao_8k")
    check(task_rows, "words", 8192, 128)
    assert all(row["context"].lower().count(name.lower()) <= 2 for row in task_rows for name in row["answers"])


# bAbI ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("meter", "limit"), [("words", 2048), ("digits in a template", 2048), ("words", 4096)])
def test_facts_occur_once_in_order_and_supporting_facts_are_gold(limit: int, meter: str, folder: Path) -> None:
    task_rows = built(f"lc_babi_qa2_{limit // 1024}k", meter)
    assert len(task_rows) == 3
    check(task_rows, meter, limit, 32)
    records = [json.loads(line) for line in (folder / "babi/qa2_test.jsonl").read_text().splitlines()]
    for row in task_rows:
        record = records[int(row["id"].rsplit("-", 1)[1])]
        assert hidden(row) == record["facts"]
        assert golds(row) == [record["facts"][n] for n in sorted(record["supporting"])]
        assert row["answers"] == ["hallway"]
    by_id = {row["id"]: row for row in task_rows}
    assert by_id["babi-qa2-000"]["cluster"] == by_id["babi-qa2-001"]["cluster"] != by_id["babi-qa2-002"]["cluster"]


def test_text_that_may_bear_on_a_question_is_left_out(folder: Path) -> None:
    revealing = ["Then john looked up.", "Nobody was in the Hallways.", "Mary was there."]
    harmless = ["Johnson looked up.", "The milk was cold."]
    write(folder / haystack.STORIES, [{"document": "\n\n".join([*revealing, *harmless, story(n)])} for n in range(12)])
    seen = {document["text"] for row in built("lc_babi_qa1_4k") for document in row["docs"]}
    assert seen.isdisjoint(revealing)
    assert seen.issuperset(harmless)


@pytest.mark.parametrize("mode", ["qa1", "qa2", "qa3"])
def test_a_hundred_real_questions_of_each_task(data_folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_DATA", str(data_folder))
    task_rows = built(f"lc_babi_{mode}_4k")
    assert len(task_rows) == 100
    check(task_rows, "words", 4096, 32)
    assert {len(row["gold_pids"]) for row in task_rows} == {int(mode[-1])}
    for row in task_rows:
        facts = [document["pid"] for document in row["docs"] if document["pid"].startswith("fact-")]
        assert facts == [f"fact-{n}" for n in range(len(facts))]
        haystack_text = "\n".join(d["text"] for d in row["docs"] if d["pid"].startswith("story-")).lower()
        assert row["answers"][0] not in haystack_text
    assert 20 < len({row["cluster"] for row in task_rows}) < 100


def test_gold_context_has_only_the_supporting_facts_in_order(folder: Path) -> None:
    tokenizer(r"\w+|[^\w\s]").save_pretrained(folder / "words")
    task, metadata = catalogue.find("lc_babi_qa2_2k"), {"pretrained": str(folder / "words")}
    row = next(r for r in build.rows_of(task, {**metadata, "context": "gold"}) if r["id"] == "babi-qa2-000")
    assert row["context"] == "Mary got the milk there.\n\nMary went back to the hallway."
    assert {r["context"] for r in build.rows_of(task, {**metadata, "context": "none"})} == {""}


# Invalid input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"babi/qa1_test\.jsonl line 1 is not a JSON object"),
        ({**QUESTION, "facts": []}, r"line 1: invalid facts=\[\]"),
        ({**QUESTION, "target": None}, "line 1: invalid target=None"),
        ({**QUESTION, "supporting": []}, r"record 1: invalid supporting=\[\]: expected indices of its 3 facts"),
        ({**QUESTION, "supporting": [0, 3]}, r"record 1: invalid supporting=\[0, 3\]"),
        ({**QUESTION, "supporting": ["0"]}, r"record 1: invalid supporting=\['0'\]"),
        ({k: v for k, v in QUESTION.items() if k != "supporting"}, "record 1: invalid supporting=None"),
    ],
)
def test_invalid_questions_raise_with_their_location(bad: Any, message: str, folder: Path) -> None:
    write(folder / "babi/qa1_test.jsonl", [bad])
    with pytest.raises(UserError, match=message) as caught:
        built("lc_babi_qa1_2k")
    one_line(caught)


@pytest.mark.parametrize("name", ["lc_vt_ao_2k", "lc_niah_single_ao_2k", "lc_babi_qa1_2k"])
def test_invalid_stories_or_stories_without_text_raise(name: str, folder: Path) -> None:
    write(folder / haystack.STORIES, [{"text": "x"}])
    with pytest.raises(UserError, match=r"squality/.* line 1: invalid document=None") as caught:
        built(name)
    one_line(caught)
    write(folder / haystack.STORIES, [{"document": "THE TITLE"}])
    with pytest.raises(UserError, match=rf"{name} finds no usable paragraph") as caught:
        built(name)
    one_line(caught)


def test_a_length_at_which_nothing_fits_raises(folder: Path) -> None:
    facts = [f"Mary went to the place number {n}." for n in range(900)]
    write(folder / "babi/qa3_test.jsonl", [{**QUESTION, "facts": facts}])
    with pytest.raises(UserError, match=r"lc_babi_qa3_2k cannot place any story .* 2048 .* longer task") as caught:
        built("lc_babi_qa3_2k")
    one_line(caught)


def test_without_the_data_the_error_names_the_variable_and_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LCEVAL_DATA")
    for name in ("lc_vt_ao_2k", "lc_babi_qa2_2k"):
        with pytest.raises(UserError, match=rf"{name} .*LCEVAL_DATA is not set.*squality_v1-3_dev\.jsonl") as caught:
            built(name)
        one_line(caught)


def test_story_numbers_change_where_facts_do_not_continue() -> None:
    assert babi.story_numbers([["a"], ["a", "b"], ["b"], ["b"], ["a", "b"]]) == [0, 0, 1, 1, 2]
