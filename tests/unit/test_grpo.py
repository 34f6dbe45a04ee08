"""GRPO on a model of two layers: prompts, rewards, logs, resume and errors."""

from __future__ import annotations

import doctest
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOTrainer

from lceval.core.errors import UserError
from lceval.tasks import prompts
from lceval.training import grpo as grpo_module
from lceval.training import rewards
from lceval.training.grpo import Grpo, GrpoResult, train
from lceval.training.samples import COMPLETIONS

OUTPUT_FORMATS = ("ao", "id", "idc", "idq", "rj")
SMALL: dict[str, Any] = {
    "num_generations": 2,
    "prompts_per_step": 2,
    "completions_per_device": 2,
    "max_new_tokens": 8,
    "learning_rate": 0.05,
    "save_steps": 2,
}


def row(number: int, output_format: str = "ao") -> dict[str, Any]:
    texts = [f"The harbour was dredged in {1900 + number}.", f"Builder{number} built the bridge."]
    question = "Who built the bridge?"
    return {
        "id": f"r{number}",
        "question": question,
        "answers": [f"Builder{number}"],
        "docs": [{"pid": f"{number}-{place}", "title": "", "text": text} for place, text in enumerate(texts)],
        "gold_pids": [f"{number}-1"],
        "instruction": prompts.instruction("documents", output_format),
        "context": prompts.block("documents", texts),
        "ask": prompts.ask(output_format, question),
    }


ROWS = [row(number) for number in range(3)]


