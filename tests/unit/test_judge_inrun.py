"""In-run judging: LCEVAL_JUDGE with `lceval run` and plain `lm_eval`, on lm-eval's dummy model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_judge_endpoint import KEY, served

from lceval.cli import invoke
from lceval.core.errors import LcevalError
from lceval.judge import during_run
from lceval.judge.client import Limits
from lceval.judge.during_run import add
from lceval.judge.rubrics import Case

TASK = "lc_filings_rj_1k"
CRITERIA = ("judge_reasoning", "judge_grounding", "judge_correct", "judge_sum")
COMMON = ["--model", "dummy", "--tasks", TASK, "--limit", "3", "--metadata", "pretrained=smollm2-135m"]


def cache(folder: Path, model: str) -> Path:
    """A separate cache folder with a link to the packaged model."""
    folder.mkdir()
    (folder / Path(model).parent.name).symlink_to(Path(model).parent)
    return folder


def graded(user: str) -> str:
    return json.dumps({"reasoning": 1, "grounding": 0, "answer": 1})


@pytest.fixture
def run(smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, str], Path]:
    monkeypatch.setenv("LCEVAL_CACHE", str(cache(tmp_path / "cache", smollm2)))
    monkeypatch.setattr(during_run, "LIMITS", Limits(retries=0))

    def evaluate(judge: str | None, name: str = "run") -> Path:
        if judge is None:
            monkeypatch.delenv("LCEVAL_JUDGE", raising=False)
        else:
            monkeypatch.setenv("LCEVAL_JUDGE", judge)
        assert invoke(["run", *COMMON, "--output_path", str(tmp_path / name)]) == 0
        return tmp_path / name

    return evaluate


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob(f"samples_{TASK}_*.jsonl")
    return json.loads(results.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]


def rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert invoke(["table", str(folder), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    return dict(row)


def test_a_judged_run_has_metrics_in_results_samples_and_table_and_pays_once(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with served(lambda prompt, attempt: "ok", graded) as server:
        name = f"openai:m@{server.url}"
        folder = run(name)
        assert server.total == 3
        results, lines = read(folder)
        means = results["results"][TASK]
        assert [means[f"{metric},none"] for metric in CRITERIA] == [1.0, 0.0, 1.0, 2.0]
        assert means["rj_paper,none"] == 2.0 + means["subem,none"]
        assert means["unjudged,none"] == 0
        assert results["higher_is_better"][TASK]["judge_sum"] is True
        assert (results["judge"]["judge"], results["judge"]["tasks"][TASK]["coverage"]) == (name, 1.0)
        for line in lines:
            assert (line["judge_sum"], line["rj_paper"]) == (2.0, 2.0 + line["subem"])
            assert (line["verdict"]["status"], line["verdict"]["rubric"]) == ("judged", "rj@1")
        row = rows(folder, capsys)
        assert (row["judge"], row["unjudged"], row["metrics"]["judge_sum"]) == (name, 0, 2.0)
        # `lceval judge` reuses the replies.
        assert invoke(["judge", str(folder), "--judge", name, "--json"]) == 0
        (report,) = json.loads(capsys.readouterr().out)
        assert (report["calls"], server.total) == (0, 3)
        assert report["tasks"][TASK]["scores"]["judge_sum"] == 2.0
        assert rows(folder, capsys)["metrics"] == row["metrics"]


def test_without_a_judge_a_run_is_unchanged_and_has_the_same_fingerprint(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(None)
    results, lines = read(folder)
    assert "judge" not in results
    assert not [name for name in (*results["results"][TASK], *lines[0]) if "judge" in name or "verdict" in name]
    row = rows(folder, capsys)
    assert (row["judge"], row["unjudged"]) == (None, 3)
    record = json.loads((folder / "run.json").read_text())
    # An interrupted run resumes with a judge from its stored answers.
    interrupt(folder)
    capsys.readouterr()
    run("rule")
    assert "3 samples, 3 reused, 0 run" in capsys.readouterr().err
    again = json.loads((folder / "run.json").read_text())
    assert again["fingerprint"] == record["fingerprint"]
    assert again["judge"] == {"judge": "rule", "revision": "1"}
    assert rows(folder, capsys)["judge"] == "rule (rule-based)"


@pytest.mark.parametrize("plan", ["500", "401", "400"])
def test_a_failing_judge_leaves_the_run_complete_and_its_samples_unjudged(
    run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plan: str,
) -> None:
    monkeypatch.setenv("LCEVAL_JUDGE_KEY", KEY)
    with served(lambda prompt, attempt: plan, graded) as server:
        folder = run(f"openai:m@{server.url}")
    captured = capsys.readouterr()
    results, lines = read(folder)
    assert results["results"][TASK]["unjudged,none"] == 3
    assert not [name for name in results["results"][TASK] if name.startswith(("judge_", "rj_"))]
    assert [line["verdict"]["status"] for line in lines] == ["unjudged"] * 3
    row = rows(folder, capsys)
    assert (row["unjudged"], row["n"]) == (3, 3)
    assert "judge_sum" not in row["metrics"]
    (tmp_path / "output").write_text(captured.out + captured.err)
    assert [f for f in tmp_path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()] == []


def interrupt(folder: Path) -> None:
    """The state of a run killed while judging: answers, but no results."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    for file in [*folder.glob("results_*"), *folder.glob("samples_*")]:
        file.unlink()


