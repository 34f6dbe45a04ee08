"""lm-eval's reasoning tasks under eviction while writing: sampling, repeats, their mean, tokens and bytes."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval._cli.harness import HarnessCLI

from lceval.analysis import table
from lceval.records import results

pytestmark = pytest.mark.model

THEIRS = Path(lm_eval.tasks.__file__).parent
# Task -> its file in lm-eval, the split of its rows, and a row.
TASKS = {
    "aime25": ("aime/aime25.yaml", "test", {"problem": "What is 17 + 25?", "answer": "42"}),
    "minerva_math_algebra": (
        "minerva_math/minerva_math_algebra.yaml",
        "test",
        {"problem": "What is $3 \\cdot 4$?", "solution": "It is $\\boxed{12}$.", "level": "1", "type": "Algebra"},
    ),
}
RECIPES = ("full", "random:12:when=decode:every=6")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lm-eval's tasks on rows of one's own, sampled three times."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (file, split, row) in TASKS.items():
        rows = folder / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({**row, "id": n}) + "\n" for n in range(2)))
        (folder / f"{name}.yaml").write_text(
            f"include: {THEIRS / file}\ntask: {name}\ndataset_path: json\ndataset_name: null\nrepeats: 3\n"
            f"training_split: null\nnum_fewshot: 0\ndataset_kwargs: {{data_files: {{{split}: {rows}}}}}\n"
        )
    return folder


def test_repeats_are_averaged_with_tokens_and_peak_bytes(local: Path, tmp_path: Path, smollm2: str) -> None:
    cli, runs = HarnessCLI(), []
    for index, kv in enumerate(RECIPES):
        line = ["run", "--model", "lcft", "--model_args", f"pretrained={smollm2},kv={kv}", "--tasks", ",".join(TASKS)]
        line += ["--include_path", str(local), "--output_path", str(tmp_path / str(index)), "--log_samples"]
        line += ["--gen_kwargs", '{"do_sample": true, "temperature": 0.8, "max_gen_toks": 16}', "--device", "cpu"]
        cli.execute(cli._parser.parse_args([*line, "--batch_size", "3", "--apply_chat_template"]))
        runs += results.read_runs([tmp_path / str(index)])
    for kv, run in zip(RECIPES, runs, strict=True):
        assert {task.task for task in run.tasks} == {*TASKS}
        for task in run.tasks:
            assert task.file is not None
            for line, sample in zip(task.file.read_text().splitlines(), task.samples, strict=True):
                logged = json.loads(line)
                assert len(logged["resps"][0]) == 3
                assert len({*logged["resps"][0]}) > 1  # sampled
                scores = logged["repeats"]["exact_match"]
                assert len(scores) == 3
                assert sample.score == sum(scores) / 3
                assert 1 <= sample.kv["new_tokens"] <= 16
                assert sample.kv["peak_bytes"] > sample.kv_bytes_full
                assert sample.kv["boundary"] == (kv != "full")
                assert not sample.uncompressed or kv == "full"
    built = table.build(runs)
    text = table.to_markdown(built)
    assert "tokens" in text
    assert "peak" in text
    assert all(row["written_tokens"] and row["peak_mb"] for row in built.rows)
    assert "written" not in table.to_markdown(table.build(runs[:1]))
