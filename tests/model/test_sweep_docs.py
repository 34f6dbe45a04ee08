"""The commands of the page on sweeps, on a small version of its grid, give the same scores on every engine."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lceval.cli import invoke
from lceval.records.results import read_folder

pytestmark = [pytest.mark.slow, pytest.mark.model]
PAGE = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text()

SMALL = {
    "recipes": ["full", "snapkv:0.5"],
    "contexts": ["full"],
    "tasks": ["lc_filings_ao_1k"],
    "limit": 2,
    "gen_kwargs": {"max_gen_toks": 4},
}


def rows(folder: str) -> list[dict[str, Any]]:
    """The samples of a folder without timings; `gold_nll` with the tolerance that the page states."""
    samples = []
    for run in read_folder(Path(folder)):
        for task in run.tasks:
            for sample in task.samples:
                identity = {"recipe": run.recipe, "task": task.task, "id": sample.id, "answer": sample.answer}
                costs = {"score": sample.score, "metrics": {**sample.metrics}, "kv_bytes": sample.kv_bytes}
                kept = {"gold_kept": sample.diagnosis["gold_kept"], "tokens": sample.kv["new_tokens"]}
                nll = pytest.approx(sample.diagnosis["gold_nll"], rel=1e-5)
                samples.append({**identity, **costs, **kept, "gold_nll": nll})
    return sorted(samples, key=lambda row: (row["task"], row["recipe"], row["id"]))


def test_every_command_works_and_the_scores_do_not_depend_on_engine_or_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = yaml.safe_load(PAGE.split("```yaml")[1].split("```")[0]) | SMALL
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    commands = [shlex.split(line)[1:] for line in re.findall(r"^    (lceval .+)$", PAGE, flags=re.MULTILINE)]
    assert len(commands) == 6
    outputs = {}
    for command in commands:
        if "ray" in command:
            # In a child process: Ray's warnings are errors in pytest, and only the table may go to stdout.
            argv = [sys.executable, "-c", "from lceval.cli import main; main()", *command]
            ran = subprocess.run(argv, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            outputs[" ".join(command)] = ran.stdout
        else:
            code = invoke(command)
            captured = capsys.readouterr()
            assert code == 0, captured.err
            outputs[" ".join(command)] = captured.out
    assert "constants of the packaged model on two cores" in outputs["sweep grid.yaml --dry-run"]
    assert outputs["table runs/grid"].count("snapkv:0.5") == 1
    assert outputs["sweep grid.yaml --output_path runs/ray --engine ray --workers 2"].count("snapkv:0.5") == 1

    one, two, ray = (rows(f"runs/{name}") for name in ("grid", "two", "ray"))
    assert len(one) == 2 * 2
    assert {row["tokens"] for row in one} <= set(range(1, 5))
    assert one == two == ray

    # A cell's wall time includes more than its question and decoding times.
    for folder in Path("runs/grid").glob("*/run.json"):
        (task,) = read_folder(folder.parent)[0].tasks
        answered = sum(sample.kv["decode_s"] + sample.kv["question_s"] for sample in task.samples)
        assert json.loads(folder.read_text())["wall_s"] > answered
    assert invoke(["sweep", "grid.yaml", "--output_path", "runs/grid", "--dry-run", "--set", "limit=3", "--json"]) == 0
    assert "measured" not in capsys.readouterr().out  # other cells: none of them is finished
    assert (
        invoke(["sweep", "grid.yaml", "--output_path", "runs/grid", "--dry-run", "--set", "recipes=[int4, full]"]) == 0
    )
    out = capsys.readouterr().out
    assert "smollm2-135m: measured on 1 finished cell, 2 samples" in out
    assert "2 cells, 1 finished; left: 2 samples" in out