def test_a_run_interrupted_while_judging_pays_only_for_missing_replies(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    limit = 1
    with served(lambda prompt, attempt: "ok" if server.total < limit else "400", graded) as server:
        name = f"openai:m@{server.url}"
        folder = run(name)
        assert rows(folder, capsys)["unjudged"] == 2
        interrupt(folder)
        limit = 2
        run(name)
        assert rows(folder, capsys)["unjudged"] == 1
        limit = 3
        assert invoke(["judge", str(folder), "--judge", name]) == 0
        row = rows(folder, capsys)
        assert (row["unjudged"], row["judge"], row["metrics"]["judge_sum"]) == (0, name, 2.0)
        assert set(server.answered.values()) == {1}
        assert server.total == 3


PLAIN = """
import logging, sys
import lceval.plugin
logging.basicConfig(level=logging.DEBUG)
sys.argv = ["lm_eval", *sys.argv[1:]]
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def plain(judge: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LCEVAL_JUDGE": judge, "LCEVAL_CACHE": str(folder / "cache")}
    env |= {"LCEVAL_JUDGE_KEY": KEY, "OPENAI_LOG": "debug", "LCEVAL_DEBUG": "1"}
    line = [sys.executable, "-c", PLAIN, "run", *COMMON, "--output_path", str(folder / "out"), *more]
    return subprocess.run(line, capture_output=True, text=True, env=env, check=False)


def test_plain_lm_eval_prints_and_writes_the_same_without_the_key(
    smollm2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache(tmp_path / "cache", smollm2)
    with served(lambda prompt, attempt: "ok", lambda user: f"{graded(user)} your key is {KEY}") as server:
        ran = plain(f"openai:m@{server.url}", tmp_path, "--log_samples")
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert server.total == 3
        assert set(server.headers) == {f"Bearer {KEY}"}
    for metric in (*CRITERIA, "rj_paper", "unjudged"):
        assert f"|{metric}" in ran.stdout.replace(" ", "")
    results, lines = read(tmp_path / "out")
    assert results["results"][TASK]["judge_sum,none"] == 2.0
    assert [line["judge_sum"] for line in lines] == [2.0] * 3
    row = rows(tmp_path / "out", capsys)
    assert (row["unjudged"], row["metrics"]["judge_sum"]) == (0, 2.0)
    (tmp_path / "output").write_text(ran.stdout + ran.stderr)
    assert "DEBUG" in ran.stderr
    assert [f for f in tmp_path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()] == []


@pytest.mark.parametrize("judge", ["openai:gpt", "sk-very-secret", "hf:no/such-model"])
def test_an_invalid_judge_is_refused_before_any_model_is_loaded(
    judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lceval.runs.runner

    monkeypatch.setenv("LCEVAL_JUDGE", judge)
    monkeypatch.setattr(lceval.runs.runner, "load_model", lambda config: pytest.fail("a model was loaded"))
    assert invoke(["run", *COMMON, "--output_path", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lceval: error: LCEVAL_JUDGE: ")
    assert "very-secret" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_plain_lm_eval_refuses_an_invalid_judge_in_one_line(tmp_path: Path) -> None:
    ran = plain("nonsense", tmp_path)
    assert ran.returncode == 2
    assert "lceval: error: LCEVAL_JUDGE: cannot read the judge's name" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()


def test_loong_in_a_run_has_average_and_perfect_rate_and_other_tasks_are_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path))
    docs = [
        {"id": f"l{i}", "cluster": "c", "question": f"Q{i}", "answers": ["a b"], "docs": [], "level": 1, "set": 1}
        for i in range(2)
    ]
    rows = [
        {"doc_id": i, "doc": doc, "filtered_resps": [answer], "filter": "none", "metrics": ["f1"], "f1": 0.0}
        for i, (doc, answer) in enumerate(zip(docs, ["a b", "c d"], strict=True))
    ]
    other = [{"doc_id": 0, "doc": {}, "filtered_resps": ["x"], "filter": "none", "metrics": []}]
    results: dict[str, Any] = {
        "samples": {"lc_loong_ao": rows, "arc": other},
        "results": {"lc_loong_ao": {}, "arc": {}},
    }
    add(results, "rule")
    means = results["results"]["lc_loong_ao"]
    assert (means["avg_score,none"], means["perfect_rate,none"], means["unjudged,none"]) == (50.5, 0.5, 0)
    assert results["results"]["arc"] == {}
    assert other[0].keys() == {"doc_id", "doc", "filtered_resps", "filter", "metrics"}
    assert results["judge"]["tasks"]["lc_loong_ao"]["by_level"]["1"]["n"] == 2


def test_a_judge_in_a_subprocess_gives_the_same_verdicts_and_stores_its_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path))
    batch = [("rj", [Case("Q?", ("8",), "[DOC 0] says so.\nThe answer is: 8", ("[DOC 0]\n8",), (0,))])]
    separate, same = during_run._in_subprocess(batch, "rule"), during_run.ask(batch, "rule")
    assert separate[1] == same[1]
    assert (separate[0]["reused"], same[0]["reused"]) == (0, 1)
    with pytest.raises(LcevalError, match="the judge rule failed"):
        during_run._in_subprocess([("no-such-rubric", [])], "rule")