TEMPLATE = (
    "{% for m in messages %}<start> {{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant : {% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A word-level tokenizer of the prompts, so that samples contain document ids and answers."""
    prompt_words = re.findall(
        r"\w+|[^\w\s]",
        " ".join(
            prompts.prompt(row(number, output_format)) for output_format in OUTPUT_FORMATS for number in range(12)
        ),
    )
    words = ["<unk>", "<start>", "<end>", "user", "assistant", *dict.fromkeys(prompt_words)]
    word_level = Tokenizer(
        WordLevel({word: index for index, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>")
    )
    word_level.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    fast = PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token="<unk>", eos_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": ["<start>"]})
    fast.chat_template = TEMPLATE
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def run(output: Path, tokenizer: Any, model: Any = None, **more: Any) -> GrpoResult:
    settings = {**SMALL, **more.pop("grpo", {})}
    model = tiny() if model is None else model
    options = {"rows": ROWS, "lora": lora(), **more}
    return train(model=model, tokenizer=tokenizer, grpo=Grpo(**settings), output=output, **options)


def samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / COMPLETIONS).read_text().splitlines()]


def steps(result: GrpoResult) -> list[dict[str, Any]]:
    return [line for line in result.history if "loss" in line]


@pytest.fixture
def vowels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that differs between random samples: the number of words that start with a vowel."""

    def parts(self: Any, row: Any, output: str, j: Any = None) -> rewards.Parts:
        return {"vowels": sum(word[0] in "aeiou" for word in output.split()) / 8}

    monkeypatch.setattr(rewards.Reward, "parts", parts)


def test_training_increases_the_reward(tmp_path: Path, tokenizer: Any, vowels: None) -> None:
    settings = {"max_steps": 20, "num_generations": 16, "completions_per_device": 32, "save_steps": 20, "beta": 0.0}
    result = run(tmp_path, tokenizer, lora=None, grpo=settings)
    values = [line["reward"] for line in steps(result)]
    assert sum(values[-5:]) / 5 > 2 * sum(values[:5]) / 5


def test_running_the_head_on_samples_only_gives_the_values_of_trl(
    tmp_path: Path, tokenizer: Any, vowels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = run(tmp_path / "ours", tokenizer, grpo={"max_steps": 3, "temperature": 0.7, "max_new_tokens": 9})
    monkeypatch.setattr(grpo_module, "trainer_class", lambda device: GRPOTrainer)
    theirs = run(tmp_path / "theirs", tokenizer, grpo={"max_steps": 3, "temperature": 0.7, "max_new_tokens": 9})
    assert samples(tmp_path / "ours") == samples(tmp_path / "theirs")
    for one, other in zip(steps(ours), steps(theirs), strict=True):
        for name in ("loss", "kl", "entropy", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    assert any(line["kl"] > 0 and line["grad_norm"] > 0 for line in steps(ours))


def test_the_prompt_is_that_of_the_evaluation(tmp_path: Path, tokenizer: Any) -> None:
    prompt_ids: list[Any] = []

    class Recorded(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            encoded = super().apply_chat_template(*args, **kwargs)
            if kwargs.get("return_dict"):
                prompt_ids.extend(encoded["input_ids"])
            return encoded

    recorded = Recorded.from_pretrained(tokenizer.name_or_path)
    run(tmp_path, recorded, grpo={"max_steps": 1})
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts.prompt(r)}], tokenize=False, add_generation_prompt=True
        )
        for r in ROWS
    ]
    expected = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    assert len(prompt_ids) == 4
    assert {tuple(ids) for ids in prompt_ids} < expected
    assert recorded.padding_side == "right" == tokenizer.padding_side  # left padding is set on a copy


def test_without_a_chat_template_the_prompt_is_plain_text(tmp_path: Path, tokenizer: Any) -> None:
    run(tmp_path, tokenizer, grpo={"max_steps": 1}, chat_template=False)
    assert len(samples(tmp_path)) == 4


@pytest.mark.parametrize("name", rewards.NAMES)
def test_the_logged_reward_is_that_of_the_logged_completions(name: str, tmp_path: Path, tokenizer: Any) -> None:
    rows = [row(number, name if name in prompts.OUTPUT_FORMATS else "id") for number in range(3)]
    grader = (lambda rows, outputs: [len(output) % 4 / 1 for output in outputs]) if name == "rj" else None
    result = run(
        tmp_path, tokenizer, rows=rows, grpo={"max_steps": 1, "reward": name, "variant": "graded"}, grader=grader
    )
    reward = rewards.Reward(name=name, variant="graded")  # type: ignore[arg-type]
    logged, by_id = samples(tmp_path), {r["id"]: r for r in rows}
    assert len(logged) == 4
    for line in logged:
        j = len(line["completion"]) % 4 / 1 if name == "rj" else None
        assert line["parts"] == reward.parts(by_id[line["id"]], line["completion"], j)
        assert line["reward"] == pytest.approx(math.fsum(line["parts"].values()))
    (step,) = steps(result)
    assert step["reward"] == pytest.approx(sum(line["reward"] for line in logged) / 4, abs=1e-6)
    for part in logged[0]["parts"]:
        assert step[f"parts/{part}"] == pytest.approx(sum(line["parts"][part] for line in logged) / 4, abs=1e-6)
    assert math.isfinite(step["loss"])


def test_a_resumed_run_has_the_samples_and_losses_of_an_uninterrupted_one(
    tmp_path: Path, tokenizer: Any, vowels: None
) -> None:
    """The run spans three epochs, each with a new order of rows."""
    uninterrupted = run(tmp_path / "uninterrupted", tokenizer, grpo={"max_steps": 4})
    assert run(tmp_path / "broken", tokenizer, grpo={"max_steps": 4, "save_steps": 9}, minutes=0).steps == 1
    half = run(tmp_path / "broken", tokenizer, grpo={"max_steps": 2}, resume=True)
    assert half.steps == 2
    log = tmp_path / "broken" / COMPLETIONS
    log.write_text(log.read_text() + sample_of_an_unsaved_step() + '{"step": 2, "cut of')
    resumed = run(tmp_path / "broken", tokenizer, grpo={"max_steps": 4}, resume=True)
    assert samples(tmp_path / "broken") == samples(tmp_path / "uninterrupted")
    for one, other in zip(steps(resumed), steps(uninterrupted), strict=True):
        for name in ("loss", "reward", "kl", "grad_norm", "entropy"):
            assert one[name] == other[name], name
    assert any(line["kl"] > 0 for line in steps(uninterrupted))


def sample_of_an_unsaved_step() -> str:
    return json.dumps({"step": 2, "split": "train", "id": "r0", "completion": "lost", "reward": 0, "parts": {}}) + "\n"


def test_several_updates_and_passes_from_one_round_of_sampling(tmp_path: Path, tokenizer: Any) -> None:
    settings = {"max_steps": 4, "updates_per_generation": 2, "iterations": 2, "save_steps": 4}
    result = run(tmp_path, tokenizer, grpo=settings)
    drawn = samples(tmp_path)
    assert [line["step"] for line in drawn] == [0] * 8  # one round: 2 updates of 2 prompts with 2 samples each
    assert len(steps(result)) == 4


def test_peft_loads_the_adapter_and_only_the_adapter_was_trained(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = run(tmp_path, tokenizer, model, grpo={"max_steps": 1, "reward": "id"}, rows=ROWS)
    loaded = PeftModel.from_pretrained(tiny(), str(result.adapter))
    assert result.parameters == sum(p.numel() for name, p in loaded.named_parameters() if "lora" in name)
    fresh = tiny().state_dict()
    assert all(torch.equal(fresh[name], weight) for name, weight in before.items())


def test_an_existing_adapter_is_trained_further_and_is_the_reference_of_the_divergence(
    tmp_path: Path, tokenizer: Any
) -> None:
    started = get_peft_model(tiny(), lora())
    torch.nn.init.normal_(next(p for name, p in started.named_parameters() if "lora_B" in name), std=0.1)
    result = run(tmp_path, tokenizer, started, lora=None, grpo={"max_steps": 1, "beta": 0.1})
    assert steps(result)[0]["kl"] == pytest.approx(0, abs=1e-6)  # relative to itself, not to the base model
    assert not (tmp_path / "ref").exists()
    assert set(PeftModel.from_pretrained(tiny(), str(tmp_path)).peft_config) == {"default"}


def test_all_weights_are_trained_without_lora(tmp_path: Path, tokenizer: Any) -> None:
    result = run(tmp_path, tokenizer, lora=None, grpo={"max_steps": 1, "beta": 0.0})
    assert result.parameters == sum(p.numel() for p in tiny().parameters())
    assert (tmp_path / "model.safetensors").is_file()


def test_held_out_rows_are_evaluated_and_never_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    held_out = [row(number) for number in range(10, 12)]
    result = run(tmp_path, tokenizer, grpo={"max_steps": 2, "eval_steps": 1}, held_out=held_out)
    split = {
        name: {line["id"] for line in samples(tmp_path) if line["split"] == name} for name in ("train", "held_out")
    }
    assert split == {"train": {"r0", "r1", "r2"}, "held_out": {"r10", "r11"}}
    assert sum("eval_reward" in line for line in result.history) == 2


def test_an_unjudged_sample_is_counted_and_receives_the_mean_of_its_group(tmp_path: Path, tokenizer: Any) -> None:
    def grader(rows: Any, outputs: Any) -> list[float | None]:
        return [None if place % 2 else 2.0 for place in range(len(outputs))]

    result = run(tmp_path, tokenizer, grpo={"max_steps": 1, "reward": "rj"}, grader=grader)
    assert result.unjudged == 2
    assert steps(result)[0]["unjudged"] == 0.5
    assert [line["reward"] for line in samples(tmp_path)] == [2, 2, 2, 2]
    assert [line["parts"]["judge"] for line in samples(tmp_path)] == [2, None, 2, None]
    judge_only = run(
        tmp_path / "alone", tokenizer, grpo={"max_steps": 1, "reward": "rj", "variant": "graded"}, grader=grader
    )
    assert [line["reward"] for line in samples(tmp_path / "alone")] == [2, None, 2, None]
    assert steps(judge_only)[0]["reward"] == 2  # not the mean of twos and zeros


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_rewards_are_reported_to_the_configured_tracker(
    tracker: Any, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tracker == "trackio":
        import trackio

        logged: list[dict[str, Any]] = []
        monkeypatch.setattr(trackio, "init", lambda **kwargs: logged.append(kwargs))
        monkeypatch.setattr(trackio, "log", lambda line, **_: logged.append(line))
        monkeypatch.setattr(trackio, "finish", lambda: None)
        monkeypatch.setattr(trackio, "config", {})
    run(tmp_path, tokenizer, grpo={"max_steps": 1}, report_to=[tracker])
    if tracker == "trackio":
        assert (logged[0]["project"], logged[0]["space_id"]) == ("lceval", None)
        assert any("train/parts/answer" in line for line in logged)
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = (tmp_path / "checkpoints").rglob("events.*")
        accumulator = EventAccumulator(str(events.parent))
        accumulator.Reload()
        assert {"train/reward", "train/kl", "train/parts/answer"} <= {*accumulator.Tags()["scalars"]}


def test_progress_is_printed_to_stderr(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, tokenizer, grpo={"max_steps": 1})
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "step 1 of 1: reward" in printed.err


def test_an_impossible_run_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    for wrong, match in (
        ({"grpo": {"reward": "rj"}}, "requires a judge"),
        ({"rows": []}, "no rows"),
        ({"grpo": {"completions_per_device": 3}}, "choose a divisor"),
        ({"grpo": {"max_new_tokens": 500}}, "more than the model's 512"),
        ({"grpo": {"use_vllm": "colocate"}}, "package vllm"),
    ):
        with pytest.raises(UserError, match=match):
            run(tmp_path / "none", tokenizer, **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match="resume it"):
        run(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"lr": 1}, "lr"), ({"num_generations": 1}, "num_generations"), ({"save_steps": 3, "iterations": 2}, "round")],
)
def test_an_invalid_section_is_an_error(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Grpo(**fields)


def test_every_prompt_is_drawn_once_per_epoch() -> None:
    order = grpo_module._order(5, Grpo(max_steps=7, prompts_per_step=3), seed=1)
    assert len(order) == 21
    assert all(sorted(order[start : start + 5]) == [*range(5)] for start in range(0, 20, 5))
    assert order == grpo_module._order(5, Grpo(max_steps=7, prompts_per_step=3), seed=1)
    assert order[:5] != order[5:10]


def test_the_page_documents_every_key_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    documented: dict[str, str] = {}
    for line in page.splitlines():
        if line.startswith("| `") and line.count("|") == 4:
            keys, defaults = (re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3])
            if len(keys) == len(defaults):
                documented |= dict(zip(keys, defaults, strict=True))
    assert {name: str(field.default) for name, field in Grpo.model_fields.items()}.items() <= documented.items()
    assert all(f"| `{name}` |" in page for name in rewards.NAMES)


def test_the_examples_of_the_page_are_correct() -> None:
    page = Path(__file__).parents[2] / "docs" / "rewards.md"
    assert doctest.testfile(str(page), module_relative=False).failed == 0
