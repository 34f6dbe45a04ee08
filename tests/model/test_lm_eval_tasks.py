"""lm-eval's own long-context tasks under `lm_eval --model lcft`: compressed, with telemetry, and equal to `hf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import nltk
import pytest
from lm_eval._cli.harness import HarnessCLI

from lceval.records import results

pytestmark = pytest.mark.model

FILLER = "The river is wide here. Nobody has counted the boats. In autumn the market moves to the other bank. " * 5
THEIRS = Path(lm_eval.tasks.__file__).parent
TEXT = f"{FILLER}The code of the vault is 4711. {FILLER}"
QUESTION = "What is the code of the vault?"
OPTIONS = ["4711", "1234", "9999", "1000"]
EDGES = "\n".join(f"a{n} -> a{n * 7 % 40}" for n in range(40))
# Task -> its file in lm-eval, and a row. Together all kinds: one with few-shot examples, one with choices, one found by
# a field of another name, two by a pattern.
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "longbench_hotpotqa": (
        "longbench/hotpotqa.yaml",
        {"context": TEXT, "question": QUESTION, "answers": ["4711"], "all_classes": [], "length": 9},
    ),
    "longbench2_academic_single": (
        "longbench2/academic_single.yaml",
        {"context": TEXT, "question": QUESTION, "choices": OPTIONS, "answer": 0},
    ),
    "infinitebench_longbook_choice_en": (
        "infinitebench/infinitebench_longbook_choice_en.yaml",
        {"context": TEXT, "input": QUESTION, "answer": ["4711"], "options": OPTIONS},
    ),
    "babilong_qa1": ("babilong/babilong_qa1.yaml", {"input": TEXT, "question": QUESTION, "target": "4711"}),
    "niah_single_1": (
        "ruler/niah_single_1.yaml",
        {
            "input": f"{TEXT}\nWhat is the special magic number for vault mentioned in the provided text?",
            "outputs": ["4711"],
            "gen_prefix": "The special magic number for vault mentioned in the provided text is",
            "max_length": 8192,
        },
    ),
    "graphwalks_128k": (
        "graphwalks/graphwalks_128k.yaml",
        {
            "prompt": f"Operation:\nan example\n\nThe edges:\n{EDGES}\n\nOperation:\nFind the parents of node a7.\n",
            "answer_nodes": ["a1"],
        },
    ),
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lm-eval's tasks, whose rows come from files in it."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (file, row) in TASKS.items():
        rows = folder / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({**row, "id": n}) + "\n" for n in range(2)))
        split = "train" if name.startswith(("longbench2", "graphwalks")) else "test"
        split = "qa1" if name == "babilong_qa1" else "longbook_choice_en" if "choice_en" in name else split
        (folder / f"{name}.yaml").write_text(
            f"include: {THEIRS / file}\ntask: {name}\ncustom_dataset: null\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{{split}: {rows}}}}}\n"
        )
    return folder


def run(local: Path, output: Path, model: str, model_args: str, *more: str) -> dict[str, results.TaskResult]:
    """Results by task of a command line."""
    cli = HarnessCLI()
    line = [
        "run",
        "--model",
        model,
        "--model_args",
        model_args,
        "--tasks",
        ",".join(TASKS),
        "--output_path",
        str(output),
    ]
    line += ["--include_path", str(local), "--log_samples", "--gen_kwargs", '{"max_gen_toks": 6}', "--device", "cpu"]
    cli.execute(cli._parser.parse_args([*line, *more]))
    (read,) = results.read_runs([output])
    return {task.task: task for task in read.tasks}


def test_every_family_is_compressed_and_under_full_equals_hf(
    local: Path, tmp_path: Path, smollm2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nltk, "download", lambda *_, **__: True)  # lm-eval's ruler downloads a word list at import
    half = run(local, tmp_path / "half", "lcft", f"pretrained={smollm2},kv=snapkv:0.5")
    full = run(local, tmp_path / "full", "lcft", f"pretrained={smollm2}")
    hf = run(local, tmp_path / "hf", "hf", f"pretrained={smollm2},dtype=float32")
    assert {*half} == {*full} == {*hf} == {*TASKS}
    for name in TASKS:
        for sample in half[name].samples:
            assert sample.kv["kept_share"] == pytest.approx(0.5, abs=0.02), name
            assert sample.kv_bytes == pytest.approx(0.5 * sample.kv_bytes_full, rel=0.04), name
            assert sample.kv["boundary"], name
        assert all(sample.kv["kept_share"] == 1 for sample in full[name].samples)
        assert all(not sample.kv for sample in hf[name].samples)
        assert [s.metrics for s in full[name].samples] == [s.metrics for s in hf[name].samples], name
        if not name.startswith("longbench2"):  # log-likelihoods differ by rounding
            assert [s.answer for s in full[name].samples] == [s.answer for s in hf[name].samples], name
    assert full["niah_single_1"].headline == "string_match"
    assert {s.score for s in full["niah_single_1"].samples} <= {0.0, 1.0}
