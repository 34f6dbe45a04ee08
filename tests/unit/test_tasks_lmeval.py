"""The task suites inside lm-eval: they load by name and run, with and without our model's telemetry."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
from lm_eval.api.model import LM
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.evaluator import evaluate
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lceval.tasks
from lceval.core.errors import UserError
from lceval.models.boundary import ContextEnd
from lceval.runs.configuration import configure, contexts_of, tasks_of
from lceval.tasks import build, catalogue, lm_eval_config, prompts

TASKS = Path(lceval.tasks.__file__).parent
# One task per output format whose data is shipped or in the data folder, with the files it requires.
SHIPPED = {"lc_filings_ao_1k", "lc_filings_id_1k", "lc_filings_rj_1k"}
FROM_FOLDER = {"lc_nqopen_docid_2k", "lc_nqopen_idc_4k", "lc_nqopen_idq_2k", "lc_quality_mc", "lc_kvlookup_ao_4k"}
TELEMETRY = {"kv_bytes", "kv_bytes_full", "kv"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """One token per word and one per digit, with a chat template; saved under its `name_or_path`."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    # without one token per digit, complete lists of UUIDs would be shorter than 4k
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.save_pretrained(folder)
    tokenizer.name_or_path = folder
    return tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path_factory.getbasetemp() / "lmeval-cache"))


def manager(**metadata: Any) -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


