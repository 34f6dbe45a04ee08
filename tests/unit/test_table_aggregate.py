"""Means over tasks: documented, over comparable tasks only, and with every exclusion listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lceval.analysis.table import KEYS, build, to_json, to_markdown
from lceval.records.results import Run, Sample, TaskResult
from lceval.stats.estimates import Stratum, against, mean

SCORES = {
    "lc_filings_ao_1k": [1.0, 0.0, 1.0, 1.0],
    "lc_filings_ao_2k": [0.0, 0.0, 1.0],
    "lc_finqa_ao": [1.0, 0.0],
    "lc_tatqa_ao": [0.0, 1.0, 0.0, 1.0, 0.0],
    "lc_nqopen_ao_2k": [1.0, 1.0, 0.0],
}


def task(name: str, scores: list[float], **keys: Any) -> TaskResult:
    defaults = {"version": "1.0", "headline": "subem", "filters": ("none",), "context": "full"}
    samples = tuple(
        Sample(f"q{i}", f"c{i}", score, 10, 40, {"kv_dtype": "float32"}, "ok", metrics={"subem": score, name: 1.0})
        for i, score in enumerate(scores)
    )
    return TaskResult(name, samples=samples, **(defaults | keys))


def run(label: str, *tasks: TaskResult, recipe: str = "full", **keys: Any) -> Run:
    defaults = {"model": "lcft", "pretrained": "org/m", "peft": None, "finished": True, "config": {}}
    return Run(path=Path(label), label=label, recipe=recipe, tasks=tasks, **(defaults | keys))


def whole(label: str = "all", **keys: Any) -> Run:
    return run(label, *(task(name, scores) for name, scores in SCORES.items()), **keys)


def test_a_length_is_the_mean_of_its_tasks_means() -> None:
    more = task("lc_financebenchmulti_ao_8k", [1.0, 0.0]), task("lc_filings_ao_2k", [0.0, 0.0, 1.0])
    rows = build(
        [run("r", task("lc_finqa_ao", [1.0, 0.0, 0.0, 0.0]), *more, task("lc_tatqa_ao", [1.0]))], "length"
    ).rows
    assert [(r["suite"], r["length_k"], r["over"]) for r in rows] == [
        ("finance", 2, "lc_filings_ao_2k"),
        ("finance", 8, "lc_financebenchmulti_ao_8k"),
        ("finance", None, "lc_finqa_ao lc_tatqa_ao"),
    ]
    assert [r["score"] for r in rows] == pytest.approx([1 / 3, 1 / 2, (1 / 4 + 1) / 2])
    assert all(list(row) == list(KEYS) for row in rows)


def test_rulers_tasks_have_one_mean_a_length() -> None:
    scores = {"lc_ruler_vt_4k": [1.0, 0.0], "lc_ruler_qa_1_4k": [1.0], "lc_ruler_cwe_8k": [0.5]}
    tasks = [task(name, values, headline="string_match") for name, values in scores.items()]
    rows = build([run("r", *tasks, task("lc_nqopen_ao_4k", [0.0]))], "length").rows
    assert [(r["suite"], r["length_k"], r["mode"], r["score"]) for r in rows] == [
        ("ruler", 4, None, 0.75),
        ("ruler", 8, None, 0.5),
        ("icr", 4, "ao", 0.0),
    ]


NAMES = ("lc_filings_ao_1k", "lc_filings_ao_2k", "lc_finqa_ao", "lc_tatqa_ao")
WEIGHTS = (1 / 3, 1 / 3, 1 / 6, 1 / 6)


def test_a_suite_is_the_mean_over_lengths_of_the_mean_over_tasks() -> None:
    finance, icr = build([whole()], "suite").rows
    assert finance["score"] == pytest.approx((3 / 4 + 1 / 3 + (1 / 2 + 2 / 5) / 2) / 3)
    strata = [
        Stratum(SCORES[name], [], range(len(SCORES[name])), weight) for name, weight in zip(NAMES, WEIGHTS, strict=True)
    ]
    assert (finance["score"], finance["ci_lo"], finance["ci_hi"]) == pytest.approx(mean(strata))
    assert (finance["n"], finance["clusters"], finance["task"]) == (14, 14, None)
    assert finance["kept_share"] == pytest.approx(0.25)
    assert finance["metrics"].keys() == {"subem"}
    assert icr["over"] == "lc_nqopen_ao_2k"


def test_retention_of_a_mean_is_paired_within_each_task() -> None:
    less = {name: [score / 2 if i % 2 else score for i, score in enumerate(scores)] for name, scores in SCORES.items()}
    compressed = run("less", *(task(name, less[name]) for name in reversed(less)), recipe="snapkv:0.5")
    row = next(r for r in build([whole(), compressed], "suite").rows if (r["run"], r["suite"]) == ("less", "finance"))
    strata = [
        Stratum(less[name], SCORES[name], range(len(SCORES[name])), weight)
        for name, weight in zip(NAMES, WEIGHTS, strict=True)
    ]
    share, delta = against(strata)
    assert (row["retention"], row["retention_lo"], row["retention_hi"]) == pytest.approx(share)
    assert (row["delta"], row["delta_lo"], row["delta_hi"]) == pytest.approx(delta)


def test_modes_of_one_dataset_are_separate_rows() -> None:
    tasks = [
        task("lc_filings_ao_1k", [1.0, 0.0]),
        task("lc_filings_id_1k", [1.0, 1.0]),
        task("lc_finqa_ao", [0.0, 1.0]),
    ]
    rows = build([run("a", *tasks)], "suite").rows
    assert [(r["mode"], r["over"], r["score"]) for r in rows] == [
        ("ao", "lc_filings_ao_1k lc_finqa_ao", 0.5),
        ("id", "lc_filings_id_1k", 1.0),
    ]
    assert "### suite finance, mode id: mean in %" in to_markdown(build([run("a", *tasks)], "suite"))


def test_a_mean_has_no_retention_if_one_task_has_no_full_run() -> None:
    less = whole("less", recipe="snapkv:0.5")
    full = run("full", *(task(name, scores) for name, scores in SCORES.items() if name != "lc_finqa_ao"))
    rows = {(r["run"], r["suite"]): r for r in build([full, less], "suite").rows}
    assert rows["less", "finance"]["retention"] is None
    assert rows["less", "icr"]["retention"] == 1.0


def test_one_folder_per_task_gives_the_rows_of_one_run() -> None:
    apart = [run(name, task(name, scores)) for name, scores in SCORES.items()]
    together = build([whole()], "suite").rows
    for row, expected in zip(build(apart, "suite").rows, together, strict=True):
        assert {k: v for k, v in row.items() if k != "run"} == {k: v for k, v in expected.items() if k != "run"}
    assert "| 4 runs |" in to_markdown(build(apart, "suite"))


def test_two_runs_of_one_configuration_stay_two_rows() -> None:
    rows = build([whole("monday"), whole("tuesday")], "suite").rows
    assert [(r["suite"], r["run"]) for r in rows] == [
        ("finance", "monday"),
        ("finance", "tuesday"),
        ("icr", "monday"),
        ("icr", "tuesday"),
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": "int8"},
        {"peft": "ao"},
        {"model": "hf"},
        {"pretrained": "org/n"},
        {"recipe": "snapkv:0.5", "config": {"model_args": {"query_aware": True}}},
    ],
)
def test_different_configurations_are_never_averaged(other: dict[str, Any]) -> None:
    recipe = "snapkv:0.5" if "config" in other else "full"
    first = run("a", task("lc_filings_ao_1k", [1.0, 0.0]), recipe=recipe)
    second = run("b", task("lc_finqa_ao", [0.0, 0.0]), **other)
    assert [r["over"] for r in build([first, second], "suite").rows] == ["lc_filings_ao_1k", "lc_finqa_ao"]


def test_scores_outside_0_1_are_excluded_and_listed() -> None:
    loss = task("wikitext", [3.0, 4.0], headline="word_perplexity", higher_is_better=False, context=None)
    skill = task("lc_diabetes_ao", [0.5, -0.5], headline="skill")
    table = build([run("a", task("lc_filings_ao_1k", [1.0, 0.0]), loss, skill)], "suite")
    assert [row["over"] for row in table.rows] == ["lc_filings_ao_1k"]
    assert table.left_out == ("wikitext", "lc_diabetes_ao")
    assert "- Excluded from means, because the score is not in [0, 1]: wikitext, lc_diabetes_ao." in to_markdown(table)
    assert '"left_out": [\n    "wikitext",' in to_json(table)


def test_rows_over_different_tasks_are_marked_as_not_comparable() -> None:
    part = run("part", task("lc_filings_ao_1k", [1.0, 0.0]), recipe="int8")
    assert "Not comparable, because the rows cover different tasks: suite finance, mode ao" in to_markdown(
        build([whole(), part], "suite")
    )
    assert "Not comparable" not in to_markdown(build([whole()], "suite"))


@pytest.mark.parametrize(
    ("by", "definition"),
    [
        ("suite", "mean over lengths of the mean over the tasks of that length of each task's mean headline score"),
        ("length", "mean over the tasks of that length of each task's mean headline score"),
    ],
)
def test_the_caption_defines_the_mean(by: Any, definition: str) -> None:
    table = build([whole()], by)
    assert f"- score: {definition}." in to_markdown(table)
    assert f'"mean_over": "{definition}"' in to_json(table)
    assert "bootstrap CI over clusters (contexts), resampled within each task" in to_markdown(table)


def test_an_unfinished_task_marks_its_suite() -> None:
    begun = run("begun", task("lc_filings_ao_1k", [1.0, 0.0]), TaskResult("lc_finqa_ao"), finished=False)
    (row,) = build([begun], "suite").rows
    assert (row["unfinished"], row["over"], row["n"]) == (True, "lc_filings_ao_1k", 2)
    assert "| begun\\* |" in to_markdown(build([begun], "suite"))


def test_tasks_without_a_suite_are_a_separate_group() -> None:
    rows = build([run("a", task("hotpot_16k", [1.0, 0.0]), task("lc_filings_ao_1k", [1.0]))], "length").rows
    assert [(r["suite"], r["length_k"]) for r in rows] == [(None, 16), ("finance", 1)]
    assert "tasks without a suite at 16k" in to_markdown(build([run("a", task("hotpot_16k", [1.0, 0.0]))], "length"))
