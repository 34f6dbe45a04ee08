"""The command line: quick, quiet, and exact about what went wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lceval import cli, doctor
from lceval.cli import invoke


@pytest.mark.parametrize("argv", [[], ["--help"], ["table", "--help"]])
def test_help_is_on_stdout_and_exits_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(argv) == 0
    assert "Usage: lceval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tabel"], "No such command 'tabel'"),
        (["table"], "Missing argument 'runs'"),
        (["table", "nowhere"], "nowhere"),
        (["model", "smollm3"], "no packaged model 'smollm3'; there is smollm2-135m"),
        (["demo", "--limit", "many"], "Invalid value for '--limit'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lceval: error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_the_unexpected_is_one_line_and_exit_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "examine", broken)
    assert invoke(["doctor"]) == 4
    error = capsys.readouterr().err
    assert error == "lceval: error: unexpected RuntimeError: first line (LCEVAL_DEBUG=1 shows the traceback)\n"
    monkeypatch.setenv("LCEVAL_DEBUG", "1")
    with pytest.raises(RuntimeError):
        invoke(["doctor"])


def test_doctor_names_a_remedy_for_all_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LCEVAL_DATA", "/no/such/folder")
    code = invoke(["doctor", "--json"])
    findings = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert findings["data folder"]["level"] == "error"
    assert code == 4
    assert findings.keys() == {"versions", "lm_eval plugin", "device", "kernels", "packaged model", "data folder"}
    for finding in findings.values():
        assert finding["level"] == "ok" or finding["remedy"]


def test_help_loads_no_heavy_package() -> None:
    code = (
        "import sys; from lceval.cli import invoke; invoke(['--help'])\n"
        "heavy = ('torch', 'transformers', 'lm_eval', 'numpy', 'rich')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "[]"


def test_every_command_of_the_help_is_documented() -> None:
    import typer

    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {"run", "demo", "table", "model", "doctor"} <= set(commands)
    assert all(command.help for command in commands.values())
