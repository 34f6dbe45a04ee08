"""lcft on a tiny random model in a folder: what it loads and refuses, and contexts of no tokens."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval._cli.harness import HarnessCLI
from lm_eval.api.instance import Instance
from tiny_models import SHAPE, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from lceval.cli import invoke
from lceval.core.errors import InfrastructureError, UserError
from lceval.models import checked_hflm, selfcheck
from lceval.models.lcft import LCFT
from lceval.records.results import read_runs
from lceval.runs.configuration import configure
from lceval.runs.runner import load_model

CONTEXT = " ".join(f"w{2 + n * n % 97}" for n in range(150))
QUESTION = "w7 w8 w9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one token per word."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


def requests(context: str, *, prompt: str = "") -> dict[str, list[Instance]]:
    """One question on a context, as a generation and as two choices."""
    doc = {"context": context, "docs": [{"pid": "a", "text": context}], "gold_pids": ["a"], "answers": ["w5"]}
    prompt = prompt or f"{context} {QUESTION}"
    return {
        "generate_until": [Instance("generate_until", doc, (prompt, {"max_gen_toks": 4}), 0, ("t", 0, 1))],
        "loglikelihood": [
            Instance("loglikelihood", doc, (prompt, choice), 0, ("t", 0, 1)) for choice in (" w3 w4", " w5")
        ],
    }


def answers(model: LCFT, method: str, of: dict[str, list[Instance]]) -> list[Any]:
    return list(getattr(model, method)(of[method], disable_tqdm=True))


# Query-aware ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["generate_until", "loglikelihood"])
@pytest.mark.parametrize("kv", ["int4:residual=0", "quest:0.2:skip=0", "fier:0.2:skip=0", "full"])
def test_without_an_evictor_the_query_aware_mode_is_that_of_a_recipe_that_evicts_nothing(
    folder: Path, kv: str, method: str
) -> None:
    evicts_nothing = "snapkv:1.0" if kv == "full" else f"snapkv:1.0+{kv}"
    results, same, query_agnostic = (
        answers(LCFT(str(folder), kv=recipe, query_aware=mode), method, requests(CONTEXT))
        for recipe, mode in ((kv, True), (evicts_nothing, True), (kv, False))
    )
    if method == "generate_until":
        assert results == same
    else:
        assert [score for score, _ in results] == pytest.approx([score for score, _ in same], abs=1e-4)
        assert (results == query_agnostic) == (kv == "full")


@pytest.mark.parametrize("method", ["generate_until", "loglikelihood"])
@pytest.mark.parametrize("query_aware", [False, True])
@pytest.mark.parametrize("kv", ["snapkv:0.5", "kvzip:0.5", "criticalkv:0.5", "int8", "quest:0.5"])
def test_a_context_of_no_tokens_is_answered_from_the_question_alone(
    folder: Path, kv: str, query_aware: bool, method: str
) -> None:
    room = len(QUESTION.split()) + (4 if method == "generate_until" else 1)
    model = LCFT(str(folder), kv=kv, query_aware=query_aware, overlong="end", max_length=room)
    results = answers(model, method, requests(CONTEXT))
    expected = answers(LCFT(str(folder)), method, requests("", prompt=QUESTION))
    assert all(result.meta["kv"]["context_tokens"] == 0 and result.meta["kv"]["truncated"] for result in results)
    if method == "generate_until":
        assert results == expected
    else:
        assert [score for score, _ in results] == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("method", ["generate_until", "loglikelihood"])
@pytest.mark.parametrize("diagnose", ["gold", "attention"])
def test_a_context_of_no_tokens_is_diagnosed_as_unknown(folder: Path, diagnose: str, method: str) -> None:
    # The first token spans the end of the context, so it belongs to the question.
    of = requests("w5", prompt="w5w6 w7 w8")
    for result in answers(LCFT(str(folder), kv="snapkv:0.5", query_aware=True, diagnose=diagnose), method, of):
        assert result.meta["kv"]["context_tokens"] == 0
        assert result.meta["gold_kept" if diagnose == "gold" else "ndcg10"] is None


# Models ---------------------------------------------------------------------------------------------


def test_the_log_says_by_what_a_model_attends(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)  # so that it can be captured
    with caplog.at_level("INFO", logger="lm_eval"):
        model = LCFT(str(folder), device="cpu")
    used = "prefill by PyTorch (flash), questions and decoding by PyTorch"
    assert f"attention: {used}" in caplog.text
    assert model.get_model_info()["lcft"]["attention"] == used
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_expected_attention_is_refused_before_a_prefill_without_rope(folder: Path, name: str) -> None:
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 2} if name == "gpt2" else {"ffn_dim": 24, "word_embed_proj_dim": 96}
    random = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SHAPE, **shape}))
    message = f"^expected_attention requires RoPE .*{name} does not have: use another evictor"
    with pytest.raises(UserError, match=message):
        LCFT(random, kv="adakv:0.5:of=expected_attention", tokenizer=str(folder))
    model = LCFT(random, kv="snapkv:0.5", tokenizer=str(folder))
    with pytest.raises(UserError, match=message):
        model.use("expected_attention:0.5")
    assert str(model.recipe) == "snapkv:0.5"
    assert len(answers(model, "loglikelihood", requests(CONTEXT))) == 2


def test_a_model_is_loaded_whatever_recipe_the_first_run_has(copy: Path) -> None:
    """A recipe that the model does not support fails its own run, not the runs that share the model."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **SHAPE)).save_pretrained(copy)
    line = ["--model", "lcft", "--tasks", "lc_filings_ao_1k", "--output_path", "nowhere"]
    config = configure([*line, "--model_args", f"pretrained={copy},kv=expected_attention:0.5"])
    assert str(load_model(config).recipe) == "full"