def run(lm: LM, task: str, tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> dict[str, Any]:
    loaded = manager(pretrained=tokenizer.name_or_path).load([task])
    results = evaluate(lm=lm, task_dict=loaded, limit=8, bootstrap_iters=10, **kwargs)
    assert results is not None
    return dict(results)


class Text(str):
    """A response with telemetry."""

    meta: dict[str, Any]


class Score(tuple):  # type: ignore[type-arg]
    """A log-likelihood with telemetry."""

    meta: dict[str, Any]


class Recorder(LM):
    """Returns answers with telemetry, fails every fourth request like `overlong=skip`, and records the prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.requests: list[Any] = []
        self.context_end = ContextEnd()

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        rendered: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return rendered

    @property
    def tokenizer_name(self) -> str:
        return "words"

    def _meta(self, index: int) -> dict[str, Any]:
        if index % 4 == 3:
            return {"kv_bytes": 0, "kv_bytes_full": 0, "kv": {"status": "error", "kept_share": 1.0}}
        return {"kv_bytes": 25, "kv_bytes_full": 100, "kv": {"status": "ok", "kept_share": 0.25}}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.requests = requests
        answers = []
        for index, request in enumerate(requests):
            answer = Text("" if index % 4 == 3 else f"Answer: {request.doc['answers'][0]}")
            answer.meta = self._meta(index)
            answers.append(answer)
        return list(answers)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.requests = requests
        scores = []
        for request in requests:
            score = Score((-1.0 if request.idx == request.doc["gold"] else -500.0, False))
            score.meta = self._meta(request.doc_id)
            scores.append(score)
        return list(scores)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


def test_every_name_of_the_catalogue_is_found_and_nothing_else() -> None:
    tasks = manager()
    assert set(tasks.all_subtasks) == set(catalogue.tasks())
    assert set(tasks.all_groups) == set(catalogue.groups())
    assert set(tasks.all_tasks) == set(catalogue.tasks()) | set(catalogue.groups())
    assert not set(catalogue.tasks()) & set(catalogue.groups())


def test_a_users_own_task_replaces_ours_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text('task: "lc_filings_ao_1k"\noutput_type: "generate_until"\n')
    index = TaskManager(include_path=[str(TASKS), str(tmp_path)], include_defaults=False).task_index
    assert index["lc_filings_ao_1k"].yaml_path == tmp_path / "mine.yaml"


@pytest.mark.parametrize("task", catalogue.tasks().values(), ids=lambda task: task.name)
def test_every_task_has_a_template_whose_parts_agree(task: catalogue.Task) -> None:
    config = lm_eval_config.task_config(task)
    names = [metric["metric"] for metric in config["metric_list"]]
    assert config["metadata"]["headline"] in names
    assert len(set(names)) == len(names)
    assert {*TELEMETRY, "gold_nll", "gold_kept", "ndcg10"} <= set(names)
    assert callable(config["process_results"])
    assert (
        config["metadata"]["version"]
        == f"{task.dataset.version}.{catalogue.output_format_config(task.output_format)['metadata']['version']}"
    )
    if config["output_type"] == "generate_until":
        assert config["generation_kwargs"]["do_sample"] is False
        assert config["generation_kwargs"]["max_gen_toks"] > 0
    else:
        # The prompt ends with it, so the row's reply prefix must not repeat it.
        assert config["gen_prefix"] == prompts.ANSWER_PREFIX
        assert prompts.reply_prefix(task.output_format) == ""


@pytest.mark.parametrize("dataset", catalogue.datasets().values(), ids=lambda dataset: dataset.dataset)
def test_a_dataset_has_all_required_fields(dataset: catalogue.Dataset) -> None:
    assert dataset.suite in {"icr", "finance", "mc", "longdoc", "tabular"}
    assert set(dataset.contexts) <= set(catalogue.CONTEXTS)
    assert dataset.contexts[0] == "full"
    assert ("rag" in dataset.contexts) <= bool(dataset.retrievers)
    assert callable(build.row_builder(dataset))
    assert dataset.layout in prompts.LAYOUTS
    assert dataset.about
    assert dataset.licence
    assert dataset.count
    pinned = dataset.hub is None or re.fullmatch("[0-9a-f]{40}", dataset.hub.revision)
    assert pinned or dataset.dataset in ("loong", "mrcr", "ruler")  # not pinned; the current commit is recorded


def test_suites_have_only_tasks_that_fit_an_8k_model() -> None:
    groups = catalogue.groups()
    assert groups["lc_nqopen_ao"] == [f"lc_nqopen_ao_{k}k" for k in (2, 4, 8, 16, 32, 64, 128)]
    assert {"lc_nqopen_ao_8k", "lc_hotpotpool_ao_2k", "lc_kvlookup_ao_8k"} <= set(groups["lc_icr"])
    assert not any(name.endswith(("16k", "32k", "64k", "128k")) for name in groups["lc_icr"])
    assert {"lc_filings_ao_1k", "lc_filings_ao_2k"} <= set(groups["lc_finance"])
    assert "lc_quality_mc" in groups["lc_mc"]
    assert {"lc_icr", "lc_finance", "lc_mc"} <= set(groups["lc_all"])


def test_a_group_loads_its_tasks_and_their_versions(tokenizer: PreTrainedTokenizerFast) -> None:
    loaded = manager(pretrained=tokenizer.name_or_path).load(["lc_filings_ao"])
    assert set(loaded["tasks"]) == {"lc_filings_ao_1k", "lc_filings_ao_2k"}
    assert {task.VERSION for task in loaded["tasks"].values()} == {"1.1"}


def test_a_group_without_data_ends_in_the_one_line_error(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LCEVAL_DATA", raising=False)
    with pytest.raises(UserError, match="LCEVAL_DATA is not set"):
        manager(pretrained=tokenizer.name_or_path).load(["lc_mc"])


def test_metadata_on_the_command_line_changes_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    first, other = (
        manager(pretrained=tokenizer.name_or_path, **more).load(["lc_filings_ao_1k"])["tasks"]["lc_filings_ao_1k"]
        for more in ({}, {"data_seed": 7})
    )
    assert first.eval_docs[0]["question"] != other.eval_docs[0]["question"]


@pytest.mark.parametrize("task", sorted(SHIPPED | FROM_FOLDER))
def test_a_model_without_telemetry_runs_every_task(
    task: str,
    tokenizer: PreTrainedTokenizerFast,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if task in FROM_FOLDER:
        request.getfixturevalue("data_folder")
    random.seed(0)
    with caplog.at_level(logging.WARNING):
        results = run(DummyLM(), task, tokenizer)
    scored = {key.split(",")[0] for key in results["results"][task] if "," in key and "_stderr" not in key}
    declared = {
        metric["metric"] for metric in catalogue.output_format_config(catalogue.find(task).output_format)["metric_list"]
    }
    assert scored == declared
    # lm-eval always logs that custom datasets take --metadata; nothing else may be logged
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("lm_eval")]
    assert [message for message in messages if "--metadata" not in message] == []


@pytest.mark.parametrize("chat", [False, True])
def test_the_context_is_verbatim_in_every_prompt_and_the_length_is_met(
    tokenizer: PreTrainedTokenizerFast, chat: bool
) -> None:
    lm = Recorder(tokenizer)
    run(lm, "lc_filings_ao_1k", tokenizer, apply_chat_template=chat)
    assert len(lm.requests) == 8
    for request in lm.requests:
        prompt, gen_kwargs = request.args
        assert prompt.count(request.doc["context"]) == 1
        assert prompt.index(request.doc["context"]) < prompt.index(request.doc["question"])
        total = len(tokenizer(prompt)["input_ids"]) + gen_kwargs["max_gen_toks"]
        assert 0.98 * 1024 <= total <= 1024
        if chat:
            assert total == request.doc["length_tokens"]


SYSTEM = "You are a careful analyst of filings. " * 9


def through_lm_eval(lm: Recorder, tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
    config = EvaluatorConfig(
        tasks=["lc_filings_ao_1k"], model_args={"pretrained": tokenizer.name_or_path}, system_instruction=SYSTEM
    )
    config._configure()
    loaded = manager(**config.metadata).load(config.tasks)
    evaluate(lm=lm, task_dict=loaded, limit=8, system_instruction=SYSTEM, apply_chat_template=chat)


def through_python(lm: Recorder, tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
    metadata = {"pretrained": tokenizer.name_or_path}
    lm_eval.evaluator.simple_evaluate(
        lm, tasks=["lc_filings_ao_1k"], metadata=metadata, limit=8, system_instruction=SYSTEM, apply_chat_template=chat
    )


def through_lceval(lm: Recorder, tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
    line = ["--model", "dummy", "--model_args", f"pretrained={tokenizer.name_or_path}", "--output_path", "x"]
    config = configure([*line, "--tasks", "lc_filings_ao_1k", "--limit", "8", "--system_instruction", SYSTEM])
    contexts = contexts_of(
        tasks_of(config, allow_code=False)[1]["tasks"].values(),
        lm,
        template=chat,
        limit=config.limit,
        system_instruction=config.system_instruction,
    )
    lm.requests = [request for context in contexts for request in context.requests]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("run_through", [through_lm_eval, through_python, through_lceval])
def test_a_system_instruction_counts_towards_the_length(
    tokenizer: PreTrainedTokenizerFast,
    chat: bool,
    run_through: Callable[[Recorder, PreTrainedTokenizerFast, bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without lm-eval's own tasks, whose index takes seconds.
    monkeypatch.setattr(lm_eval.evaluator, "TaskManager", lambda metadata: manager(**metadata))
    lm = Recorder(tokenizer)
    run_through(lm, tokenizer, chat)
    assert len(lm.requests) == 8
    for request in lm.requests:
        prompt, gen_kwargs = request.args
        assert prompt.startswith(f"<system> {SYSTEM.strip()}" if chat else SYSTEM)
        assert 0.98 * 1024 <= len(tokenizer(prompt)["input_ids"]) + gen_kwargs["max_gen_toks"] <= 1024


def test_a_system_instruction_that_the_rows_do_not_count_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        UserError, match=r"lc_filings_ao_1k: .*'Be brief.*: pass the same text to TaskManager"
    ) as caught:
        run(Recorder(tokenizer), "lc_filings_ao_1k", tokenizer, system_instruction="Be brief.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chat", [False, True])
def test_options_follow_the_answer_prefix(tokenizer: PreTrainedTokenizerFast, chat: bool, data_folder: Path) -> None:
    lm = Recorder(tokenizer)
    run(lm, "lc_quality_mc", tokenizer, apply_chat_template=chat)
    assert len(lm.requests) == 32
    for request in lm.requests:
        prompt, option = request.args
        assert prompt.count(request.doc["context"]) == 1
        assert prompt.endswith("<assistant> Answer:" if chat else "\nAnswer:")
        assert option == " " + request.doc["choices"][request.idx]


def test_telemetry_reaches_the_results_and_failed_samples_stay_in_the_denominator(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        results = run(Recorder(tokenizer), "lc_filings_ao_1k", tokenizer)
    scores = results["results"]["lc_filings_ao_1k"]
    assert scores["sample_len"] == 8
    assert scores["subem,none"] == scores["parse_rate,none"] == 0.75
    assert scores["kv_bytes,none"] == 0.75 * 25
    assert scores["kv,none"] == 0.25
    statuses = [sample["kv"]["status"] for sample in results["samples"]["lc_filings_ao_1k"]]
    assert statuses == ["ok", "ok", "ok", "error"] * 2
    assert "aggregation" not in caplog.text
    assert results["higher_is_better"]["lc_filings_ao_1k"]["kv_bytes"] is False


def test_telemetry_of_choices_reaches_the_results(tokenizer: PreTrainedTokenizerFast, data_folder: Path) -> None:
    results = run(Recorder(tokenizer), "lc_quality_mc", tokenizer)
    scores = results["results"]["lc_quality_mc"]
    assert scores["acc,none"] == scores["acc_norm,none"] == 0.75
    assert scores["kv,none"] == 0.25
    sample = results["samples"]["lc_quality_mc"][0]
    assert set(sample["metrics"]) >= TELEMETRY
