"""`lceval demo`: an evaluation that needs no network, GPU or data."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from lceval.runs.folder import opened, report
from lceval.runs.runner import Runner

TASK = "lc_filings_ao_1k"
RECIPES = ("full", "snapkv:0.25", "kvzap:0.5", "kvzap:0.25", "kvzap:0.1")


def demo(output_path: Path, limit: int) -> list[Path]:
    """Evaluate the packaged model under each recipe, with one prefill per context, and return the run folders."""
    with ExitStack() as folders:
        runs = [
            folders.enter_context(
                opened(
                    [
                        "--model=lcft",
                        f"--model_args=pretrained=smollm2-135m,kv={recipe}",
                        f"--tasks={TASK}",
                        f"--limit={limit}",
                        f"--output_path={output_path / recipe.replace(':', '-')}",
                    ]
                )
            )
            for recipe in RECIPES
        ]
        outcomes = Runner().evaluate(runs)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
        report(outcome)
    return [run.folder for run in runs]