def test_a_model_with_an_attention_of_its_own_is_refused(folder: Path) -> None:
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    falcon = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **shape, alibi=False))
    with pytest.raises(UserError, match=r"falcon has an attention of its own.*use --model hf"):
        LCFT(falcon, tokenizer=str(folder))


# Loading --------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_model_runs_on_the_cpu(folder: Path) -> None:
    assert LCFT(str(folder)).device.type == "cpu"
    # As lm_eval creates it: `cuda:0` is the default of its --device.
    model = LCFT.create_from_arg_obj({"pretrained": str(folder)}, {"device": "cuda:0", "batch_size": "2"})
    assert (model.device.type, model.batch_size) == ("cpu", 2)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def shortened(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def damaged_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    shortened("adapter/adapter_model.safetensors")(folder)


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (None, {"pretrained": "/nope"}, "pretrained=/nope: no such folder"),
        (None, {"peft": "/nope"}, "peft=/nope: no such folder"),
        (None, {"tokenizer": "./nope"}, "tokenizer=./nope: no such folder"),
        (None, {"peft": "FOLDER"}, "peft=FOLDER: the folder has no adapter_config.json"),
        (None, {"pretrained": "some/name"}, "cannot load pretrained=some/name: "),
        (None, {"peft": "some/name"}, "cannot load pretrained=FOLDER, peft=some/name: "),
        (None, {"tokenizer": "some/name"}, "cannot load tokenizer=some/name: "),
        (without("config.json"), {}, "pretrained=FOLDER: the folder has no config.json"),
        (without("model.safetensors"), {}, "cannot load pretrained=FOLDER: "),
        (shortened("model.safetensors"), {}, "FOLDER/model.safetensors is damaged"),
        (damaged_adapter, {"peft": "FOLDER/adapter"}, "FOLDER/adapter/adapter_model.safetensors is damaged"),
        (shortened("config.json"), {}, "cannot load pretrained=FOLDER: "),
        (shortened("tokenizer.json"), {}, "cannot load the tokenizer of pretrained=FOLDER: "),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_line(
    copy: Path, damage: Callable[[Path], None] | None, arguments: dict[str, str], message: str
) -> None:
    if damage:
        damage(copy)
    named = {"pretrained": str(copy)} | {k: v.replace("FOLDER", str(copy)) for k, v in arguments.items()}
    with pytest.raises(UserError) as refusal:
        LCFT(**named)
    assert message.replace("FOLDER", str(copy)) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_model_that_does_not_fit_is_a_failure_of_the_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    monkeypatch.setattr(checked_hflm.HFLM, "_create_model", full)
    with pytest.raises(InfrastructureError, match=r"out of memory: CUDA out of memory\. Tried to allocate 9 GiB$"):
        LCFT(str(folder))


BAD = [
    ({"dtype": "float17"}, "bad model argument dtype='float17': float32, bfloat16, float16 or auto"),
    ({"dtype": "nn"}, "bad model argument dtype='nn'"),
    ({"dtype": "int8"}, "bad model argument dtype='int8'"),
    ({"dtype": 16}, "bad model argument dtype=16"),
    ({"mixed_precision_dtype": "auto"}, "bad model argument mixed_precision_dtype='auto'"),
    ({"max_length": 0}, "bad model argument max_length=0: a number of tokens, at least 1"),
    ({"max_length": -5}, "bad model argument max_length=-5"),
    ({"max_length": "many"}, "bad model argument max_length='many'"),
]
BAD_FLAGS = [
    ({"batch_size": "0"}, "bad model argument batch_size='0': a number of questions, at least 1"),
    ({"batch_size": "-3"}, "bad model argument batch_size='-3'"),
    ({"batch_size": "many"}, "bad model argument batch_size='many'"),
    ({"device": "gpu"}, "unknown device=gpu: cpu, cuda, cuda:N or mps"),
    ({"device": "cuda:99"}, "device=cuda:99: PyTorch finds "),
    *([] if torch.cuda.is_available() else [({"device": "cuda"}, "device=cuda: PyTorch finds no cuda device")]),
]


@pytest.mark.parametrize(("arguments", "message"), BAD + BAD_FLAGS)
def test_a_bad_value_is_refused_before_anything_is_loaded(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        LCFT("some/name", **arguments)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(([f"--{name}", value], text) for given, text in BAD_FLAGS for name, value in given.items()),
        *((["--model_args", f"{k}={v}"], text) for given, text in BAD for k, v in given.items()),
        (["--model_args", "batch_size=2"], "batch_size is no model argument: pass it as --batch_size 2"),
        (["--model_args", "device=cpu"], "device is no model argument: pass it as --device cpu"),
        (["--model_args", "peft=/nope"], "peft=/nope: no such folder"),
        (["--model_args", "kv=tova:0.5:when=always,query_aware=true"], "evicts during decoding: use query_aware=false"),
        (["--model_args", "kv=adakv:0.5:of=finch"], "by the attention of the question: it requires query_aware=true"),
        (["--model_args", "kv=duo:0.5"], "kv=duo:0.5 requires heads=PATH: a folder with an attention pattern"),
        (["--model_args", "kv=duo:0.5,heads=no-such-file"], "heads=no-such-file: neither a folder with full_attention"),
        (["--verbosity", "loud"], "bad --verbosity LOUD: DEBUG, INFO, WARNING, ERROR or CRITICAL"),
    ],
)
def test_lceval_run_refuses_it_before_data_or_models_are_loaded(folder: Path, flags: list[str], message: str) -> None:
    line = ["--model", "lcft", "--tasks", "lc_filings_ao_1k", "--output_path", "nowhere"]
    with pytest.raises(UserError) as refusal:
        configure([*line, "--model_args", f"pretrained={folder}", *flags])
    assert message in str(refusal.value)


