"""`lceval check` as used in CI: exit codes, output formats, and pairs that are not comparable."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from lceval.analysis.check import baseline
from lceval.analysis.check.compare import check
from lceval.analysis.check.sample_size import plan, visible
from lceval.cli import invoke
from lceval.core.errors import NotComparableError, UserError

DATE = "2026-01-02T03-04-05.678901"
ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Any]]


def rows(scores: list[float], *, size: int = 1, nll: list[float] | None = None, prefix: str = "answer") -> Rows:
    """Lines of a samples file: `size` questions per context; answers contain their score."""
    return [
        {
            "doc_id": i,
            "doc": {"id": f"q{i}", "cluster": f"c{i // size}", "source": "invented, seed 1"},
            "filtered_resps": [f"{prefix} {score}"],
            "filter": "none",
            "metrics": ["subem", "f1", "gold_nll"],
            "prompt_hash": f"{i:016x}",
            "subem": score,
            "f1": score / 2,
            **({"gold_nll": nll[i]} if nll else {}),
        }
        for i, score in enumerate(scores)
    ]


def write(folder: Path, tasks: dict[str, Rows], *, version: str = "1.0", status: str = "finished", **run: Any) -> Path:
    folder.mkdir()
    results = {
        "configs": {task: {"metadata": {"headline": "subem"}} for task in tasks},
        "versions": dict.fromkeys(tasks, version),
        "higher_is_better": {task: {"subem": True, "f1": True, "gold_nll": False} for task in tasks},
        "n-samples": {task: {"effective": len(lines)} for task, lines in tasks.items()},
        "chat_template_sha": "ab" * 32,
    }
    (folder / f"results_{DATE}.json").write_text(json.dumps(results))
    for task, lines in tasks.items():
        (folder / f"samples_{task}_{DATE}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {
        "status": status,
        "model": "lcft",
        "model_args": {"pretrained": "tiny"},
        "recipe": "full",
        "apply_chat_template": True,
        "chat_template_sha": "ab" * 32,
    }
    (folder / "run.json").write_text(json.dumps(record | run))
    return folder


GOOD = [1.0] * 90 + [0.0] * 10
WORSE = [0.0] * 30 + [1.0] * 60 + [0.0] * 10


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", {"qa": rows(GOOD)})


def run(*arguments: object) -> int:
    return invoke(["check", *map(str, arguments)])


@pytest.mark.parametrize(
    ("new", "options", "code", "message"),
    [
        (rows(GOOD), [], 0, "identical outputs"),
        (rows(GOOD, prefix="another answer"), [], 0, "drop at most"),
        (rows(WORSE), [], 1, "regression: drop 0.3"),
        (rows(WORSE), ["--inconclusive", "warn"], 1, "regression: drop 0.3"),
        (rows([0.0] * 3 + GOOD[3:]), [], 5, "too little data: 100 samples in 100 clusters detect a drop of"),
        (rows([0.0] * 3 + GOOD[3:]), ["--inconclusive", "warn"], 0, "inconclusive at gate 0.05 (warning only)"),
    ],
    ids=["identical", "same scores", "worse", "worse, warn", "inconclusive", "inconclusive, warn"],
)
def test_the_verdict_is_the_exit_code(
    base: Path,
    tmp_path: Path,
    new: Rows,
    options: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(base, write(tmp_path / "new", {"qa": new}), "--gate", 0.05, *options) == code
    captured = capsys.readouterr()
    assert message in captured.out
    assert captured.err == ""


def checked(tmp_path: Path, old: Rows, new: Rows, gate: float, metric: str | None = None) -> Any:
    sides = [baseline.read(write(tmp_path / name, {"qa": lines}))[0] for name, lines in (("base", old), ("new", new))]
    (task,) = check(*sides, gate=gate, metric=metric).tasks
    return task


@pytest.mark.parametrize("n", [1, 2, 5, 20])
@pytest.mark.parametrize("metric", ["subem", "gold_nll"])
def test_too_few_samples_are_inconclusive_and_never_pass(tmp_path: Path, n: int, metric: str) -> None:
    nll = [1.0] * n
    task = checked(tmp_path, rows([1.0] * n, nll=nll), rows([1.0] * n, nll=nll, prefix="other"), 0.05, metric)
    assert task.verdict == "inconclusive"
    assert task.paired.upper > 0.05


def test_many_questions_on_few_contexts_are_inconclusive(tmp_path: Path) -> None:
    task = checked(tmp_path, rows([1.0] * 400, size=100), rows([1.0] * 400, size=100, prefix="other"), 0.05)
    assert (task.verdict, task.clusters) == ("inconclusive", 4)


def test_a_significant_drop_below_the_gate_passes_with_that_reason(tmp_path: Path) -> None:
    task = checked(tmp_path, rows([1.0] * 2000), rows([0.0] * 20 + [1.0] * 1980), 0.05)
    assert task.verdict == "pass"
    assert "a significant drop" in task.reason
    assert "below the gate" in task.reason


def test_gold_nll_is_lower_is_better_and_detects_damage_that_the_score_misses(tmp_path: Path) -> None:
    old = rows([0.0] * 40, nll=[2 + i % 7 / 10 for i in range(40)])
    worse = rows([0.0] * 40, nll=[2.5 + i % 5 / 10 for i in range(40)], prefix="other")
    task = checked(tmp_path, old, worse, 0.1, "gold_nll")
    assert task.verdict == "regression"
    assert task.paired.drop == pytest.approx(task.new - task.base)
    assert not task.higher_is_better
    assert task.flips[0].drop > 0


def test_an_improvement_is_not_a_regression(tmp_path: Path) -> None:
    task = checked(tmp_path, rows(WORSE), rows(GOOD), 0.05)
    assert (task.verdict, task.flips) == ("pass", ())
    assert task.paired.drop < 0


def test_an_error_is_scored_0_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = rows(GOOD)
    for line in failed[:30]:
        line["kv"] = {"status": "error"}
    folders = [write(tmp_path / "a", {"qa": rows(GOOD)}), write(tmp_path / "b", {"qa": failed})]
    assert run(*folders, "--gate", 0.05) == 1
    out = capsys.readouterr().out
    assert "scored 0: 0 in base, 30 in new" in out
    assert "1 -> error" in out


def test_a_run_with_only_errors_is_a_regression(base: Path, tmp_path: Path) -> None:
    failed = [line | {"kv": {"status": "error"}} for line in rows(GOOD)]
    assert run(base, write(tmp_path / "b", {"qa": failed}), "--gate", 0.05) == 1


def test_an_error_is_not_scored_as_an_nll_of_0(tmp_path: Path) -> None:
    failed = rows(GOOD, nll=[1.0] * 100)
    failed[7]["kv"] = {"status": "error"}
    with pytest.raises(NotComparableError, match="sample q7 has no gold_nll in NEW"):
        checked(tmp_path, rows(GOOD, nll=[1.0] * 100), failed, 0.05, "gold_nll")


def test_holm_is_over_the_tasks_and_one_regression_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {"a": rows(GOOD), "b": rows(GOOD), "c": rows(GOOD)}
    old = write(tmp_path / "old", tasks)
    new = write(tmp_path / "new", tasks | {"b": rows([0.0] * 3 + GOOD[3:]), "c": rows(WORSE)})
    assert run(old, new, "--gate", 0.05, "--json") == 1
    data = json.loads(capsys.readouterr().out)
    assert [task["verdict"] for task in data["tasks"]] == ["pass", "inconclusive", "regression"]
    a, b, c = data["tasks"]
    assert (a["paired"], a["p_holm"]) == (None, 1)
    assert b["p_holm"] == pytest.approx(2 * b["paired"]["p"])
    assert c["p_holm"] == pytest.approx(3 * c["paired"]["p"])
    assert (data["exit_code"], data["verdict"], c["lost"], len(c["flips"])) == (1, "regression", 30, 10)
    assert c["flips"][0]["base_answer"] == "answer 1.0"


def other_prompt(lines: Rows) -> Rows:
    return [*lines[:-1], lines[-1] | {"prompt_hash": "ff"}]


def other_doc(**keys: Any) -> Rows:
    lines = rows(GOOD)
    return [*lines[:-1], lines[-1] | {"doc": lines[-1]["doc"] | keys}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: write(f, {"qa": rows(GOOD)}, version="2.0"), "version: 1.0 in BASE, 2.0 in NEW"),
        (lambda f: write(f, {"qa": other_prompt(rows(GOOD))}), "prompt of sample q99"),
        (lambda f: write(f, {"qa": rows(GOOD[:-1])}), "sample q99 is only in BASE (100 in BASE, 99 in NEW)"),
        (lambda f: write(f, {"qa": other_doc(id="another")}), "is only in NEW"),
        (lambda f: write(f, {"qa": other_doc(cluster="c0")}), "cluster of sample q99"),
        (lambda f: write(f, {"qa": other_doc(source="elsewhere")}), "sources"),
        (lambda f: write(f, {"qa": rows(GOOD), "mc": rows(GOOD)}), "task mc is in only one of the runs"),
        (
            lambda f: write(f, {"qa": rows(GOOD)}, apply_chat_template=False, chat_template_sha=None),
            "chat template abababababababab in BASE, off in NEW",
        ),
        (lambda f: write(f, {"qa": rows(GOOD)}, chat_template_sha="cd" * 32), "chat template"),
    ],
    ids=["version", "prompt", "fewer", "id", "cluster", "source", "task", "no template", "another template"],
)
def test_runs_on_different_tasks_or_samples_are_not_comparable(
    base: Path, tmp_path: Path, make: Callable[[Path], Path], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, make(tmp_path / "new"), "--gate", 0.05) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lceval: error: not comparable: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_model_adapter_recipe_and_sample_order_may_differ(base: Path, tmp_path: Path) -> None:
    args = {"pretrained": "other", "peft": "adapter"}
    new = write(tmp_path / "new", {"qa": rows(GOOD)[::-1]}, model_args=args, recipe="snapkv:0.5")
    assert run(base, new, "--gate", 0.05) == 0


def test_predictions_without_scores_are_not_comparable(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lm-eval's --predict_only logs the metric `bypass` alone, and keeps the task's headline."""
    lines = [{**line, "metrics": ["bypass"], "bypass": 999} for line in rows(GOOD)]
    for line in lines:
        del line["subem"], line["f1"]
    predicted = [write(tmp_path / name, {"qa": lines}) for name in "ab"]
    for sides in (predicted, [base, predicted[0]], [predicted[0], base]):
        assert run(*sides, "--gate", 0.05) == 3
        assert capsys.readouterr().err.startswith("lceval: error: not comparable: qa")


