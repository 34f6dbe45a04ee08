"""The table counts every sample, is unrounded as data, and fits 100 columns."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lceval.analysis.table import KEYS, build, main, to_csv, to_json, to_markdown, to_terminal
from lceval.core.errors import UserError
from lceval.records.results import Run, Sample, TaskResult
from lceval.stats.estimates import cluster_bootstrap

LONG_RECIPE = "adakv:0.25:of=snapkv:window=32+int4"


def sample(score, *, cluster="c", kv_bytes=None, kv_bytes_full=None, status="ok", **kv):
    return Sample("id", cluster, score, kv_bytes, kv_bytes_full, kv, status)


def samples_of(scores, **keys):
    """A sample per score, each in a cluster of its own."""
    return tuple(sample(score, cluster=f"c{i}", **keys) for i, score in enumerate(scores))


def task(samples, name="lc_nq_ao_8k", **keys):
    defaults = {"version": "1.0", "headline": "subem", "filters": ("none",)}
    return TaskResult(name, **(defaults | keys), samples=tuple(samples))


def run(*tasks, label="base", model="lcft", pretrained="org/smol", recipe="full", finished=True, peft=None):
    return Run(Path(label), label, model, pretrained, peft, recipe, finished, {}, tasks)


def row(*samples, **keys):
    (only,) = build([run(task(samples, **keys))]).rows
    return only


def cells(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_rows_are_grouped_by_task_and_keep_the_order_of_the_runs():
    first = run(task(samples_of([1.0]), "t1"), task(samples_of([1.0]), "t2"), label="b")
    second = run(task(samples_of([1.0]), "t2"), task(samples_of([1.0]), "t1"), label="a")
    rows = build([first, second]).rows
    assert [(row["task"], row["run"]) for row in rows] == [
        ("t1", "b"),
        ("t1", "a"),
        ("t2", "b"),
        ("t2", "a"),
    ]


def test_a_row_has_exactly_the_documented_keys():
    assert list(row(*samples_of([1.0, 0.0]))) == list(KEYS)


def test_the_interval_is_over_clusters():
    samples = [sample(score, cluster=name) for score, name in [(1, "a"), (1, "a"), (0, "b"), (0.5, "c")]]
    values = row(*samples)
    expected = cluster_bootstrap([1, 1, 0, 0.5], ["a", "a", "b", "c"])
    assert (values["score"], values["ci_lo"], values["ci_hi"]) == expected
    assert (values["n"], values["clusters"]) == (4, 3)


def test_an_error_is_counted_and_scored_zero():
    values = row(*samples_of([1.0, 1.0]), sample(None, cluster="bad", status="error"))
    assert (values["n"], values["errors"], values["score"]) == (3, 1, 2 / 3)
    assert values["ci_lo"] <= values["score"] <= values["ci_hi"]


@pytest.mark.parametrize(
    ("scores", "better"), [([3.0, 5.0], False), ([-3.0, -5.0], True)], ids=["perplexity", "log-likelihood"]
)
def test_an_error_has_no_score_where_zero_is_a_good_score(scores, better):
    fine = row(*samples_of(scores), headline="loss", higher_is_better=better)
    assert fine["score"] == sum(scores) / 2
    failed = row(*samples_of(scores), sample(None, status="error"), headline="loss", higher_is_better=better)
    assert (failed["score"], failed["ci_lo"], failed["errors"]) == (None, None, 1)


def test_memory_is_counted_over_the_samples_that_have_telemetry():
    values = row(
        sample(1.0, cluster="a", kv_bytes=2_000_000, kv_bytes_full=8_000_000, kv_dtype="float32"),
        sample(1.0, cluster="b", kv_bytes=1_000_000, kv_bytes_full=1_000_000, kv_dtype="float32"),
        sample(None, cluster="c", kv_bytes=0, kv_bytes_full=0, status="error"),
        sample(None, cluster="d", status="error"),
    )
    assert values["kept_share"] == 3 / 9
    assert values["kv_mb"] == 1.5
    assert values["kv_16bit_share"] == 3 / 4.5


def test_contexts_per_gib_follow_from_the_bytes_that_a_context_takes():
    assert row(sample(1.0, bytes_allocated=3 * 2**20), sample(1.0, bytes_allocated=2**20))["contexts_per_gib"] == 512.0
    assert row(sample(1.0))["contexts_per_gib"] is None


@pytest.mark.parametrize(
    ("dtype", "share"),
    [("float32", 0.5), ("torch.float32", 0.5), ("bfloat16", 0.25), ("torch.float16", 0.25), ("float5", None)],
)
def test_share_of_fp16_kv_follows_the_recorded_dtype(dtype, share):
    assert row(sample(1.0, kv_bytes=25, kv_bytes_full=100, kv_dtype=dtype))["kv_16bit_share"] == share


def test_prefill_is_timed_once_per_context_and_decode_over_all_generated_samples():
    values = row(
        sample(1.0, prefill_s=2.0, prefill_tokens=1000, shared_prefix=False, decode_tokens=10, decode_s=1.0),
        sample(1.0, prefill_s=0.0, prefill_tokens=0, shared_prefix=True, decode_tokens=30, decode_s=1.0),
        sample(1.0, prefill_s=4.0, prefill_tokens=5000, shared_prefix=False, decode_tokens=0, decode_s=0.0),
    )
    assert values["prefill_s"] == 3.0
    assert values["prefill_tok_s"] == 1000.0
    assert values["decode_tok_s"] == 20.0


def test_the_time_to_the_first_token_is_that_of_questions_whose_context_was_read():
    shared = [{"shared_prefix": False}, {"shared_prefix": True}, {"shared_prefix": False}]
    seconds = zip((2.5, 0.1, 4.5), shared, strict=True)
    assert row(*(sample(1.0, first_token_s=second, **kv) for second, kv in seconds))["first_token_s"] == 3.5
    assert row(sample(1.0))["first_token_s"] is None


def test_a_speed_that_was_not_measured_is_none_and_not_zero():
    log_likelihood = sample(1.0, prefill_s=0.0, shared_prefix=True, decode_tokens=0, decode_s=0.0)
    for values in (row(log_likelihood), row(sample(1.0))):
        assert (values["prefill_s"], values["prefill_tok_s"], values["decode_tok_s"]) == (None, None, None)


def test_truncated_samples_are_counted_with_telemetry():
    assert row(sample(1.0, truncated=True), sample(1.0, truncated=False))["truncated"] == 1
    assert row(sample(1.0))["truncated"] is None


@pytest.mark.parametrize(
    ("metric", "scores", "unit"),
    [
        ("subem_raw", [0.5], "share"),
        ("acc_norm", [1.0], "share"),
        ("ids_f1", [0.0], "share"),
        ("parse_rate", [1.0], "share"),
        ("f1", [63.0], "raw"),
        ("perplexity", [0.5], "raw"),
        ("word_perplexity", [0.5], "raw"),
    ],
)
def test_only_metrics_in_0_1_are_in_percent(metric, scores, unit):
    assert row(*samples_of(scores), headline=metric)["unit"] == unit


def test_fewer_samples_than_lm_eval_evaluated_is_unfinished():
    assert row(*samples_of([1.0, 0.0]), expected=3)["unfinished"]
    assert not row(*samples_of([1.0, 0.0]), expected=2)["unfinished"]


def test_json_rounds_nothing_and_has_null_for_undefined():
    table = build([run(task(samples_of([1 / 3, 1.0, 0.0])), task([sample(1.0)], "single"))])
    data = json.loads(to_json(table))
    assert data["rows"] == table.rows
    assert data["rows"][0]["score"] == (1 / 3 + 1.0) / 3
    assert data["rows"][1]["ci_lo"] is None
    assert data["rows"][1]["kept_share"] is None
    assert data["interval"]["level"] == 0.95


def test_csv_rounds_nothing_and_has_an_empty_cell_for_undefined():
    table = build([run(task(samples_of([1 / 3, 1.0, 0.0])), label="a,b")])
    (values,) = csv.DictReader(io.StringIO(to_csv(table)))
    assert values["run"] == "a,b"
    assert float(values["score"]) == table.rows[0]["score"]
    assert float(values["ci_lo"]) == table.rows[0]["ci_lo"]
    assert values["kept_share"] == ""


def test_markdown_is_one_pipe_table_per_task_with_numbers_to_the_right():
    text = to_markdown(build([run(task(samples_of([1.0, 0.0, 1.0, 0.0])), label="a|b*c")]))
    heading, _, header, rule, body, *_ = text.splitlines()
    assert heading == "### lc_nq_ao_8k (version 1.0): subem in %"
    assert cells(header) == ["run", "recipe", "n", "score [95% CI]", "errors"]
    assert cells(rule) == ["---", "---", "---:", "---:", "---:"]
    assert cells(body) == [r"a\|b\*c", "full", "4", "50.0 [0.0, 100.0]", "0"]


def test_score_prints_in_percent_with_its_interval():
    samples = samples_of([1.0] * 7 + [0.0] * 9)
    _, lo, hi = cluster_bootstrap([1.0] * 7 + [0.0] * 9, range(16))
    assert f"43.8 [{100 * lo:.1f}, {100 * hi:.1f}]" in to_terminal(build([run(task(samples))]), 100)


def test_unanimous_scores_have_a_wilson_interval_and_the_caption_states_it():
    text = to_terminal(build([run(task(samples_of([1.0] * 16)))]), 100)
    assert "100.0 [80.6, 100.0]" in text
    assert "Wilson" in text


def test_a_single_cluster_has_no_interval_and_the_caption_explains_it():
    text = to_terminal(build([run(task([sample(1.0), sample(0.0)]))]), 100)
    assert "50.0 [n/a]" in text
    assert "n/a: a single cluster" in text


def test_unfinished_runs_are_marked_explained_and_listed_under_their_task():
    done = run(task(samples_of([1.0, 0.0])), label="done")
    empty = run(TaskResult("lc_nq_ao_8k"), label="started", finished=False)
    half = run(task(samples_of([1.0])), label="half", finished=False)
    text = to_terminal(build([empty, done, half]), 100)
    assert text.count("lc_nq_ao_8k") == 1
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert lines["started*"] == ["full", "0", "-", "0"]
    assert lines["half*"][:2] == ["full", "1"]
    assert "*: unfinished" in text
    assert "unfinished" not in to_terminal(build([done]), 100)


def test_versions_of_a_task_have_separate_headings():
    one, two = run(task(samples_of([1.0, 0.0]))), run(task(samples_of([1.0, 0.0]), version="2.0"))
    text = to_terminal(build([one, two]), 100)
    assert "lc_nq_ao_8k (version 1.0): subem" in text
    assert "lc_nq_ao_8k (version 2.0): subem" in text


def test_the_filter_of_a_task_is_in_its_heading():
    text = to_terminal(build([run(task(samples_of([1.0, 0.0]), filters=("strict", "loose")))]), 100)
    assert "subem in %, filter strict" in text


def telemetry_runs(**other):
    keys = {
        "kv_bytes": 106_329_600,
        "kv_bytes_full": 425_318_400,
        "kv_dtype": "float32",
        "prefill_s": 6.94,
        "prefill_tokens": 8192,
        "decode_tokens": 12,
        "decode_s": 0.9,
    }
    samples = samples_of([1.0, 0.0] * 60, **keys)
    return [
        run(task(samples), label="smol-full"),
        run(task(samples), label="smol-adakv-int4-window32", recipe=LONG_RECIPE, **other),
    ]


def test_the_terminal_table_fits_100_columns_with_unshortened_numbers():
    text = to_terminal(build(telemetry_runs(model="hf", pretrained="org/SmolLM2-135M-Instruct")), 100)
    assert max(len(line) for line in text.splitlines()) <= 100
    for number in ("120", "50.0 [", "25.0", "106", "50.0", "1180", "13.3"):
        assert number in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [40, 80, 101, 200])
def test_numbers_and_names_are_complete_at_every_width(width):
    text = to_terminal(build(telemetry_runs(peft="runs/ao")), width)
    assert "…" not in text
    full = next(line for line in text.splitlines() if line.startswith("smol-full"))
    prefill_s = [] if "prefill s" in text else ["6.94"]  # one of the columns that a narrow table omits, and says so
    assert full.split()[-5 - len(prefill_s) :] == ["106", "50.0", *prefill_s, "1180", "13.3", "0"]
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("run "))
    starts = [header.index(name) for name in ("run", "model", "recipe")]
    starts.append(full.index(" 120 "))
    for name, start, stop in zip(
        ("smol-adakv-int4-window32", "lcft smol +ao", LONG_RECIPE), starts, starts[1:], strict=False
    ):
        folded = "".join(line[start:stop].strip() for line in lines[lines.index(full) :])
        assert name.replace(" ", "") in folded.replace(" ", "")


def test_a_name_that_looks_like_markup_is_printed_verbatim():
    text = to_terminal(build([run(task(samples_of([1.0, 0.0])), label="[red]a:smile:")]), 100)
    assert "[red]a:smile:" in text


def test_a_constant_model_is_stated_once_in_the_caption():
    text = to_terminal(build(telemetry_runs()), 100)
    assert text.count("smol\n") == 1
    assert "model: lcft smol" in text
    assert "model: " not in to_terminal(build(telemetry_runs(model="hf")), 100)


def test_numbers_have_three_significant_digits_in_human_readable_formats():
    for kv_bytes, printed in [(1, "1e-06"), (12_345, "0.0123"), (9_870_000, "9.87"), (1_234_567_890, "1235")]:
        text = to_markdown(build([run(task([sample(1.0, kv_bytes=kv_bytes, kv_bytes_full=10**12)]))]))
        assert f"| {printed} |" in text


@pytest.mark.parametrize("fmt", ["terminal", "markdown", "csv", "json"])
def test_main_reads_folders_and_renders_each_format(tmp_path, fmt):
    config = {"configs": {"mc": {}}, "config": {"model": "hf", "model_args": "pretrained=org/m"}}
    (tmp_path / "out" / "org__m").mkdir(parents=True)
    (tmp_path / "out" / "org__m" / "results_D.json").write_text(json.dumps(config))
    lines = [{"doc_id": i, "doc": {}, "filter": "none", "metrics": ["acc"], "acc": i % 2} for i in range(7)]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "out" / "org__m" / "samples_mc_D.jsonl").write_text(text)
    table = main([tmp_path / "out"], fmt)
    assert "42.9 [" in table or "0.42857142857142855" in table
    assert table == table.rstrip("\n")


def test_main_without_runs_is_refused():
    with pytest.raises(UserError, match="no runs given"):
        main([], "json")


def test_importing_the_table_loads_nothing_heavy():
    heavy = {"torch", "lm_eval", "transformers", "numpy", "scipy", "rich"}
    code = f"import lceval.analysis.table, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reads_what_lm_evals_own_writer_leaves(tmp_path):
    from lm_eval.loggers import EvaluationTracker

    rows = [
        {
            "doc_id": i,
            "doc": {"id": f"q{i}"},
            "target": "a",
            "arguments": [("prompt", {"until": ["\n"]})],
            "resps": [["a"]],
            "filtered_resps": ["a"],
            "filter": "none",
            "metrics": ["subem"],
            "doc_hash": "0",
            "prompt_hash": "1",
            "target_hash": "2",
            "subem": score,
        }
        for i, score in enumerate([1.0, float("nan"), 0.0, 1.0])
    ]
    results = {
        "configs": {"lc_x": {"metadata": {"headline": "subem"}}},
        "versions": {"lc_x": 1.0},
        "n-samples": {"lc_x": {"original": 4, "effective": 4}},
        "config": {"model": "lcft", "model_args": {"pretrained": "org/m", "kv": "snapkv:0.25"}},
    }
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    tracker.general_config_tracker.log_experiment_args("lcft", "pretrained=org/m", "", "", False)
    tracker.save_results_aggregated(results=results, samples={"lc_x": rows})
    tracker.save_results_samples(task_name="lc_x", samples=rows)
    (values,) = json.loads(main([tmp_path / "out"], "json"))["rows"]
    expected = ("out", "snapkv:0.25", "lc_x", "1.0", 4, 0.5, 1, False)
    keys = ("run", "recipe", "task", "version", "n", "score", "errors", "unfinished")
    assert tuple(values[key] for key in keys) == expected
