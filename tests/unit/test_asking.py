"""Contexts from Python on tiny random models: prompts, answers, and files that open only where they were saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import save_model
from transformers import AutoModelForCausalLM

import lceval
from lceval.core.errors import InfrastructureError, UserError
from lceval.models.asking import CompressedText, LoadedModel
from lceval.models.lcft import LCFT
from lceval.models.policies import retrieval

TEMPLATE = (
    "w2 {% for message in messages %}w3 {{ message['content'] | trim }} w4 {% endfor %}"
    "{% if add_generation_prompt %}w5 w6 {% endif %}"
)
# Weights with which an answer depends on more than its last token.
STRONG = {"initializer_range": 0.2}
TEXT = " ".join(f"w{2 + n * n % 97}" for n in range(150))
QUESTIONS = [" w7 w8 w9", " w10", " w11 w12 w13 w14 w15"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", template=TEMPLATE, **STRONG)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without a chat template, with sliding-window layers."""
    types = ["sliding_attention", "full_attention"] * 2
    path = tmp_path_factory.mktemp("models") / "plain"
    return save_model(path, "gemma3_text", sliding_window=24, layer_types=types, query_pre_attn_scalar=16, **STRONG)


def logits(context: CompressedText, question: list[int]) -> torch.Tensor:
    """The logits of a question, to the last bit."""
    engine = context.model.lcft.engine
    return engine.forward(engine.batch([context.cache], [question], 0), torch.tensor([question]))


# Prompts and answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["full", "snapkv:0.5:window=8"])
def test_an_answer_is_that_of_lcft_for_the_chat_template_around_text_and_question(folder: str, kv: str) -> None:
    context = lceval.load(folder, kv=kv).compress(TEXT)
    prompt = f"w2 w3 {TEXT} w7 w8 w9 w4 w5 w6 w20"
    request = Instance("generate_until", {"context": TEXT}, (prompt, {"max_gen_toks": 8}), 0, ("t", 0, 1))
    (expected,) = LCFT(folder, kv=kv).generate_until([request], disable_tqdm=True)
    answer = context.ask(" w7 w8 w9", max_new_tokens=8, answer_prefix="w20")
    assert answer == expected
    assert answer
    assert len(context.ids) == answer.meta["kv"]["context_tokens"] == 152
    costs = {"prefill_s", "prefill_tokens", "shared_prefix", "compress_s", "question_s", "decode_s", "first_token_s"}
    costs |= {"peak_bytes"}
    assert {k: v for k, v in answer.meta["kv"].items() if k not in costs} == {
        k: v for k, v in expected.meta["kv"].items() if k not in costs
    }
    assert (context.kv_bytes, context.kept_share) == (expected.meta["kv_bytes"], expected.meta["kv"]["kept_share"])


@pytest.mark.parametrize("kv", ["snapkv:0.5:window=8", "h2o:0.5:when=always"])
def test_questions_are_answered_independently_whatever_their_batch(folder: str, kv: str) -> None:
    context = lceval.load(folder, kv=kv).compress(TEXT)
    alone = [context.ask(question, max_new_tokens=8) for question in QUESTIONS]
    assert len({*alone}) == 3
    for batch_size in (1, 2, 8):
        assert context.ask_many([*QUESTIONS, QUESTIONS[0]], max_new_tokens=8, batch_size=batch_size) == [
            *alone,
            alone[0],
        ]
    assert context.ask_many([]) == []


def test_a_model_without_a_template_gets_text_and_question_only(plain: str) -> None:
    context = lceval.load(plain).compress("w40 w41")
    assert context.ids == (40, 41)
    assert context.model.job(0, context.ids, "w50", " w60").question == (50, 60)
    # A text of no tokens is none: the question alone is the prompt.
    empty = context.model.compress("")
    assert (empty.ids, empty.kv_bytes, empty.kept_share) == ((), 0, 1.0)
    request = Instance("generate_until", {}, ("w40 w41 w50", {"max_gen_toks": 8}), 0, ("t", 0, 1))
    (expected,) = LCFT(plain).generate_until([request], disable_tqdm=True)
    assert empty.ask("w40 w41 w50", max_new_tokens=8) == context.ask("w50", max_new_tokens=8) == expected
    assert empty.ask_many(["w40 w41 w50", "w7"], max_new_tokens=8)[0] == expected


def test_sampling_and_stop_texts_are_lm_evals(folder: str) -> None:
    context = lceval.load(folder).compress(TEXT)
    greedy = context.ask(QUESTIONS[0], max_new_tokens=8)
    assert (
        context.ask(QUESTIONS[0], max_new_tokens=8, until=[greedy.split()[2]])
        == greedy[: greedy.index(greedy.split()[2])]
    )
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(context.ask(QUESTIONS[0], max_new_tokens=8, temperature=2.0))
    assert samples[0] == samples[1] != samples[2]


