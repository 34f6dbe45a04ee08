"""One word per idea: terms that were replaced by the field's own stay out of code, help and documentation."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A retired term, and what is said instead.
RETIRED = {
    r"compress=|question-agnostic|question-aware|(?<![Qq]uery-)(?<!query_)\bagnostic\b": "query_aware, query-agnostic",
    r"\b(?:Observer|observer)\b": "PrefillStats",
    r"\bNeeds\(|\breread\b": "StatsSpec, reconstruction",
    r"\b[Ss]helf\b": "context cache",
    r"\bdeep layers?\b|layers? that sees? (?:all|everything)": "full-attention layers",
    r"\brobust(?::|_sft|\.(?:evictors|keep|full))": "compression_aware",
    r"\b[Tt]wins?\b|\bdistill\b(?!-)": "self-distillation",
    r"\balike[=:]|\"alike\"": "length_matched",
    r"minus full|% of full|\b16b\b": "Δ vs full, retention %, % of fp16 KV",
    r"the same (?:command )?line\b": "rerun the same command to resume",
    r"\bwhat (?:a judge|it|an adapter) is worth\b": "agreement with human labels; evaluate the adapter",
    r"the form that was asked for": "output format",
    r"\boptim\.(?:lr|steps|contexts|checkpointing)\b": "learning_rate, max_steps, contexts_per_step",
}
# Where a retired term is the subject: files of earlier versions are read, and the change is recorded.
EXEMPT = {
    "CHANGELOG.md",
    "docs/table.md",
    "lceval/records/results.py",
    "tests/unit/test_results.py",
    "tests/test_vocabulary.py",
    "tests/unit/test_training_config.py",
}
# Names of grammar, not of content.
GRAMMAR = {"found", "said", "asked", "made", "wanted", "shown", "told"}


def files(*suffixes: str) -> list[Path]:
    """Tracked text files of ours; committed scores are data."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    paths = [ROOT / name for name in listed if name.endswith(suffixes) and name not in EXEMPT]
    return [path for path in paths if path.is_file()]


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def in_a_checkout() -> bool:
    return (ROOT / ".git").exists()


pytestmark = pytest.mark.skipif(not in_a_checkout(), reason="git lists the files of a checkout")


@pytest.mark.parametrize("pattern", RETIRED, ids=[value.split(",")[0] for value in RETIRED.values()])
def test_a_retired_term_is_not_used(pattern: str) -> None:
    term = re.compile(pattern)
    uses = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in files(".py", ".md", ".yaml", ".yml", ".toml", ".html", ".js", ".sh")
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if term.search(line)
    ]
    assert not uses, f"say {RETIRED[pattern]}:\n" + "\n".join(uses)


def test_names_are_those_of_their_content() -> None:
    uses = []
    for path in files(".py"):
        for node in ast.walk(ast.parse(text_of(path))):
            name = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None
            name = node.arg if isinstance(node, ast.arg) else name
            # The finding of `lceval doctor` is a key of its JSON.
            if name in GRAMMAR and path.name != "doctor.py":
                uses.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not uses, "\n".join(uses)
