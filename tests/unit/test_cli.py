"""The command line: fast, quiet, exact in its errors, and documented."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from lceval import cli
from lceval.cli import invoke
from lceval.models.lcft import LCFT
from lceval.models.policies import EVICTORS, QUANTIZERS, SPARSE_ATTENTION
from lceval.runs import doctor

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("argv", [[], ["--help"], ["table", "--help"]])
def test_help_is_on_stdout_and_exits_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(argv) == 0
    assert "Usage: lceval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tabel"], "No such command 'tabel'"),
        (["table"], "Missing argument 'RUN'"),
        (["table", "nowhere"], "nowhere"),
        (["model", "smollm3"], "no packaged model 'smollm3'; there is smollm2-135m"),
        (["demo", "--limit", "many"], "Invalid value for '--limit'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lceval: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_an_unexpected_error_is_one_line_and_exit_4(
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


@pytest.mark.model  # doctor looks for the packaged model
def test_doctor_names_a_remedy_for_every_problem(
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


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys; from lceval.cli import invoke; invoke(['--help'])\n"
        "heavy = ('torch', 'transformers', 'lm_eval', 'numpy', 'rich')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "[]"


def test_help_of_run_lists_the_options_of_lm_eval_the_model_arguments_and_the_recipes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert invoke(["run", "--help"]) == 0
    text = capsys.readouterr().out
    assert invoke(["run", "-h"]) == 0
    assert capsys.readouterr().out == text
    assert {"--output_path", "--gen_kwargs", "--fewshot_as_multiturn"} <= set(re.findall(r"--\w+", text))
    arguments = text.split("\nmodel arguments")[1].split("\nKV recipes")[0]
    for name, argument in inspect.signature(LCFT.__init__).parameters.items():
        if name in ("self", "kwargs"):
            continue
        (entry,) = re.findall(rf"^  {name} .*(?:\n {{24}}.*)*", arguments, flags=re.MULTILINE)
        meaning, default = " ".join(entry.split()[1:]).rsplit(". ", 1)
        assert len(meaning.split()) >= 3, name
        required = argument.default is inspect.Parameter.empty
        assert default == ("Required." if required else f"Default: {argument.default}."), name
    names = set(re.findall(r"\w+", text.split("\nKV recipes")[1]))
    assert {*EVICTORS, *QUANTIZERS, *SPARSE_ATTENTION} <= names
    assert max(map(len, arguments.splitlines())) <= 80


def test_help_of_run_loads_neither_transformers_nor_a_model() -> None:
    code = (
        "import sys; from lceval.cli import invoke; assert invoke(['run', '--help']) == 0\n"
        "print([m for m in ('transformers', 'lceval.models.lcft') if m in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "[]"


def commands(command: Any, path: str = "lceval") -> Iterator[tuple[str, Any]]:
    """Every command with its path, hidden ones included; a group's default command has the path of the group."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    default = getattr(command, "default_command", None)
    for name, child in command.commands.items():
        yield from commands(child, path if name == default else f"{path} {name}")


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.fixture(scope="module")
def pages() -> str:
    """The reference and the pages that it links to."""
    reference = (DOCS / "reference.md").read_text()
    linked = set(re.findall(r"\]\(([\w-]+\.md)", reference))
    return "\n".join([reference, *((DOCS / name).read_text() for name in sorted(linked))])


def test_every_command_of_the_help_is_documented() -> None:
    table = re.findall(r"^\| `(lceval [\w ]+)` \| ([^|]+) \|$", (DOCS / "reference.md").read_text(), flags=re.MULTILINE)
    listed = dict(table)
    assert len(listed) == len(table)
    assert {*COMMANDS} <= {*listed}
    for path, description in listed.items():
        assert len(description.split()) >= 3, path
        linked = [(DOCS / page).read_text() for page in re.findall(r"\]\(([\w-]+\.md)", description)]
        assert path not in COMMANDS or not linked or any(path in text for text in linked), path


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_is_documented_or_has_a_complete_help_text(path: str, pages: str) -> None:
    command = COMMANDS[path]
    assert command.help
    assert command.get_short_help_str(limit=200).endswith(".")
    for parameter in command.params:
        text = parameter.help or ""
        optional_value = not (parameter.required or parameter.param_type_name == "argument" or parameter.is_flag)
        # `Also write ...` states the default, which is to write nothing.
        default_known = parameter.default is not None or re.search("default|^Also", text) is not None
        complete = text.endswith(".") and len(text.split()) >= 2 and (default_known or not optional_value)
        documented = any(re.search(rf"{re.escape(name)}\b", pages) for name in parameter.opts if name.startswith("--"))
        assert complete or documented, f"{path} {parameter.name}: {text!r}"