def test_lm_eval_names_an_option_that_is_set_twice(folder: Path) -> None:
    with pytest.raises(UserError, match="device is no model argument: pass it as --device cpu"):
        LCFT.create_from_arg_obj({"pretrained": str(folder), "device": "cpu"}, {"device": "cuda:0"})


# A task in a file of one's own ------------------------------------------------------------------------

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
doc_to_text: "{{passage}} {{query}}"
doc_to_target: "{{answer}}"
output_type: generate_until
generation_kwargs: {max_gen_toks: 4, until: []}
metric_list: [{metric: exact_match}]
"""


def evaluate(program: str, output: Path, tasks: Path, model_args: str) -> int:
    """Exit code of a run of the task with fields of its own."""
    line = ["run", "--model", "lcft", "--model_args", model_args, "--tasks", "mine", "--include_path", str(tasks)]
    line += ["--output_path", str(output)]
    if program == "lceval":
        return invoke(line)
    cli = HarnessCLI()
    try:
        cli.execute(cli._parser.parse_args([*line, "--log_samples"]))
    except SystemExit as end:
        return int(str(end.code))
    return 0


@pytest.mark.parametrize("program", ["lm_eval", "lceval"])
def test_a_task_with_fields_of_its_own_is_compressed_or_refused_in_one_line(
    folder: Path, tmp_path: Path, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = tasks / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"passage": CONTEXT, "query": f"w{n} w8", "answer": "w5"}) + "\n" for n in (2, 3))
    )
    (tasks / "mine.yaml").write_text(TASK.replace("ROWS", str(rows)))
    model_args = f"pretrained={folder},kv=snapkv:0.5"

    assert evaluate(program, tmp_path / "refused", tasks, model_args) != 0
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "mine: no context to compress under kv=snapkv:0.5" in errors[0]
    assert "context_from=FIELD (of answer, passage, query)" in errors[0]

    for number, source in enumerate(("passage", r"w\d+ w8$")):
        output = tmp_path / str(number)
        assert evaluate(program, output, tasks, f"{model_args},context_from={source}") == 0
        ((task,),) = (run.tasks for run in read_runs([output]))
        assert [sample.kv["context_tokens"] for sample in task.samples] == [150, 150]
        assert [sample.kv["kept_share"] for sample in task.samples] == pytest.approx([0.5, 0.5], abs=0.02)
        assert [sample.kv["shared_prefix"] for sample in task.samples] == [False, True]
        assert not any(sample.uncompressed for sample in task.samples)

    assert evaluate(program, tmp_path / "none", tasks, f"{model_args},context_from=none") == 0
    ((task,),) = (run.tasks for run in read_runs([tmp_path / "none"]))
    assert all(sample.uncompressed and sample.kv["kept_share"] == 1 for sample in task.samples)


@pytest.mark.parametrize(
    "kv", ["full", "snapkv:0.5", "knorm:0.5:when=chunk:chunk=64", "h2o:64:when=always", "int4", "fier:0.3", "kvzip:0.5"]
)
def test_a_recipe_is_warmed_up_and_leaves_no_trace(folder: Path, kv: str) -> None:
    model = LCFT(str(folder), kv=kv)
    (before,) = answers(model, "generate_until", requests(CONTEXT))
    totals, prefill_s = dict(model.totals), model.prefill_s
    selfcheck.warm_up(model.engine, model.base, model.recipe)
    assert (dict(model.totals), model.prefill_s) == (totals, prefill_s)
    assert answers(model, "generate_until", requests(CONTEXT)) == [before]


# Eviction while writing ---------------------------------------------------------------------------------


def test_answers_are_written_under_eviction_in_batches_and_without_a_known_context(folder: Path) -> None:
    kv = "knorm:6:when=decode:every=4"
    prompts = ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9 w1 w2 w3", "w4"]
    of = {
        "generate_until": [
            Instance(
                "generate_until", {"query": prompt}, (prompt, {"until": ["###"], "max_gen_toks": 30}), 0, ("t", 0, 1)
            )
            for prompt in prompts
        ]
    }
    alone = answers(LCFT(str(folder), kv=kv), "generate_until", of)
    together = answers(LCFT(str(folder), kv=kv, batch_size=4), "generate_until", of)
    full = answers(LCFT(str(folder)), "generate_until", of)
    assert alone == together != full
    for result in together:
        kv_meta = result.meta["kv"]
        assert kv_meta["boundary"]
        assert kv_meta["evictions"] == (kv_meta["new_tokens"] - 1) // 4 or kv_meta["evictions"] == 7
    with pytest.raises(UserError, match="a log-likelihood task writes nothing: use a generative task"):
        answers(LCFT(str(folder), kv=kv), "loglikelihood", requests(CONTEXT))
    beams = {"generate_until": [Instance("generate_until", {}, ("w1 w2", {"num_beams": 2, "max_gen_toks": 3}), 0)]}
    with pytest.raises(UserError, match="does not support beam search"):
        answers(LCFT(str(folder), kv=kv), "generate_until", beams)


def test_finch_selects_by_the_question(folder: Path) -> None:
    (result,) = answers(LCFT(str(folder), kv="finch:0.5", query_aware=True), "generate_until", requests(CONTEXT))[:1]
    assert 0.4 < result.meta["kv"]["kept_share"] < 0.7
