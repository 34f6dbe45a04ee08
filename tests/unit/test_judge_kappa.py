"""Agreement with human labels is shown next to judge metrics, and --require-kappa enforces a minimum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_judge_runs import financebench, made_run

from lceval.cli import invoke
from lceval.judge import kappas

OUTPUT_FORMATS = ("terminal", "markdown", "latex", "csv", "html", "json")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run judged by the rule, without a calibration."""
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    folder = made_run(tmp_path / "run", "lc_financebench_ao", financebench(3), ["8.7", "no", "8.7"])
    assert invoke(["judge", str(folder), "--judge", "rule"]) == 0
    return folder


def report(kappa: float | None, judged: int, **more: Any) -> Mapping[str, Any]:
    bounds = None if kappa is None else [kappa - 0.08, kappa + 0.08]
    fields = {"judge": "rule", "revision": "1", "rubric": "financebench@1", "data": "d", "n": judged, "judged": judged}
    return {**fields, "kappa": kappa, "kappa_interval": bounds, "accuracy": 0.8, "clusters": 65, **more}


def rendered(folder: Path, capsys: pytest.CaptureFixture[str], output_format: str, *more: str) -> str:
    capsys.readouterr()
    assert invoke(["table", str(folder), "--format", output_format, *more]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_every_format_has_kappa_with_its_interval_or_uncalibrated(
    run: Path, capsys: pytest.CaptureFixture[str], output_format: str
) -> None:
    before = rendered(run, capsys, output_format)
    kappas.keep(report(0.67, 1040))
    after = rendered(run, capsys, output_format)
    if output_format == "json":
        (row,) = json.loads(after)["rows"]
        assert (row["judge_kappa"], row["judge_kappa_n"]) == (0.67, 1040)
        assert (row["judge_kappa_lo"], row["judge_kappa_hi"]) == pytest.approx((0.59, 0.75))
        assert json.loads(before)["rows"][0]["judge_kappa"] is None
    elif output_format == "csv":
        assert "judge_kappa" in before
        assert "0.67" in after
        assert "0.67" not in before
    else:
        assert "uncalibrated" in before
        assert "uncalibrated" not in after
        interval = "0.67 {[}0.59, 0.75{]}" if output_format == "latex" else "0.67 [0.59, 0.75]"
        assert interval in after
        assert "1040 FinanceBench answers" in " ".join(after.split())
    assert rendered(run, capsys, output_format, "--require-kappa", "0.6") == after


def test_means_over_tasks_have_the_kappa_of_their_judge(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kappas.keep(report(0.67, 1040))
    assert "0.67 [0.59, 0.75]" in rendered(run, capsys, "markdown", "--by", "suite")


def test_require_kappa_refuses_a_worse_or_uncalibrated_judge_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (["table", str(run)], ["table", str(run), "--by", "suite"], ["judge", str(run), "--judge", "rule"]):
        capsys.readouterr()
        assert invoke([*line, "--require-kappa", "0.6"]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "rule" in captured.err
        assert "is uncalibrated, but a kappa of 0.6 is required" in captured.err
    kappas.keep(report(0.5, 1040))
    for line in (["table", str(run)], ["judge", str(run), "--judge", "rule"]):
        assert invoke([*line, "--require-kappa", "0.6"]) == 1
        assert "is 0.500; 0.6 is required" in capsys.readouterr().err
        assert invoke([*line, "--require-kappa", "0.5"]) == 0
        capsys.readouterr()


def test_a_smaller_sample_another_revision_or_another_rubric_is_ignored(run: Path) -> None:
    kappas.keep(report(0.67, 1040))
    kappas.keep(report(0.99, 20))
    kappas.keep(report(0.1, 2000, revision="2"))
    kappas.keep(report(0.1, 2000, rubric="financebench@0"))
    calibration = kappas.find("rule", "1")
    assert calibration is not None
    assert calibration["kappa"] == 0.67
    assert kappas.find("another", "1") is None
    kappas.keep(report(None, 1040))
    assert kappas.find("rule", "1") is None


def test_the_table_and_the_report_show_the_stored_calibration(
    run: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LCEVAL_DATA", str(data_folder))
    assert invoke(["judge", "calibrate", "--judge", "rule", "--limit", "200", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    (row,) = json.loads(rendered(run, capsys, "json"))["rows"]
    assert [row["judge_kappa"], row["judge_kappa_lo"], row["judge_kappa_hi"]] == [
        measured["kappa"],
        *measured["kappa_interval"],
    ]
    assert invoke(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "judge's kappa" in page
    assert f'"judge_kappa":{measured["kappa"]}'.replace(" ", "") in page.replace(" ", "")