def test_no_answer_is_an_error(folder: str) -> None:
    context = lceval.load(folder).compress(TEXT)
    context.model.lcft.model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(InfrastructureError, match=r"^no answer: the model's logits are NaN or infinite$"):
        context.ask(QUESTIONS[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_aware": True}, "bad argument query_aware=True of load: compresses a context for one question"),
        ({"overlong": "middle"}, "bad argument overlong='middle' of load: a text is never truncated; leave it out"),
        ({"diagnose": "gold"}, "bad argument diagnose='gold' of load"),
        ({"batch_size": 4}, "bad argument batch_size=4 of load: pass it to ask_many"),
        ({"kv": "snapvk:0.5"}, "did you mean 'snapkv'"),
        ({"dtype": "float17"}, "bad model argument dtype='float17'"),
        ({"pretrained": "/nope"}, "pretrained=/nope: no such folder"),
    ],
)
def test_load_refuses_in_one_line_before_anything_is_loaded(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        lceval.load(**{"pretrained": "some/name", **arguments})
    assert message in str(refusal.value)


def test_query_aware_false_is_no_error(folder: str) -> None:
    assert isinstance(lceval.load(folder, query_aware=False), LoadedModel)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.model.compress("w9 " * 510), "the text has 512 tokens with its template, and the model's window"),
        (lambda c: c.model.compress(b"w9"), "compress requires a text, got bytes"),
        (lambda c: c.ask(" w9", max_new_tokens=400), "context, question and 400 new tokens are 556 tokens, and the mo"),
        (lambda c: c.ask(" w9", max_new_tokens=0), "bad max_new_tokens=0: a number, at least 1"),
        (lambda c: c.ask(" w9", temperature=-1), "bad temperature=-1: 0, or above to sample"),
        (lambda c: c.ask_many([" w9"], batch_size=0), "bad batch_size=0: a number, at least 1"),
        (lambda c: c.ask_many(" w9"), "ask_many requires a list of questions: use ask for one"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused_in_one_line(folder: str, call: Callable[[CompressedText], Any], message: str) -> None:
    context = lceval.load(folder).compress(TEXT)
    with pytest.raises(UserError) as refusal:
        call(context)
    assert str(refusal.value).startswith(message)


def test_an_empty_prompt_and_a_template_without_the_message_are_refused(plain: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the question is empty$"):
        lceval.load(plain).compress(TEXT).ask("")
    for template in ("w2 {% for m in messages %}w3{% endfor %}", TEMPLATE + "{{ messages[0]['content'] }}"):
        with pytest.raises(
            UserError, match=r"^the model's chat template does not contain the user's message exactly once$"
        ):
            lceval.load(save_model(tmp_path / "model", template=template))


# Files ----------------------------------------------------------------------------------------------

# Every kind of layer and of index; test_devices.py saves and opens all recipes.
KINDS = [
    "full",
    "adakv:0.4:of=knorm",
    "int4:residual=16",
    "snapkv:0.9:window=8+kv8v16:residual=0",
    "h2o:0.5:when=always",
    "quest:0.2:skip=1",
    "fier:0.2:skip=0",
    "int8:residual=0+retrieval:0.3",
    "retrieval:0.2:index=exact",
]


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("name", ["folder", "plain"])
def test_an_opened_context_answers_as_the_saved_one_to_the_last_bit(
    name: str, kv: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "SMALL", 50)  # so that faiss takes part
    path, file = request.getfixturevalue(name), tmp_path / "context.safetensors"
    saved = lceval.load(path, kv=kv).compress(TEXT)
    saved.save(file)
    opened = lceval.load(path, kv=kv).open(file)
    assert [type(layer) for layer in opened.cache.layers] == [type(layer) for layer in saved.cache.layers]
    assert opened.ids == saved.ids
    assert (opened.kv_bytes, opened.kept_share) == (saved.kv_bytes, saved.kept_share)
    assert opened.cache.allocated_bytes == saved.cache.allocated_bytes
    assert torch.equal(logits(opened, [7, 8, 9]), logits(saved, [7, 8, 9]))
    assert opened.ask_many(QUESTIONS, max_new_tokens=8) == saved.ask_many(QUESTIONS, max_new_tokens=8)


def test_a_context_of_no_tokens_is_saved_and_opened(plain: str, tmp_path: Path) -> None:
    model = lceval.load(plain)
    model.compress("").save(tmp_path / "empty")
    assert model.open(tmp_path / "empty").ask("w7", max_new_tokens=8) == model.compress("").ask("w7", max_new_tokens=8)


def test_the_header_of_a_file_says_what_it_is_without_paths_of_the_machine(folder: str, tmp_path: Path) -> None:
    lceval.load(folder, kv="snapkv:0.5:window=8").compress(TEXT).save(tmp_path / "context")
    with safe_open(tmp_path / "context", framework="pt") as content:
        header = content.metadata()
    settings = json.loads(header["settings"])
    assert header["format"] == "lceval context 1"
    assert settings["kv"] == "snapkv:0.5:window=8"
    assert settings["dtype"] == "torch.float32"
    assert settings["pretrained"]["name"] == "tiny"
    assert len(header["tokens_sha256"]) == 64
    assert not any(str(Path(folder).parent) in text for text in header.values())
    assert [file.name for file in tmp_path.iterdir()] == ["context"]


@pytest.fixture(scope="module")
def saved(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("contexts") / "context"
    lceval.load(folder, kv="snapkv:0.5:window=8").compress(TEXT).save(file)
    return file


def other_weights(folder: Path) -> dict[str, Any]:
    save_model(folder, template=TEMPLATE, seed=2)
    return {}


def with_adapter(folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        folder / "checkpoint-1"
    )
    return {"peft": str(folder / "checkpoint-1")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"kv": "snapkv:0.25"}, "was saved with kv=snapkv:0.5:window=8, and this model has kv=snapkv:0.25: "),
        (lambda _: {"dtype": "bfloat16"}, "with dtype=torch.float32, and this model has dtype=torch.bfloat16: "),
        (lambda _: {"mixed_precision_dtype": "bfloat16"}, "with mixed_precision_dtype=None, and this model has mixed_"),
        (other_weights, "was saved with pretrained=tiny ("),
        (with_adapter, "was saved with peft=None, and this model has peft=checkpoint-1 ("),
    ],
)  # fmt: skip
def test_a_context_of_other_settings_is_refused_with_what_differs(
    folder: str, saved: Path, tmp_path: Path, change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    path = tmp_path / "tiny"
    shutil.copytree(folder, path)
    arguments = {"kv": "snapkv:0.5:window=8"}
    # The same files elsewhere, in other chunks: the same model.
    assert lceval.load(str(path), **arguments, prefill_chunk=64, max_length=400).open(saved).ids
    with pytest.raises(UserError) as refusal:
        lceval.load(str(path), **{**arguments, **change(path)}).open(saved)
    assert f"{saved} " in str(refusal.value)
    assert message in str(refusal.value)


def flipped(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def newer(file: Path) -> None:
    with safe_open(file, framework="pt") as content:
        tensors, header = {name: content.get_tensor(name) for name in content.keys()}, content.metadata()  # noqa: SIM118
    save_file(tensors, file, {**header, "format": "lceval context 9"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), "is damaged, or no saved context ("),
        (lambda f: flipped(f, -5000), "is damaged, or no saved context (its checksum differs): save the context again"),
        (lambda f: f.write_text("a text"), "is damaged, or no saved context ("),
        (lambda f: f.write_bytes(b""), "is damaged, or no saved context ("),
        (lambda f: save_file({"a": torch.zeros(3)}, f), "is no saved context: name a file that `save` of this version"),
        (newer, "has the format 'lceval context 9', not 'lceval context 1': name a file"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_in_one_line(
    folder: str, saved: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    file = tmp_path / "context"
    shutil.copy(saved, file)
    damage(file)
    with pytest.raises(UserError) as refusal:
        lceval.load(folder, kv="snapkv:0.5:window=8").open(file)
    assert str(refusal.value).startswith(f"{file} {message}")


def test_a_file_that_cannot_be_read_or_written_is_named(folder: str, tmp_path: Path) -> None:
    model = lceval.load(folder)
    with pytest.raises(UserError, match=r"^cannot read .*nope"):
        model.open(tmp_path / "nope")
    with pytest.raises(UserError, match=r"^cannot write .*context: No such file or directory"):
        model.compress(TEXT).save(tmp_path / "nope" / "context")
    with pytest.raises(UserError, match=r"^cannot write .*: Is a directory"):
        model.compress(TEXT).save(tmp_path)
    nameless = lceval.load(model.lcft.model, tokenizer=folder).compress(TEXT)
    with pytest.raises(UserError, match=r"^pretrained cannot be identified: contexts are saved and opened by m"):
        nameless.save(tmp_path / "context")
    assert not [*tmp_path.iterdir()]
