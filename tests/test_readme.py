"""The documentation's commands, links and generated tables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import commands as all_commands
from commands import parse

from lceval.data import listing
from lceval.tasks import catalogue

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[str]:
    """Every line of every `sh` block."""
    blocks = [b for d in DOCUMENTS for b in re.findall(r"```sh\n(.*?)```", d.read_text(), flags=re.DOTALL)]
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.model
def test_every_command_works_in_an_empty_folder(tmp_path: Path, smollm2: str) -> None:
    assert len(commands()) >= 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands():
        ran = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"
        if command.startswith("lceval table"):
            assert "snapkv:0.5" in ran.stdout
            assert "streaming:0.5" in ran.stdout


@pytest.mark.parametrize("command", all_commands())
def test_every_command_is_accepted_by_its_parser(command: str) -> None:
    """`python tests/commands.py` runs those that can run here."""
    parse(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_relative_links_have_a_target(document: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_make_targets_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"^    make (\w+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert named == {"demo", "test"}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert named <= targets


def test_every_dataset_is_in_the_documentation_with_its_properties() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text()
    for dataset in catalogue.datasets().values():
        lengths = ", ".join(map(str, dataset.lengths)) or "as the source"
        modes, contexts = ", ".join(dataset.modes), ", ".join(dataset.contexts)
        assert dataset.comparable, dataset.dataset
        cells = [f"`{dataset.dataset}`", dataset.about, modes, lengths, contexts, dataset.count]
        assert f"| {' | '.join([*cells, listing.source(dataset), dataset.licence, dataset.comparable])} |\n" in text
    assert len(re.findall(r"^\| `\w+` \|(?:[^|]*\|){8}$", text, flags=re.MULTILINE)) == len(catalogue.datasets())
