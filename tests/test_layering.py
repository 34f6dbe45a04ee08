"""The house: packages import only those below them, as docs/architecture.md draws it; names have one meaning."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "models", "tasks", "training")
# Roles of a file in its package.
ROLES = {"__init__", "commands", "command", "render", "scoring"}
# What a package may not import, loaded or not.
FOREIGN = {
    "core": ("torch", "transformers", "lm_eval"),
    "kernels": ("transformers", "lm_eval"),
    "tasks": ("torch",),
    "stats": ("torch",),
}


@cache
def modules() -> dict[str, Path]:
    """Every module by its name in the package."""
    files = [(file.relative_to(ROOT), file) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    files = [(Path("lceval") / relative, file) for relative, file in files]
    own = (ROOT / "lceval").rglob("*.py")
    files += [(f.relative_to(ROOT), f) for f in own if f.relative_to(ROOT).parts[1] not in FOLDERS]
    return {".".join(relative.with_suffix("").parts).removesuffix(".__init__"): file for relative, file in files}


@cache
def imports(module: str) -> frozenset[str]:
    """What a module imports anywhere in its code; ours as modules."""
    names = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in modules() else str(node.module))
    return frozenset(names)


def package(module: str) -> str:
    """The package of one of our modules; empty for `lceval` itself and its entry point."""
    parts = module.split(".")
    return "" if parts[0] != "lceval" or parts[1:2] in ([], ["__main__"]) else parts[1]


def drawn() -> dict[str, list[str]]:
    """The arrows of the drawing, in its order."""
    block = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    arrows = re.findall(r"^(\w+) +-> (-|\w+(?:, \w+)*) ", block, re.MULTILINE)
    return {name: [] if below == "-" else below.split(", ") for name, below in arrows}


def test_the_drawing_is_the_imports() -> None:
    actual = defaultdict(set)
    for module in modules():
        actual[package(module)] |= {package(name) for name in imports(module)} - {package(module), ""}
    del actual[""]
    assert {name: set(below) for name, below in drawn().items()} == dict(actual)


def test_arrows_only_point_down() -> None:
    order = list(drawn())
    for place, (name, below) in enumerate(drawn().items()):
        assert set(below) <= set(order[:place]), name


def test_no_modules_import_each_other() -> None:
    graph = {module: {name for name in imports(module) if name in modules()} for module in modules()}
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the modules


@pytest.mark.parametrize("name", FOREIGN)
def test_a_package_does_without_heavy_libraries(name: str) -> None:
    inside = [module for module in modules() if package(module) == name]
    assert inside
    for module in inside:
        heavy = [n for n in imports(module) if any(n == x or n.startswith(f"{x}.") for x in FOREIGN[name])]
        assert not heavy, f"{module} imports {heavy}"


def test_a_file_name_has_one_meaning() -> None:
    names = Counter(file.stem for file in modules().values() if file.stem not in ROLES)
    assert {name: n for name, n in names.items() if n > 1} == {}


def test_a_class_name_has_one_meaning() -> None:
    classes = Counter(
        node.name
        for file in modules().values()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert {name: n for name, n in classes.items() if n > 1} == {}


@pytest.mark.parametrize("link", FOLDERS)
def test_the_links_in_the_package_lead_to_the_folders(link: str) -> None:
    assert (ROOT / "lceval" / link).is_symlink()
    assert (ROOT / "lceval" / link).resolve() == ROOT / link


@pytest.mark.parametrize("module", ["lceval", "lceval.cli", "lceval.analysis.table", "lceval.plugin"])
def test_a_light_module_loads_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "lm_eval", "jsonlines")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_no_file_is_too_long() -> None:
    assert {str(f): n for f in modules().values() if (n := len(f.read_text().splitlines())) > 420} == {}
