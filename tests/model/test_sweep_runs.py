"""Sweeps of the real model: resuming changes nothing, and each context is prefilled once."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lceval.runs import runner
from lceval.runs.configuration import Context
from lceval.runs.folder import opened
from lceval.runs.runner import answers
from lceval.runs.sweep.execution import sweep
from lceval.runs.sweep.grid import Grid
from lceval.runs.sweep.plan import plan

pytestmark = [pytest.mark.slow, pytest.mark.model]
GRID = """
models: ["smollm2-135m"]
adapters: [null, "no-such-adapter"]
recipes: ["full", "snapkv:0.5"]
tasks: ["lc_filings_ao_1k"]
limit: 5
gen_kwargs: {max_gen_toks: 4}
"""
TIMINGS = ("first_token_s", "prefill_s", "prefill_tok_s", "decode_tok_s")


def command(grid: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from lceval.cli import main; main()",
        "sweep",
        str(grid),
        "--output_path",
        str(out),
        "--json",
    ]


def answered(root: Path) -> dict[str, list[tuple[str, int]]]:
    """The answered requests of each cell, and how often each was answered."""
    requests = {}
    for file in sorted(root.glob("*/responses.sqlite")):
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as db:
            try:
                requests[file.parent.name] = db.execute(
                    "SELECT request, count(*) FROM response GROUP BY request"
                ).fetchall()
            except sqlite3.OperationalError:
                requests[file.parent.name] = []
    return requests


def table(out: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in json.loads(out)["rows"]]


def test_a_killed_sweep_resumes_to_the_same_table_and_a_failing_cell_stops_no_other(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    whole = subprocess.run(command(grid, tmp_path / "whole"), capture_output=True, text=True)
    # The two cells of the missing adapter fail with one line each; the others are finished.
    assert whole.returncode == 4, whole.stderr
    assert whole.stderr.count("failed: ") == 2
    status = json.loads((tmp_path / "whole" / "sweep.json").read_text())
    assert len(status["errors"]) == 2
    for name, file in status["errors"].items():
        assert "no-such-adapter" in name
        trace = (tmp_path / "whole" / file).read_text()
        assert "Traceback (most recent call last):\n" in trace
        assert status["cells"][name].partition(": ")[2] in trace
        assert file in whole.stderr
    assert "2 of 4 cells" in whole.stderr
    # The 5 questions have 2 contexts, each prefilled once for both recipes.
    assert "2 contexts prefilled" in whole.stderr

    killed = tmp_path / "killed"
    process = subprocess.Popen(command(grid, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while sum(len(requests) for requests in answered(killed).values()) < 3:
        assert process.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = answered(killed)
    assert 3 <= sum(map(len, before.values())) < 10

    again = subprocess.run(command(grid, killed), capture_output=True, text=True)
    assert again.returncode == 4, again.stderr
    after = answered(killed)
    assert {name: len(requests) for name, requests in after.items() if requests} == dict.fromkeys(
        [name for name, requests in after.items() if requests], 5
    )
    # Nothing was answered twice.
    assert all(count == 1 for requests in after.values() for _, count in requests)
    assert table(again.stdout) == table(whole.stdout)
    for row in json.loads(whole.stdout)["rows"]:
        # The prefill is charged to every recipe.
        assert row["prefill_s"] > 0.01

    third = subprocess.run(command(grid, killed), capture_output=True, text=True)
    assert "0 contexts prefilled" in third.stderr
    assert third.stdout == again.stdout


def test_a_finished_folder_of_another_run_is_an_error_not_a_result(tmp_path: Path, smollm2: str) -> None:
    sweep_plan = plan(Grid(models=["smollm2-135m"], tasks=["lc_filings_ao_1k"], limit=2))
    (cell,) = sweep_plan.cells
    folder = tmp_path / cell.name
    folder.mkdir()
    with opened(cell.argv(tmp_path / "as-it-is")) as open_run:
        identity = open_run.identity
    # The weights have been overwritten in place since.
    stale = {**identity, "hashes": {"pretrained": "0" * 64}}
    (folder / "run.json").write_text(json.dumps({"status": "finished", "samples": 2, "identity": stale}))
    outcome = sweep(sweep_plan, tmp_path)
    assert outcome.folders == []
    assert "contains another run" in outcome.failed[cell.name]
    assert "hashes.pretrained" in outcome.failed[cell.name]
    assert "contains another run" in json.loads((tmp_path / "sweep.json").read_text())["cells"][cell.name]


def test_a_failing_recipe_stops_no_other_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        prefill_s = 0.0

    class Answering:
        def __init__(self, recipe: str) -> None:
            self.recipe = recipe

        def answer(self, context: Context) -> list[str]:
            if self.recipe == "int4":
                raise MemoryError("no room")
            return [self.recipe] * len(context.requests)

    contexts = [Context(name, "generate_until", [None] * 2) for name in ("a", "b")]
    errors: dict[str, Exception] = {}
    sides = [Answering(name) for name in ("full", "int4", "int8")]
    answered = list(
        answers(Broken(), sides, contexts, on_error=lambda side, error: errors.update({side.recipe: error}))
    )
    assert [(one.context.name, one.responses) for one in answered] == [
        (name, [recipe] * 2) for name in ("a", "b") for recipe in ("full", "int8")
    ]
    assert list(errors) == ["int4"]
    with pytest.raises(MemoryError, match="no room"):
        list(answers(Broken(), sides, contexts))


def test_a_failing_run_leaves_no_cache_hook_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lcft: Any
) -> None:
    """A sweep reuses the model for the next cell, which must not be answered from the failed cell's folder."""
    import lm_eval

    def fails(**_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(lm_eval, "simple_evaluate", fails)
    model = lcft()
    (cell,) = plan(Grid(models=["smollm2-135m"], tasks=["lc_filings_ao_1k"], limit=1)).cells
    monkeypatch.setattr(runner, "load_model", lambda _: model)
    with opened(cell.argv(tmp_path / "cell")) as open_run:
        (error,) = runner.Runner().evaluate([open_run])
    assert isinstance(error, MemoryError)
    assert not {"generate_until", "loglikelihood", "loglikelihood_rolling"} & vars(model).keys()