def test_an_unfinished_run_is_exit_4(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = write(tmp_path / "new", {"qa": rows(GOOD)}, status="running")
    assert run(base, new, "--gate", 0.05) == 4
    assert "rerun the same command to resume" in capsys.readouterr().err


def test_plain_lm_eval_folders_are_compared(tmp_path: Path) -> None:
    for name, scores in (("a", GOOD), ("b", WORSE)):
        write(tmp_path / name, {"qa": rows(scores)})
        (tmp_path / name / "run.json").unlink()
    assert run(tmp_path / "a", tmp_path / "a", "--gate", 0.05) == 0
    assert run(tmp_path / "a", tmp_path / "b", "--gate", 0.05) == 1
    plain = baseline.read(tmp_path / "a")[0]
    assert plain.template == "ab" * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "base"], "--gate 0.05"),
        (
            ["base", "--gate", "0.05"],
            "expected BASE and NEW, for example: lceval check runs/base runs/new --gate 0.05; received 1",
        ),
        (["base", "base", "--gate", "-1"], "--gate -1.0: expected a positive number"),
        (["base", "base", "--gate", "0.05", "--metric", "gold_nll"], "no gold_nll in BASE's samples of qa (run with"),
        (["base", "base", "--gate", "0.05", "--metric", "f2"], "available: f1, subem"),
        (["base", "nowhere", "--gate", "0.05"], "nowhere: no such folder"),
        (["base", "base", "--gate", "0.05", "--inconclusive", "pass"], "'--inconclusive'"),
        (["base", "base", "--gate", "0.05", "--junit", "no/such/x.xml"], "cannot write no/such/x.xml"),
        (["--write-baseline", "b.json"], "requires one RUN; received 0"),
        (["base", "--write-baseline", "no/such/b.json"], "cannot write the baseline"),
        (["--plan", "--gate", "0.2", "--discordance", "0.1"], "expected from --gate 0.2 to 1"),
        (["--plan", "--gate", "5"], "between 0 and 1"),
        (["base", "base", "--plan", "--gate", "0.05"], "at most one BASE; received 2"),
        (["base", "--plan", "--gate", "0.02"], "100 samples in 100 clusters cannot detect a drop of 0.02"),
    ],
)
@pytest.mark.usefixtures("base")
def test_bad_usage_is_one_line_and_exit_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_baseline_replaces_its_run_without_its_texts(base: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "baseline.json"
    assert run(base, "--write-baseline", file) == 0
    assert "100 samples of qa" in capsys.readouterr().out
    assert "answer" not in re.sub(r'"answer": "[0-9a-f]{16}"', "", file.read_text())
    assert baseline.read(file) == (baseline.read(base)[0], None)
    assert file.read_text().count("\n") == 104
    assert run(file, base, "--gate", 0.05) == 0
    capsys.readouterr()
    new = write(tmp_path / "new", {"qa": rows(WORSE)})
    assert run(file, new, "--gate", 0.05) == 1
    out = capsys.readouterr().out
    assert "base: (not stored in a baseline)\n    new:  answer 0.0" in out
    run(base, new, "--gate", 0.05)
    assert "base: answer 1.0\n    new:  answer 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format version 2, expected 1"),
        (lambda d: d.update(format="other"), "not a baseline"),
        (lambda d: d.update(notes="x"), "notes: Extra inputs"),
        (lambda d: d["tasks"][0]["samples"][3].pop("cluster"), "tasks.0.samples.3.cluster: Field required"),
        (lambda d: d["tasks"][0]["samples"][3]["values"].update(subem="1"), "values.subem"),
        (lambda d: d["tasks"][0]["samples"][3]["values"].update(subem=float("nan")), "finite number"),
    ],
    ids=["version", "format", "extra", "missing", "text", "nan"],
)
def test_an_invalid_baseline_file_is_refused(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    file = tmp_path / "baseline.json"
    baseline.write(file, base)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        baseline.read(file)
    assert "\n" not in str(error.value)


def test_samples_with_the_same_id_are_paired_in_order(tmp_path: Path) -> None:
    twice = rows([1.0, 0.0, 1.0])
    twice[1]["doc"] = twice[0]["doc"]
    task = checked(tmp_path, twice, [line | {"subem": 0.0} for line in twice], 0.5)
    assert [flip.key for flip in task.flips] == ["q0", "q2"]


def test_junit_has_one_case_and_markdown_one_row_per_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = rows(GOOD, prefix="bad \x00\x1b[31m | <answer>\nof two lines")
    old = write(tmp_path / "old", {"a": rows(GOOD), "b": rows(GOOD), "c|d": odd})
    worse = [line | {"subem": 0.0} for line in odd]
    new = write(tmp_path / "new", {"a": rows(GOOD), "b": rows([0.0] * 3 + GOOD[3:]), "c|d": worse})
    junit, markdown = tmp_path / "junit.xml", tmp_path / "summary.md"

    def cases(*options: str) -> dict[str, list[str]]:
        assert run(old, new, "--gate", 0.05, "--junit", junit, "--markdown", markdown, *options) == 1
        suite = ElementTree.parse(junit).getroot()
        kinds = {case.attrib["name"]: [part.tag for part in case if part.tag != "system-out"] for case in suite}
        assert int(suite.attrib["tests"]) == 3
        assert int(suite.attrib["failures"]) == sum(k == ["failure"] for k in kinds.values())
        assert int(suite.attrib["skipped"]) == sum(k == ["skipped"] for k in kinds.values())
        return kinds

    assert cases() == {"a": [], "b": ["failure"], "c|d": ["failure"]}
    assert cases("--inconclusive", "warn") == {"a": [], "b": ["skipped"], "c|d": ["failure"]}
    text = markdown.read_text()
    assert text.startswith("### regression at gate 0.05\n")
    assert "| c\\|d | subem | 100 |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    counts = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert counts == {12, 6}
    assert "\x1b" not in text + junit.read_text() + capsys.readouterr().out


def test_a_plan_is_the_textbook_formula(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--plan", "--gate", 0.02, "--discordance", 0.10) == 0
    assert "1,540 samples" in capsys.readouterr().out
    size = plan(0.02, 0.10)
    assert (size.samples, size.clusters) == (1540, 149)
    assert visible(size.samples, 0.10) == pytest.approx(0.02, abs=1e-5)
    assert run("--plan", "--gate", 0.1, base) == 0
    assert "100 samples in 100 clusters detect 0.0763" in capsys.readouterr().out
    assert run("--plan", "--gate", 0.1, base, "--json") == 0
    assert json.loads(capsys.readouterr().out)["seen"][0]["clusters"] == 100


def test_check_imports_no_model() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules]"
    code = f"import sys, lceval.analysis.check.command; print({heavy})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "check.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    write(tmp_path / "runs" / "base", {"qa": rows([1.0] * 2000, nll=[1 + i / 2000 for i in range(2000)])})
    write(tmp_path / "runs" / "new", {"qa": rows([1.0] * 2000, nll=[1 + i / 2000 for i in range(2000)])})
    commands = re.findall(r"^(?:    |)(lceval check .*)$", page, flags=re.M)
    assert len(commands) >= 6
    for command in commands:
        assert invoke(shlex.split(command, comments=True)[1:]) == 0, command


def test_the_example_workflow_is_started_by_hand_and_passes_existing_flags(capsys: Any) -> None:
    file = ROOT / ".github" / "workflows" / "regression-example.yml"
    workflow = yaml.safe_load(file.read_text())
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True] == {"workflow_dispatch": None}
    (job,) = workflow["jobs"].values()
    script = "\n".join(step.get("run", "") for step in job["steps"])
    assert invoke(["check", "--help"]) == 0
    help_text = capsys.readouterr().out
    (line,) = [line for line in script.replace("\\\n", " ").splitlines() if line.startswith("lceval check")]
    assert re.findall(r"--\w[\w-]*", line)
    assert all(flag in help_text for flag in re.findall(r"--\w[\w-]*", line))
    assert len(job["steps"]) <= 8
