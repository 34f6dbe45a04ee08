"""Results are read as lm-eval and lceval write them, and every error message names a remedy."""

import json
import math
from pathlib import Path

import pytest

from lceval.analysis.table import build, main
from lceval.core.errors import UserError
from lceval.records.results import read_folder, read_runs

DATE = "2026-01-02T03-04-05.678901"
LATER = "2026-01-03T03-04-05.678901"


def line(doc_id, metrics, *, doc=None, filter_name="none"):
    """One line of a samples file, with the keys lm-eval writes in the order it writes them."""
    return {
        "doc_id": doc_id,
        "doc": {"question": "Where?"} if doc is None else doc,
        "target": "Paris",
        "arguments": {"gen_args_0": {"arg_0": "Where?", "arg_1": {"until": ["\n\n"], "max_gen_toks": 16}}},
        "resps": [["Paris"]],
        "filtered_resps": ["Paris"],
        "filter": filter_name,
        "metrics": list(metrics),
        "doc_hash": "00",
        "prompt_hash": "11",
        "target_hash": "22",
        **metrics,
    }


def write_results(folder, samples, *, date=DATE, config=None, configs=None):
    """A results file and a samples file per task, as lm-eval's EvaluationTracker leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "results": {task: {"name": task, "sample_len": len(lines)} for task, lines in samples.items()},
        "configs": {
            task: {"task": task, "metadata": {"version": 1.0}} | (configs or {}).get(task, {})
            for task in sorted(samples)
        },
        "versions": dict.fromkeys(samples, 1.0),
        "higher_is_better": {task: {"acc": True, "perplexity": False} for task in samples},
        "n-samples": {task: {"original": 99, "effective": len(lines)} for task, lines in samples.items()},
        "config": {"model": "hf", "model_args": {"pretrained": "Org/Model"}} | (config or {}),
        "model_name": "Org/Model",
    }
    (folder / f"results_{date}.json").write_text(json.dumps(results), encoding="utf-8")
    for task, lines in samples.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        (folder / f"samples_{task}_{date}.jsonl").write_text(text, encoding="utf-8")


def write_run_json(folder, **keys):
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "status": "finished",
        "model": "lcft",
        "model_args": {"pretrained": "smollm2-135m", "kv": "snapkv:0.250"},
        "recipe": "snapkv:0.25",
        "tasks": ["lc_nq_ao_8k"],
    }
    (folder / "run.json").write_text(json.dumps(defaults | keys), encoding="utf-8")


def scores(run, task=0):
    return [sample.score for sample in run.tasks[task].samples]


def only(path):
    (run,) = read_folder(path)
    return run


def test_reads_a_plain_lm_eval_folder_without_telemetry(tmp_path):
    lines = [line(0, {"acc": 1.0, "acc_norm": 0.0}), line(1, {"acc": 0.0, "acc_norm": 1.0})]
    write_results(tmp_path / "out" / "Org__Model", {"mc": lines})
    run = only(tmp_path / "out")
    assert (run.label, run.model, run.pretrained, run.peft, run.recipe) == (
        "out",
        "hf",
        "Org/Model",
        None,
        "-",
    )
    assert run.finished
    (task,) = run.tasks
    assert (task.task, task.version, task.headline, task.expected) == ("mc", "1.0", "acc", 2)
    assert scores(run) == [1.0, 0.0]
    assert task.samples[0].kv_bytes is None
    assert task.samples[0].kv == {}


def test_reads_the_model_sub_folder_itself(tmp_path):
    write_results(tmp_path / "Org__Model", {"mc": [line(0, {"acc": 1.0})]})
    assert only(tmp_path / "Org__Model").label == "Org__Model"


def test_reads_a_lceval_run_with_its_telemetry(tmp_path):
    kv = {"kept_share": 0.25, "kv_dtype": "float32", "prefill_s": 1.5, "status": "ok", "truncated": False}
    metrics = {"subem": 1.0, "kv_bytes": 123, "kv_bytes_full": 456, "kv": kv}
    lines = [line(0, metrics, doc={"id": "q-7", "cluster": "story 3"})]
    write_results(tmp_path / "run", {"lc_nq_ao_8k": lines})
    write_run_json(tmp_path / "run", model_args={"pretrained": "smollm2-135m", "peft": "runs/ao"})
    run = only(tmp_path / "run")
    assert (run.model, run.pretrained, run.peft, run.recipe) == (
        "lcft",
        "smollm2-135m",
        "runs/ao",
        "snapkv:0.25",
    )
    (sample,) = run.tasks[0].samples
    assert (sample.id, sample.cluster, sample.score, sample.status) == ("q-7", "story 3", 1.0, "ok")
    assert (sample.kv_bytes, sample.kv_bytes_full, sample.kv) == (123, 456, kv)


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        ({"model": "lcft", "model_args": {"pretrained": "m", "kv": "streaming:64"}}, "streaming:64"),
        (
            {"model": "lcft", "model_args": "pretrained=m,kv=snapkv:0.25:window=32+int4"},
            "snapkv:0.25:window=32+int4",
        ),
        ({"model": "lcft", "model_args": "pretrained=m"}, "full"),
        ({"model": "lcft", "model_args": None}, "full"),
        ({"model": "vllm", "model_args": "pretrained=m"}, "-"),
    ],
    ids=["mapping", "string with = in a value", "lcft default", "no arguments", "another model"],
)
def test_recipe_comes_from_the_model_arguments_without_a_run_json(tmp_path, config, recipe):
    write_results(tmp_path / "m", {"mc": [line(0, {"acc": 1.0})]}, config=config)
    assert only(tmp_path).recipe == recipe


def test_headline_is_the_declared_metric_else_the_first_listed_numeric_one(tmp_path):
    lines = [line(0, {"kv_bytes": 5, "bleu": ["a", "b"], "em": 0.0, "f1": 0.5})]
    listed = {"metric_list": [{"metric": "kv_bytes"}, {"metric": "bleu"}, {"metric": "f1"}, {"metric": "em"}]}
    declared = listed | {"metadata": {"version": 1.0, "headline": "em"}}
    configs = {"declared": declared, "listed": listed}
    write_results(
        tmp_path / "m",
        {"declared": lines, "listed": lines, "neither": lines, "corpus": [line(0, {"bleu": ["a", "b"]})]},
        configs=configs,
    )
    run = only(tmp_path)
    assert {task.task: task.headline for task in run.tasks} == {
        "declared": "em",
        "listed": "f1",
        "neither": "em",
        "corpus": None,
    }
    assert run.tasks[3].samples[0].status == "ok"


def test_of_several_filters_the_first_is_scored_and_all_are_listed(tmp_path):
    lines = [line(i, {"exact_match": 1.0}, filter_name="strict") for i in range(2)]
    lines += [line(i, {"exact_match": 0.0}, filter_name="loose") for i in range(2)]
    write_results(tmp_path / "m", {"gsm": lines})
    run = only(tmp_path)
    assert run.tasks[0].filters == ("strict", "loose")
    assert scores(run) == [1.0, 1.0]


def test_a_sample_without_a_cluster_is_its_own_cluster(tmp_path):
    docs = [{"cluster": "a"}, {"cluster": "a"}, {}, {"cluster": 7}, "not a mapping"]
    lines = [line(0, {"acc": 1.0}, doc=doc) for doc in docs]
    write_results(tmp_path / "m", {"mc": lines})
    clusters = [sample.cluster for sample in only(tmp_path).tasks[0].samples]
    assert clusters[:2] == ["a", "a"]
    assert len(set(clusters)) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "n/a"])
def test_a_score_that_is_not_a_finite_number_is_an_error(tmp_path, bad):
    write_results(tmp_path / "m", {"mc": [line(0, {"acc": 1.0}), line(1, {"acc": bad})]})
    good, error = only(tmp_path).tasks[0].samples
    assert (good.score, good.status) == (1.0, "ok")
    assert (error.score, error.status) == (None, "error")


def test_a_missing_score_is_an_error_and_not_a_shorter_list(tmp_path):
    write_results(tmp_path / "m", {"mc": [line(0, {"acc": 1.0}), line(1, {})]})
    assert scores(only(tmp_path)) == [1.0, None]


def test_a_failed_sample_has_no_score_and_a_truncated_one_is_marked(tmp_path):
    failed, truncated = {"status": "error"}, {"status": "ok", "truncated": True}
    lines = [line(0, {"acc": 1.0, "kv": failed}), line(1, {"acc": 1.0, "kv": truncated})]
    write_results(tmp_path / "m", {"mc": lines})
    samples = only(tmp_path).tasks[0].samples
    assert [(sample.score, sample.status) for sample in samples] == [(None, "error"), (1.0, "truncated")]


def test_tasks_keep_their_run_order_and_groups_are_not_tasks(tmp_path):
    write_results(tmp_path / "m", {"zebra": [line(0, {"acc": 1.0})], "ant": [line(0, {"acc": 1.0})]})
    assert [task.task for task in only(tmp_path).tasks] == ["zebra", "ant"]


def test_two_evaluations_in_one_folder_are_two_runs_labelled_by_date(tmp_path):
    write_results(tmp_path / "out" / "m", {"mc": [line(0, {"acc": 0.0})]})
    write_results(tmp_path / "out" / "m", {"mc": [line(0, {"acc": 1.0})]}, date=LATER)
    older, newer = read_folder(tmp_path / "out")
    assert (older.label, scores(older)) == (f"out@{DATE}", [0.0])
    assert (newer.label, scores(newer)) == (f"out@{LATER}", [1.0])


def test_two_models_in_one_folder_are_two_runs_labelled_by_sub_folder(tmp_path):
    for model in ("Org__B", "Org__A"):
        write_results(tmp_path / "out" / model, {"mc": [line(0, {"acc": 0.0})]})
    assert [run.label for run in read_folder(tmp_path / "out")] == ["out/Org__A", "out/Org__B"]


def test_a_lceval_run_has_its_newest_results(tmp_path):
    write_run_json(tmp_path)
    write_results(tmp_path, {"mc": [line(0, {"acc": 0.0})]})
    write_results(tmp_path, {"mc": [line(0, {"acc": 1.0})]}, date=LATER)
    assert scores(only(tmp_path)) == [1.0]


def test_runs_of_the_same_name_are_labelled_by_their_parents(tmp_path):
    for parent in ("a", "b"):
        write_results(tmp_path / parent / "out" / "m", {"mc": [line(0, {"acc": 0.0})]})
    runs = read_runs([tmp_path / "a" / "out", tmp_path / "b" / "out"])
    assert [run.label for run in runs] == ["a/out", "b/out"]


def lceval_run(folder, score=1.0):
    write_results(folder, {"mc": [line(0, {"acc": score})]})
    write_run_json(folder)


def test_a_folder_of_runs_gives_all_its_runs_labelled_by_relative_path(tmp_path):
    sweep = tmp_path / "sweep"
    for name in ("b", "a/two", "a/one"):
        lceval_run(sweep / name)
    write_results(sweep / "a" / "hf" / "Org__Model", {"mc": [line(0, {"acc": 0.0})]})
    write_results(sweep / "plain", {"mc": [line(0, {"acc": 0.0})]})
    write_results(sweep / "plain", {"mc": [line(0, {"acc": 0.0})]}, date=LATER)
    (sweep / "logs").mkdir()
    (sweep / "sweep.json").write_text("{}")
    lceval_run(sweep / ".saving-1")
    runs = read_folder(sweep)
    assert [run.label for run in runs] == ["a/hf", "a/one", "a/two", "b", f"plain@{DATE}", f"plain@{LATER}"]
    assert [run.path for run in runs[:2]] == [sweep / "a" / "hf", sweep / "a" / "one"]
    assert [scores(run) for run in runs[:2]] == [[0.0], [1.0]]


def test_folders_inside_a_run_folder_are_ignored(tmp_path):
    lceval_run(tmp_path / "run")
    lceval_run(tmp_path / "run" / "inner", score=0.0)
    assert scores(only(tmp_path / "run")) == [1.0]


def test_runs_are_searched_two_levels_deep(tmp_path):
    lceval_run(tmp_path / "a" / "b" / "c" / "run")
    with pytest.raises(UserError, match="no results_"):
        read_folder(tmp_path / "a")
    assert only(tmp_path / "a" / "b").label == "c/run"


def test_runs_of_the_same_name_in_two_sweeps_are_labelled_by_sweep(tmp_path):
    for name in ("one/x/full", "two/x/full", "two/lone"):
        lceval_run(tmp_path / name)
    runs = read_runs([tmp_path / "one", tmp_path / "two"])
    assert [run.label for run in runs] == ["one/x/full", "lone", "two/x/full"]


def test_a_broken_run_in_a_folder_of_runs_is_named(tmp_path):
    lceval_run(tmp_path / "a")
    write_run_json(tmp_path / "b")
    with pytest.raises(UserError, match=r"b: the status in run\.json is finished, but there is no results_"):
        read_folder(tmp_path)


def test_a_sample_without_a_verdict_is_unjudged(tmp_path):
    failed = {"subem": 1.0, "judge_sum": None, "kv": {"status": "error"}}
    lines = [line(0, {"subem": 1.0, "judge_sum": 3.0}), line(1, {"subem": 1.0, "judge_sum": None}), line(2, failed)]
    write_results(tmp_path / "m", {"rj": lines, "ao": [line(0, {"subem": 1.0})]})
    rj, ao = only(tmp_path).tasks
    assert [sample.unjudged for sample in rj.samples] == [False, True, False]
    assert ao.samples[0].unjudged is None


def test_an_unfinished_run_has_its_samples_so_far(tmp_path):
    write_run_json(tmp_path, status="running")
    write_results(tmp_path, {"done": [line(0, {"acc": 1.0})], "next": [line(0, {"acc": 1.0})]})
    (tmp_path / f"samples_next_{DATE}.jsonl").unlink()
    run = only(tmp_path)
    assert not run.finished
    assert [(task.task, len(task.samples)) for task in run.tasks] == [("done", 1), ("next", 0)]


def test_a_run_that_has_just_started_has_its_tasks_without_samples(tmp_path):
    write_run_json(tmp_path, status="running", tasks=["lc_nq_ao_8k", "lc_icr"])
    run = only(tmp_path)
    assert [(task.task, task.samples) for task in run.tasks] == [("lc_nq_ao_8k", ()), ("lc_icr", ())]
    assert run.recipe == "snapkv:0.25"


def test_a_line_separator_inside_a_text_does_not_split_the_sample(tmp_path):
    write_results(tmp_path / "m", {"mc": [line(0, {"acc": 1.0}, doc={"id": "a\u2028b\x85c"})]})
    assert [sample.id for sample in only(tmp_path).tasks[0].samples] == ["a\u2028b\x85c"]


def broken_samples(path: Path) -> None:
    write_results(path, {"mc": [line(0, {"acc": 1.0})]})
    (path / f"samples_mc_{DATE}.jsonl").write_text('{"doc_id": 0}\n{"doc_id": 1, "do', encoding="utf-8")


def no_samples(path: Path) -> None:
    write_results(path, {"mc": []})
    (path / f"samples_mc_{DATE}.jsonl").unlink()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text(""), "not a folder"),
        (lambda path: path.mkdir(), "no results_"),
        (lambda path: write_run_json(path), "run it again"),
        (lambda path: write_run_json(path, status="running", tasks=[]), "no task recorded"),
        (no_samples, "--log_samples"),
        (lambda path: write_results(path, {"mc": []}), "no samples inside"),
        (broken_samples, r"jsonl line 2 is not a JSON object"),
        (lambda path: (path.mkdir(), (path / "run.json").write_text("{")), "not valid JSON"),
        (lambda path: (path.mkdir(), (path / "run.json").write_text("[]")), "expected a JSON object"),
        (lambda path: (path / "a" / "b").mkdir(parents=True), "no results_"),
    ],
    ids=[
        "missing",
        "a file",
        "empty",
        "finished without results",
        "nothing yet",
        "no samples file",
        "empty samples file",
        "truncated samples",
        "truncated run.json",
        "list run.json",
        "folders without a run",
    ],
)
def test_an_unreadable_folder_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "out")
    with pytest.raises(UserError, match=message) as error:
        read_folder(tmp_path / "out")
    assert str(tmp_path / "out") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sample_has_its_answer_and_the_digest_of_its_prompt(tmp_path):
    generated, scored = line(0, {"acc": 1.0}), line(1, {"acc": 0.0})
    scored["filtered_resps"] = [[-1.5, False], [-0.25, True]]
    write_results(tmp_path, {"qa": [generated, scored]})
    task = only(tmp_path).tasks[0]
    assert [sample.answer for sample in task.samples] == ["Paris", "[-1.5, -0.25]"]
    assert [sample.prompt_hash for sample in task.samples] == ["11", "11"]
    assert task.file == tmp_path / f"samples_qa_{DATE}.jsonl"


# Run folders of versions before 0.2 ---------------------------------------------------------------------------------


def old_run(folder, kv, compress=None, *, as_text=False, setting="full", run_json=True):
    """A run folder as versions before 0.2 wrote it: `compress=` in the model arguments, `shown` in the docs."""
    arguments = {"pretrained": "smollm2-135m", "kv": kv} | ({"compress": compress} if compress else {})
    model_args = ",".join(f"{key}={value}" for key, value in arguments.items()) if as_text else arguments
    docs = [{"id": f"q{i}", "cluster": f"c{i}", "shown": setting} for i in range(4)]
    answers = [float(i % 2 or kv == "full") for i in range(4)]
    lines = [line(i, {"subem": answers[i]}, doc=doc) for i, doc in enumerate(docs)]
    config = {"model": "lcft", "model_args": model_args}
    write_results(folder, {"lc_filings_ao_1k": lines}, config=config)
    if run_json:
        write_run_json(folder, **config, recipe=kv, tasks=["lc_filings_ao_1k"])


@pytest.mark.parametrize(("compress", "query_aware"), [("aware", True), ("agnostic", False), (None, None)])
@pytest.mark.parametrize("as_text", [False, True], ids=["mapping", "text"])
@pytest.mark.parametrize("run_json", [True, False], ids=["lceval run", "plain lm_eval"])
def test_the_compress_argument_of_old_runs_is_read_as_query_aware(tmp_path, compress, query_aware, as_text, run_json):
    old_run(tmp_path / "run", "snapkv:0.5", compress, as_text=as_text, run_json=run_json)
    arguments = only(tmp_path / "run").config["model_args"]
    expected = {"pretrained": "smollm2-135m", "kv": "snapkv:0.5"}
    assert arguments == (expected if query_aware is None else expected | {"query_aware": query_aware})


@pytest.mark.parametrize(
    ("old", "new"),
    [("full", "full"), ("rag:k=4:alike", "rag:k=4:length_matched"), ("alike:x", "alike:x"), ("", None)],
)
def test_the_context_setting_of_old_docs_is_read_under_its_current_name(tmp_path, old, new):
    old_run(tmp_path / "run", "full", setting=old)
    assert only(tmp_path / "run").tasks[0].context == new


def test_the_current_context_setting_is_read_as_it_is(tmp_path):
    doc = {"id": "q0", "context_setting": "gold:length_matched", "shown": "full"}
    write_results(tmp_path / "m", {"lc_a": [line(0, {"subem": 1.0}, doc=doc)]})
    assert only(tmp_path).tasks[0].context == "gold:length_matched"


@pytest.mark.parametrize("as_text", [False, True], ids=["mapping", "text"])
def test_an_old_query_aware_run_is_compared_with_its_full_run(tmp_path, as_text):
    old_run(tmp_path / "full", "full", "agnostic", as_text=as_text)
    old_run(tmp_path / "aware", "snapkv:0.5", "aware", as_text=as_text)
    full, aware = build(read_runs([tmp_path / "full", tmp_path / "aware"])).rows
    assert (full["query_aware"], full["retention"]) == (None, None)
    assert (aware["query_aware"], aware["retention"], aware["delta"]) == (True, 0.5, -0.5)


def test_an_old_run_and_a_current_one_are_compared_with_each_other(tmp_path):
    old_run(tmp_path / "full", "full")
    current = {"model": "lcft", "model_args": {"pretrained": "smollm2-135m", "kv": "snapkv:0.5", "query_aware": True}}
    docs = [{"id": f"q{i}", "cluster": f"c{i}", "context_setting": "full"} for i in range(4)]
    lines = [line(i, {"subem": 0.0}, doc=doc) for i, doc in enumerate(docs)]
    write_results(tmp_path / "new", {"lc_filings_ao_1k": lines}, config=current)
    (_, new) = build(read_runs([tmp_path / "full", tmp_path / "new"])).rows
    assert (new["query_aware"], new["delta"]) == (True, -1.0)


def test_predictions_without_scores_have_no_metric_and_are_no_errors(tmp_path):
    """--predict_only logs the metric `bypass`; a score of 0 would be a result that nobody measured."""
    configs = {"mc": {"metadata": {"version": 1.0, "headline": "acc"}}}
    write_results(tmp_path, {"mc": [line(i, {"bypass": 999}) for i in range(2)]}, configs=configs)
    (task,) = only(tmp_path).tasks
    assert task.headline is None
    assert [(sample.status, sample.score, sample.metrics) for sample in task.samples] == [("ok", None, {})] * 2
    (row,) = build(read_runs([tmp_path])).rows
    assert (row["n"], row["errors"], row["score"], row["metric"], row["metrics"]) == (2, 0, None, None, {})
    (printed,) = [text for text in main([tmp_path], "markdown").splitlines() if tmp_path.name in text]
    assert "n/a" in printed


@pytest.mark.parametrize(
    ("recipe", "boundary", "doc", "uncompressed"),
    [
        ("snapkv:0.25", False, {"question": "Where?"}, 1),
        ("snapkv:0.25", True, {"context": "Paris"}, 0),
        ("snapkv:0.25", False, {"context": ""}, 0),  # context=none
        ("full", False, {"question": "Where?"}, None),
    ],
)
def test_samples_that_a_recipe_could_not_compress_are_counted(tmp_path, recipe, boundary, doc, uncompressed):
    kv = {"status": "ok", "boundary": boundary, "kept_share": 1.0}
    write_results(tmp_path, {"lc_nq_ao_8k": [line(0, {"subem": 1.0, "kv": kv}, doc=doc)]})
    write_run_json(tmp_path, recipe=recipe)
    (row,) = build(read_runs([tmp_path])).rows
    assert row["uncompressed"] == uncompressed
    assert ("not compressed: " in main([tmp_path])) == bool(uncompressed)
