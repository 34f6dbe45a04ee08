"""Comparison of a run with `full` on the same samples, and the other counts and means of a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lceval.analysis.table import Row, build, to_html, to_latex, to_markdown, to_terminal
from lceval.cli import invoke
from lceval.records.results import Run, Sample, TaskResult
from lceval.stats.estimates import Stratum, against, difference


def sample(number: int, score: float | None, **keys: Any) -> Sample:
    defaults = {"cluster": f"c{number // 2}", "kv_bytes": None, "kv_bytes_full": None, "kv": {}, "status": "ok"}
    return Sample(id=f"q{number}", score=score, **(defaults | keys))


def samples_of(scores: list[float], **keys: Any) -> tuple[Sample, ...]:
    return tuple(sample(i, score, **keys) for i, score in enumerate(scores))


def run(samples: tuple[Sample, ...], recipe: str = "full", **keys: Any) -> Run:
    label = str(keys.pop("label", recipe))
    task = {"task": "lc_nq_ao_8k", "version": "1.0", "headline": "subem", "filters": ("none",), "context": "full"}
    of_run = {"model": "lcft", "pretrained": "org/m", "peft": None, "finished": True, "config": {}}
    task |= {key: value for key, value in keys.items() if key in TaskResult.__dataclass_fields__}
    of_run |= {key: value for key, value in keys.items() if key in Run.__dataclass_fields__}
    return Run(
        path=Path(recipe),
        label=label,
        recipe=recipe,
        tasks=(TaskResult(samples=samples, **task),),
        **of_run,
    )


FULL, LESS = [1.0, 1.0, 0.0, 1.0, 1.0, 0.5], [1.0, 0.0, 0.0, 0.5, 1.0, 0.5]
CLUSTERS = ["c0", "c0", "c1", "c1", "c2", "c2"]


def last(*runs: Run) -> Row:
    return build(runs).rows[-1]


def test_retention_and_delta_are_paired_with_the_run_under_full() -> None:
    row = last(run(samples_of(FULL)), run(samples_of(LESS), "snapkv:0.5"))
    share, delta = against([Stratum(LESS, FULL, CLUSTERS)])
    assert (row["retention"], row["retention_lo"], row["retention_hi"]) == share
    assert (row["delta"], row["delta_lo"], row["delta_hi"]) == delta
    assert row["retention"] == pytest.approx(3 / 4.5)


NONE = [0.5, 0.0, 0.0, 0.5, 0.0, 0.0]


def test_the_way_from_no_context_to_full_is_measured_on_the_same_questions() -> None:
    floor = run(samples_of(NONE), label="none", context="none:split=test")
    keys = {"context": "full:split=test"}
    table = build([floor, run(samples_of(FULL), **keys), run(samples_of(LESS), "snapkv:0.5", **keys)])
    row = table.rows[-1]
    assert row["recovered"] == pytest.approx((sum(LESS) - sum(NONE)) / (sum(FULL) - sum(NONE)))
    assert row["recovered_lo"] < row["recovered"] <= row["recovered_hi"]
    assert [r["recovered"] for r in table.rows[:-1]] == [None, None]
    assert "| none to full % |" in to_markdown(table)
    other = run(samples_of(NONE), label="none", context="none")  # another draw of contexts
    assert last(other, run(samples_of(FULL), **keys), run(samples_of(LESS), "snapkv:0.5", **keys))["recovered"] is None
    useless = run(samples_of(FULL), label="none", context="none:split=test")
    assert last(useless, run(samples_of(FULL), **keys), run(samples_of(LESS), "knorm:0.5", **keys))["recovered"] is None


def test_where_lower_is_better_the_way_from_no_context_to_full_is_the_same_share() -> None:
    rows = [
        last(
            run(samples_of([sign * score for score in NONE]), label="none", context="none", **keys),
            run(samples_of([sign * score for score in FULL]), **keys),
            run(samples_of([sign * score for score in LESS]), "snapkv:0.5", **keys),
        )
        for sign, keys in ((1, {}), (-1, {"higher_is_better": False}))
    ]
    assert rows[0]["recovered"] == pytest.approx(rows[1]["recovered"])


def test_samples_are_paired_by_id_in_any_order() -> None:
    backwards = tuple(reversed(samples_of(LESS)))
    assert last(run(samples_of(FULL)), run(backwards, "snapkv:0.5"))["retention"] == pytest.approx(3 / 4.5)
    swapped = last(run(samples_of([1.0, 0.0])), run(tuple(reversed(samples_of([1.0, 0.0]))), "snapkv:0.5"))
    assert (swapped["delta"], swapped["delta_lo"]) == (0.0, None)


def test_an_error_counts_as_zero_on_both_sides() -> None:
    failed = (sample(0, 1.0), sample(2, None, status="error"))
    row = last(run((sample(0, 1.0), sample(2, 1.0))), run(failed, "snapkv:0.5"))
    assert (row["retention"], row["delta"]) == (0.5, -0.5)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "hf"},
        {"pretrained": "org/n"},
        {"peft": "runs/ao"},
        {"version": "2.0"},
        {"context": "gold"},
        {"headline": "f1"},
        {"filters": ("strict",)},
        {"task": "lc_nq_ao_4k"},
        {"samples": samples_of(FULL[:-1])},
        {"samples": samples_of([*FULL, 1.0])},
        {"samples": samples_of(FULL, prompt_hash="another")},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_full_run_that_differs_in_more_than_the_recipe_is_not_used(other: dict[str, Any]) -> None:
    full = run(other.pop("samples", samples_of(FULL, prompt_hash="p")), **other)
    rows = build([full, run(samples_of(LESS, prompt_hash="p"), "snapkv:0.5")]).rows
    assert [row["retention"] for row in rows] == [None, None]
    assert [row["delta"] for row in rows] == [None, None]


def test_a_run_with_a_scorer_is_compared_with_full_and_its_scorer_is_a_column() -> None:
    settings = {"model_args": "pretrained=org/m,scorer=runs/sc", "lcft": {"scorer": "sc@123456"}}
    full, other = (run(samples_of(FULL), config={"model_args": f"dtype={name}"}) for name in ("auto", "float32"))
    learned = run(samples_of(LESS), "kvzap:0.5", config=settings)
    row = last(full, other, learned)
    assert (row["scorer"], row["retention"]) == ("sc@123456", pytest.approx(3 / 4.5))
    assert "| recipe | scorer |" in to_markdown(build([full, learned]))
    assert "scorer" not in to_markdown(build([full, run(samples_of(LESS), "snapkv:0.5")]))


def test_full_and_a_run_without_full_have_no_retention() -> None:
    assert last(run(samples_of(FULL)))["retention"] is None
    assert last(run(samples_of(LESS), "snapkv:0.5"))["delta"] is None


def test_of_two_full_runs_the_one_with_the_same_settings_is_used() -> None:
    half = {"config": {"model_args": {"pretrained": "org/m", "kv": "full", "dtype": "bfloat16"}}}
    whole = {"config": {"model_args": "pretrained=org/m,dtype=float32"}}
    compressed = run(
        samples_of(LESS), "snapkv:0.5", config={"model_args": "pretrained=org/m,kv=snapkv:0.5,dtype=float32"}
    )
    assert last(run(samples_of([1.0] * 6), **half), run(samples_of(FULL), **whole), compressed)[
        "delta"
    ] == pytest.approx(-0.25)
    assert last(run(samples_of(FULL), **whole), run(samples_of([1.0] * 6), **half), compressed)[
        "delta"
    ] == pytest.approx(-0.25)


def test_retention_is_undefined_where_full_scores_zero_and_delta_is_not() -> None:
    row = last(run(samples_of([0.0] * 4)), run(samples_of([0.0, 1.0, 0.0, 0.0]), "snapkv:0.5"))
    assert (row["retention"], row["retention_lo"], row["delta"]) == (None, None, 0.25)


def test_a_lower_is_better_metric_has_a_delta_and_no_retention() -> None:
    keys = {"headline": "abs_error", "higher_is_better": False}
    row = last(run(samples_of([1.0, 2.0, 3.0]), **keys), run(samples_of([2.0, 2.0, 4.0]), "snapkv:0.5", **keys))
    assert row["retention"] is None
    assert row["delta"] == pytest.approx(2 / 3)


def test_gold_nll_is_compared_on_samples_measured_in_both_runs() -> None:
    def with_nll(values: list[float | None], recipe: str) -> Run:
        samples = [sample(i, 0.0, diagnosis={} if nll is None else {"gold_nll": nll}) for i, nll in enumerate(values)]
        return run(tuple(samples), recipe)

    row = last(with_nll([1.0, None, 2.0, 1.0, 0.5], "full"), with_nll([2.0, 9.0, 2.5, None, 1.0], "snapkv:0.5"))
    expected = difference([Stratum([2.0, 2.5, 1.0], [1.0, 2.0, 0.5], ["c0", "c1", "c2"])])
    assert (row["gold_nll_delta"], row["gold_nll_delta_lo"], row["gold_nll_delta_hi"]) == expected
    assert row["retention"] is None


def test_every_metric_has_a_mean_and_errors_count_as_in_the_score() -> None:
    samples = (
        sample(0, 1.0, metrics={"subem": 1.0, "f1": 0.5, "abs_error": 3.0}),
        sample(2, 0.0, metrics={"subem": 0.0, "f1": 0.25, "abs_error": 1.0}),
        sample(4, None, status="error"),
    )
    row = last(run(samples, lower_is_better=frozenset({"abs_error"})))
    assert row["metrics"] == {"subem": 1 / 3, "f1": 0.25, "abs_error": None}
    assert row["score"] == row["metrics"]["subem"]


def test_a_metric_missing_on_a_sample_is_averaged_over_the_others() -> None:
    samples = (sample(0, 1.0, metrics={"subem": 1.0, "number": 1.0}), sample(2, 0.0, metrics={"subem": 0.0}))
    assert last(run(samples))["metrics"] == {"subem": 0.5, "number": 1.0}


def test_bytes_read_per_step_is_averaged_over_the_samples_that_record_it() -> None:
    samples = (
        sample(0, 1.0, kv={"bytes_read_per_step": 100}),
        sample(2, 1.0, kv={"bytes_read_per_step": 300}),
        sample(4, None, status="error", kv={"status": "error"}),
    )
    assert last(run(samples))["bytes_read_per_step"] == 200
    assert last(run(samples_of([1.0])))["bytes_read_per_step"] is None


def test_answers_in_a_bad_format_are_counted_by_status_or_parser() -> None:
    ours = (
        sample(0, 1.0, status="wrong_format", kv={"status": "wrong_format"}),
        sample(2, 1.0, kv={"status": "ok"}),
        sample(4, None, status="error", kv={"status": "error"}),
    )
    assert last(run(ours))["wrong_format"] == 1
    others = (sample(0, 1.0, metrics={"parse_rate": 0.0}), sample(2, 1.0, metrics={"parse_rate": 1.0}))
    assert last(run(others, model="hf"))["wrong_format"] == 1
    assert last(run(samples_of([1.0]), model="hf"))["wrong_format"] is None


@pytest.mark.parametrize(
    ("task", "suite", "dataset", "mode", "length_k"),
    [
        ("lc_filings_rj_2k", "finance", "filings", "rj", 2),
        ("lc_quality_mc", "mc", "quality", "mc", None),
        ("lc_not_one_of_ours_16k", None, None, None, 16),
        ("ruler_qa_32k_hotpot", None, None, None, 32),
        ("gsm8k", None, None, None, None),
        ("mmlu", None, None, None, None),
    ],
)
def test_suite_and_length_come_from_the_catalogue_else_from_the_task_name(
    task: str, suite: str | None, dataset: str | None, mode: str | None, length_k: int | None
) -> None:
    row = last(run(samples_of([1.0]), task=task))
    assert (row["suite"], row["dataset"], row["mode"], row["length_k"]) == (suite, dataset, mode, length_k)


def test_samples_without_a_verdict_are_counted_for_judged_tasks() -> None:
    assert last(run(samples_of([1.0, 0.0]), task="lc_nqopen_rj_2k"))["unjudged"] == 2
    assert last(run(samples_of([1.0, 0.0]), task="lc_loong_ao"))["unjudged"] == 2
    assert last(run(samples_of([1.0, 0.0]), task="lc_nqopen_ao_2k"))["unjudged"] is None
    in_run = (sample(0, 1.0, unjudged=True), sample(2, 1.0, unjudged=False, metrics={"judge_sum": 3.0}))
    row = last(run(in_run, task="lc_nqopen_rj_2k"))
    assert (row["unjudged"], row["metrics"]) == (1, {"judge_sum": 3.0})


def rj_run(folder: Path) -> Path:
    """A finished run of a task with a judge: one answer right, one wrong, one missing."""
    folder.mkdir()
    task = "lc_nqopen_rj_2k"
    (folder / "results_D.json").write_text(json.dumps({"configs": {task: {}}, "config": {"model": "hf"}}))
    lines = []
    for i, answer in enumerate(["[DOC 0] says so.\nThe answer is: Paris", "The answer is: Rome", ""]):
        doc = {"id": f"q{i}", "cluster": f"c{i}", "question": "Where?", "answers": ["Paris"], "gold_pids": ["p"]}
        doc["docs"] = [{"pid": "p", "title": "", "text": "It is in Paris."}]
        subem = float("Paris" in answer)
        lines.append({"doc_id": i, "doc": doc, "filtered_resps": [answer], "metrics": ["subem"], "subem": subem})
    (folder / f"samples_{task}_D.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_verdicts_of_lceval_judge_are_in_the_row_and_a_rule_is_labelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rj_run(tmp_path / "run")
    assert invoke(["table", str(folder), "--json"]) == 0
    (before,) = json.loads(capsys.readouterr().out)["rows"]
    assert (before["unjudged"], before["judge"]) == (3, None)
    assert invoke(["judge", str(folder), "--judge", "rule", "--replies", str(tmp_path / "r.sqlite")]) == 0
    capsys.readouterr()
    assert invoke(["table", str(folder), "--json"]) == 0
    (after,) = json.loads(capsys.readouterr().out)["rows"]
    assert (after["unjudged"], after["judge"]) == (0, "rule (rule-based)")
    summary = json.loads((folder / "judge.json").read_text())["tasks"]["lc_nqopen_rj_2k"]["scores"]
    assert {name: after["metrics"][name] for name in summary} == pytest.approx(summary)
    assert after["score"] == before["score"] == pytest.approx(1 / 3)
    assert invoke(["table", str(folder)]) == 0
    assert "by rule (rule-based)" in capsys.readouterr().out


def test_verdicts_on_other_samples_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = rj_run(tmp_path / "run")
    (folder / "judged_lc_nqopen_rj_2k.jsonl").write_text(json.dumps({"id": "q9", "judge": "x", "judge_sum": 3.0}))
    assert invoke(["table", str(folder), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["unjudged"], row["judge"], row["metrics"]) == (3, None, {"subem": pytest.approx(1 / 3)})


def test_query_aware_runs_are_marked_in_a_column_that_appears_only_with_them() -> None:
    query_agnostic = run(samples_of(LESS), "snapkv:0.5", label="a", config={"model_args": {"query_aware": False}})
    query_aware = run(
        samples_of(LESS), "snapkv:0.5", label="b", config={"model_args": "kv=snapkv:0.5,query_aware=True"}
    )
    full = run(samples_of(FULL), config={"model_args": {"query_aware": True}})
    rows = build([full, query_agnostic, query_aware]).rows
    assert [row["query_aware"] for row in rows] == [None, False, True]
    assert last(run(samples_of(LESS), "-", model="hf"))["query_aware"] is None
    inside = run(samples_of(LESS), "snapkv:0.5", config={"model_args": "query_aware=True,budget=total"})
    assert [row["budget"] for row in build([query_agnostic, query_aware, inside]).rows] == [None, "context", "total"]
    assert "| query-aware, in budget |" in to_markdown(build([query_aware, inside]))
    text = to_markdown(build([full, query_agnostic, query_aware]))
    assert "| run | recipe | query | n |" in text
    assert "| full | full | - | 6 |" in text
    assert "| a | snapkv:0.5 | query-agnostic | 6 |" in text
    assert "| b | snapkv:0.5 | query-aware | 6 |" in text
    assert "- query-aware: eviction scores include the question" in text
    for render in (to_terminal, to_latex, to_html):
        assert "query-aware" in render(build([full, query_agnostic, query_aware]))
        assert "query" not in render(build([full, query_agnostic]))
    assert [row["retention"] for row in rows[1:]] == pytest.approx([3 / 4.5] * 2)
