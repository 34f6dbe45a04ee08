"""Dependencies point one way: kernels <- models <- training; tasks imports no model; lceval may import all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "kernels": ("lceval.models", "lceval.training", "lceval.tasks", "transformers", "lm_eval"),
    "models": ("lceval.training", "lceval.tasks"),
    "tasks": ("lceval.models", "lceval.training", "lceval.kernels", "torch"),
    "training": (),
}
# The folders may import these plain modules of lceval, never its commands.
SHARED = ("lceval.errors", "lceval.home")


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_folder_imports_only_those_below_it(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            assert not any(name == f or name.startswith(f"{f}.") for f in FORBIDDEN[folder]), f"{file} imports {name}"
            if name.startswith("lceval.") and name.split(".")[1] not in FORBIDDEN:
                assert name.startswith(SHARED), f"{file} imports {name}"


@pytest.mark.parametrize("link", ["kernels", "models", "tasks", "training"])
def test_the_links_in_the_package_lead_to_the_folders(link: str) -> None:
    assert (ROOT / "lceval" / link).is_symlink()
    assert (ROOT / "lceval" / link).resolve() == ROOT / link


@pytest.mark.parametrize("module", ["lceval", "lceval.cli", "lceval.table", "lceval.plugin", "lceval.models.response"])
def test_a_light_module_loads_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "lm_eval", "jsonlines")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_no_file_is_too_long() -> None:
    files = [f for folder in [*FORBIDDEN, "lceval"] for f in (ROOT / folder).rglob("*.py")]
    assert {str(f): n for f in files if (n := len(f.read_text().splitlines())) > 420} == {}
