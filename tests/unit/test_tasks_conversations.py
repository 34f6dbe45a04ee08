"""Tasks whose prompts are conversations: turns on one context, and OpenAI-MRCR on hand-made files in its layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_models import save_model

from lceval.core.errors import UserError
from lceval.models.boundary import ContextEnd
from lceval.tasks import build, catalogue, prompts, turns
from lceval.tasks.icr import mrcr

# Turns on one context --------------------------------------------------------------------------------


def row(question: str, answer: str, cluster: str = "a") -> Any:
    documents = [f"Text of {cluster}."]
    return {
        "id": question,
        "cluster": cluster,
        "instruction": prompts.instruction("documents", "turns"),
        "context": prompts.block("documents", documents),
        "ask": prompts.ask("turns", question),
        "answers": [answer],
        "reply_prefix": prompts.reply_prefix("turns"),
        "length_tokens": 5,
    }


def test_every_question_follows_those_before_it_and_their_answers() -> None:
    rows = [row("Who?", "Ann"), row("Where?", "Bonn", "b"), row("When?", "1901"), row("Why?", "For fun")]
    built = {r["id"]: r for r in turns.as_turns(rows)}
    first = {"role": "user", "content": prompts.prompt(rows[0])}
    assert built["Who?"]["messages"] == [first]
    assert built["Where?"]["messages"] == [{"role": "user", "content": prompts.prompt(rows[1])}]
    assert built["Why?"]["messages"] == [
        first,
        {"role": "assistant", "content": "Answer: Ann"},
        {"role": "user", "content": "Question: When?"},
        {"role": "assistant", "content": "Answer: 1901"},
        {"role": "user", "content": "Question: Why?"},
    ]
    assert {r["length_tokens"] for r in built.values()} == {None}


@pytest.mark.model
def test_turns_run_as_a_conversation_on_one_compressed_context(
    instances: Callable[..., Any], lcft: Any, data_folder: Path
) -> None:
    requests = instances("lc_squad_turns_1k", 4)
    assert len({request.doc["cluster"] for request in requests}) == 1
    ends = []
    for number, request in enumerate(requests):
        prompt, doc = request.args[0], request.doc
        assert prompt.count("<|im_start|>user\n") == number + 1
        assert prompt.count("<|im_start|>assistant\nAnswer: ") == number
        assert prompt.endswith(f"{doc['ask']}<|im_end|>\n<|im_start|>assistant\n")
        assert all(f"Answer: {before.doc['answers'][0]}<|im_end|>" in prompt for before in requests[:number])
        ends.append(ContextEnd().find("lc_squad_turns_1k", prompt, doc))
        request.arguments = (prompt, {**request.args[1], "max_gen_toks": 2})
    assert len({*ends}) == 1
    answers = lcft("snapkv:0.5").generate_until(requests)
    assert [text.meta["kv"]["shared_prefix"] for text in answers] == [False, True, True, True]
    assert all(text.meta["kv"]["kept_share"] == pytest.approx(0.5, abs=0.02) for text in answers)


# OpenAI-MRCR -----------------------------------------------------------------------------------------


def conversation(number: int, replies: int) -> dict[str, Any]:
    messages = []
    for reply in range(replies):
        messages.append({"role": "user", "content": "write a poem about w5"})
        messages.append({"role": "assistant", "content": " ".join(f"w{2 + (reply + n) % 90}" for n in range(600))})
    messages.append({"role": "user", "content": "Prepend w7w8 to the 2nd (1 indexed) poem about w5."})
    text = json.dumps(messages)
    return {
        "prompt": text,
        "answer": "w7w8" + messages[3]["content"],
        "random_string_to_prepend": "w7w8",
        "n_needles": 2,
        "desired_msg_index": 3,
        "total_messages": len(messages),
        "n_chars": sum(len(message["content"]) for message in messages),
        "number": number,
    }


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folder of a tokenizer with one token per word; LCEVAL_DATA has three conversations of 4k, 7k and 15k words."""
    folder = tmp_path / "hub" / "openai" / "mrcr" / "2needle"
    folder.mkdir(parents=True)
    for file, numbers in enumerate(((6, 11), (25,))):
        records = [conversation(replies, replies) for replies in numbers]
        datasets.Dataset.from_list(records).to_parquet(folder / f"2needle_{file}.parquet")
    monkeypatch.setenv("LCEVAL_DATA", str(tmp_path))
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    return save_model(tmp_path / "tiny")


def rows_of(task: str, tokenizer: str) -> list[Any]:
    return build.rows_of(catalogue.find(task), {"pretrained": tokenizer})


def test_a_length_has_the_conversations_between_its_half_and_itself(tokenizer: str) -> None:
    lengths = {k: [r["length_tokens"] for r in rows_of(f"lc_mrcr_2needle_{k}k", tokenizer)] for k in (8, 16)}
    # Of each reply 605 words with its request, the last request of 10, and the answer of 600.
    assert lengths[8] == [6 * 605 + 610, 11 * 605 + 610]
    assert lengths[16] == [25 * 605 + 610]


def test_the_prompt_is_the_conversation_and_its_last_message_the_question(tokenizer: str) -> None:
    first = rows_of("lc_mrcr_2needle_8k", tokenizer)[0]
    assert first["messages"] == json.loads(conversation(6, 6)["prompt"])
    rendered = prompts.conversation(first, "Be brief.", lambda messages: json.dumps(messages))
    assert json.loads(rendered) == [{"role": "system", "content": "Be brief."}, *first["messages"]]
    plain = prompts.conversation(first, None, None)
    end = ContextEnd().find("lc_mrcr_2needle_8k", plain, first)
    assert plain[end:] == first["messages"][-1]["content"]


def test_the_score_is_the_ratio_behind_the_prefix_and_0_without_it() -> None:
    doc = {"answers": ["xyzone two three"], "prefix": "xyz"}
    assert mrcr.results(doc, ["xyzone two three"]) == {"match_ratio": 1.0}
    expected = SequenceMatcher(None, "one three", "one two three").ratio()
    assert 0 < expected < 1
    assert mrcr.results(doc, ["xyzone three"]) == {"match_ratio": expected}
    assert mrcr.results(doc, ["one two three"]) == {"match_ratio": 0.0}
    assert mrcr.results(doc, [" xyzone two three"]) == {"match_ratio": 0.0}


@pytest.mark.parametrize(
    "prompt", ["no JSON", "[]", '[{"role": "user"}]', '[{"role": "user", "content": "a"}] trailing']
)
def test_a_prompt_that_is_no_conversation_is_refused(tokenizer: str, tmp_path: Path, prompt: str) -> None:
    file = tmp_path / "hub" / "openai" / "mrcr" / "2needle" / "2needle_0.parquet"
    datasets.Dataset.from_list([{**conversation(0, 6), "prompt": prompt}]).to_parquet(file)
    with pytest.raises(UserError, match="record 1: prompt is not a JSON list of messages"):
        rows_of("lc_mrcr_2needle_8k", tokenizer)
