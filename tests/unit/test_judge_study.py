"""docs/judge.md: its tables are computed from the committed verdicts, which contain no text, and its commands run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from test_judge_endpoint import served
from test_judge_inrun import PLAIN, cache
from test_judge_runs import financebench, made_run

from lceval.cli import invoke
from lceval.judge import calibration, probes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "judge.md").read_text()
KEYS = {"row": int, "id": str, "human": str, "judge": str, "reason": str, "log_likelihoods": dict}


@pytest.fixture(scope="module")
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("judge")


def test_the_tables_are_computed_from_the_committed_verdicts(study: ModuleType) -> None:
    assert study.table() in PAGE
    assert study.confusion("`rule` (rule-based)") in PAGE
    assert study.attacks() in PAGE
    rule, small = (json.loads((study.VERDICTS / f"{name}.json").read_text()) for name in ("rule", "smollm2"))
    for probe in ("gold_first", "gold_last"):
        result = rule["probes"][probe]
        assert f"({result['flipped']} of {result['seen_through_when_plain']})" in PAGE
    assert f"{small['clipped']} of its 200 prompts were clipped" in PAGE


def test_the_committed_verdicts_contain_row_numbers_ids_and_grades_but_no_text(study: ModuleType) -> None:
    for name, size in (("rule", 1040), ("smollm2", 200)):
        rows = study.rows(name)
        assert len({row["row"] for row in rows}) == len(rows) == size
        for row in rows:
            assert all(isinstance(value, KEYS[key]) for key, value in row.items())
            assert row["id"].startswith("financebench_id_")
            assert {row["human"], row["judge"]} <= {*study.LABELS}
        summary = json.loads((ROOT / "studies" / "judge" / f"{name}.json").read_text())
        assert set(summary["probes"]) == set(probes.PROBES)


def test_the_rule_reproduces_the_committed_verdicts_on_all_rows(
    study: ModuleType, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCEVAL_DATA", str(data_folder))
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "VERDICTS", tmp_path)
    study.measure("rule")
    committed = ROOT / "studies" / "judge"
    for name in ("rule.jsonl", "rule.json"):
        assert (tmp_path / name).read_text() == (committed / name).read_text()


def test_the_rows_of_the_local_judge_are_the_stratified_sample_with_its_human_labels(
    study: ModuleType, data_folder: Path
) -> None:
    sample = calibration.stratified(calibration.graded(data_folder / calibration.FILE), 200)
    assert [(r["row"], r["id"], r["human"]) for r in study.rows("smollm2")] == [
        (row.row, row.question_id, row.human) for row in sample
    ]


def test_every_command_of_the_page_on_runs_works_in_order(
    smollm2: str, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCEVAL_DATA", str(data_folder))
    monkeypatch.setenv("LCEVAL_CACHE", str(cache(tmp_path / "cache", smollm2)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in "ab":
        made_run(tmp_path / "runs" / name, "lc_financebench_ao", financebench(2), ["8.7", "no"])
    lines = [text.strip() for text in PAGE.splitlines() if re.match(r"    (LCEVAL_JUDGE=\w+ )?(lceval|lm_eval) ", text)]
    assert len(lines) == 7
    # --require-kappa needs a calibrated judge, so calibration runs first; plain lm_eval runs in its own process.
    for line in sorted(lines, key=lambda text: "calibrate" not in text):
        words = shlex.split(line)
        if words[0].startswith("LCEVAL_JUDGE="):
            monkeypatch.setenv(*words.pop(0).split("=", 1))
            # A dummy model, for speed.
            words[words.index("lcft")] = "dummy"
            words[words.index("--model_args") : words.index("--model_args") + 2] = [
                "--metadata",
                "pretrained=smollm2-135m",
            ]
            words += ["--limit", "2"]
        if words[0] == "lm_eval":
            process = subprocess.run(
                [sys.executable, "-c", PLAIN, *words[1:]], capture_output=True, text=True, check=False
            )
            assert process.returncode == 0, process.stderr[-2000:]
            assert "judge_sum" in process.stdout
        elif "openai:MODEL" in line:
            with served(lambda prompt, attempt: "ok", lambda user: '{"verdict": "correct"}') as server:
                words = [server.url.join(word.split("http://127.0.0.1:8000/v1")) for word in words]
                assert invoke(words[1:]) == 0
                assert server.total == 2
        else:
            assert invoke(words[1:]) == 0, line
        monkeypatch.delenv("LCEVAL_JUDGE", raising=False)
    assert (tmp_path / "runs" / "c" / "run.json").is_file()


def test_the_calibration_command_of_the_page_reaches_its_required_kappa(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LCEVAL_DATA", str(data_folder))
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path))
    (line,) = [text for text in PAGE.splitlines() if text.startswith("    lceval judge calibrate")]
    assert invoke(shlex.split(line)[1:]) == 0
    assert "rule (rule-based)" in capsys.readouterr().out
