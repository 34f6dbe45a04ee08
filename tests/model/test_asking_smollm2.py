"""Contexts from Python with the packaged model: answers are those of lcft, and the documentation is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from lceval.bench import render
from lceval.cli import invoke
from lceval.models.asking import LoadedModel

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python.md"


def test_an_answer_is_that_of_lcft_for_the_same_prompt(lcft: Any, lcft_model: Any, smollm2: str) -> None:
    text = "The mayor of Tilsen is Mara Ellison, a lawyer from Lyon. The harbour was rebuilt in 1951." * 2
    question = "\n\nWho is the mayor of Tilsen?"
    kv = "snapkv:0.5+int8"
    model = lcft(kv)
    prompt = model.apply_chat_template([{"role": "user", "content": text + question}]) + "The mayor"
    request = Instance("generate_until", {"context": text}, (prompt, {"max_gen_toks": 12}), 0, ("t", 0, 1))
    (expected,) = model.generate_until([request], disable_tqdm=True)
    context = LoadedModel(lcft_model, kv, tokenizer=smollm2).compress(text)
    answer = context.ask(question, max_new_tokens=12, answer_prefix="The mayor")
    assert answer == expected
    assert answer
    assert answer.meta["kv"]["kept_tokens"] == expected.meta["kv"]["kept_tokens"]
    assert answer.meta["kv_bytes"] == context.kv_bytes == expected.meta["kv_bytes"]


def test_the_example_of_the_page_runs_as_the_page_says(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(compile(code, PAGE.name, "exec"), {})
    expected = re.findall(r"(?:^|  )# (.*)$", code, flags=re.MULTILINE)
    mayor, *others, size, opened = capsys.readouterr().out.splitlines()
    assert len(expected) == 3 + len(others)
    # Greedy answers of so small a model can depend on the CPU's rounding.
    assert "Mara Ellison" in mayor
    assert mayor == opened
    assert all(others)
    assert size == expected[-2]


def test_the_example_of_the_readme_runs(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "README.md").write_text(text[:1500])  # its prefill takes a second
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "readme.safetensors").is_file()


def test_bench_context_compares_opening_with_the_prefill(smollm2: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["bench", "context", "--tokens", "100", "--kv", "int8:residual=0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["same_answer"]
    assert render.context(report).endswith(f"= {report['speedup']:.1f}, the same answer")
    assert report["speedup"] == pytest.approx(report["prefill_s"] / (report["identify_s"] + report["open_s"]))
    assert report["recipe"] == "int8:residual=0"
    assert report["kv_bytes"] < report["file_bytes"]
