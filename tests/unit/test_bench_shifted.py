"""The benchmark of shifted attention: both sides in one run, as JSON and as text."""

from __future__ import annotations

import json

import pytest

from lceval.cli import invoke


def test_both_sides_are_measured_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", "shifted", "--length", "96", "--length", "130", "--rounds", "1", "--heads", "3", "--kv-heads", "1"]
    assert invoke([*line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["tokens"], row["group"]) for row in report["rows"]] == [(96, 24), (130, 32)]
    for row in report["rows"]:
        assert row["speedup"] == pytest.approx(row["full_ms"] / row["shifted_ms"])
    assert report["machine"]["threads"] > 0
    assert invoke([*line, "--dtype", "bf16"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2


def test_invalid_sizes_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["bench", "shifted", "--heads", "4", "--kv-heads", "3"]) == 2
    assert "heads a multiple of KV heads" in capsys.readouterr().err
    assert invoke(["bench", "shifted", "--dtype", "fp8"]) == 2
    assert "one of fp32, bf16" in capsys.readouterr().err
