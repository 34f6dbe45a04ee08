"""`lceval demo`: an evaluation that needs no network, GPU or data."""

from __future__ import annotations

import sys
from pathlib import Path

from lceval.run import report, run

TASK = "lc_filings_ao_1k"
RECIPES = ("full", "snapkv:0.5", "snapkv:0.25", "streaming:0.25")


def demo(output_path: Path, limit: int) -> list[Path]:
    """Evaluate the packaged model under each recipe and return the run folders."""
    folders = []
    for number, recipe in enumerate(RECIPES, 1):
        folder = output_path / recipe.replace(":", "-")
        print(f"[{number}/{len(RECIPES)}] {TASK} with kv={recipe}", file=sys.stderr)
        outcome = run(
            [
                "--model=lcft",
                f"--model_args=pretrained=smollm2-135m,kv={recipe}",
                f"--tasks={TASK}",
                f"--limit={limit}",
                f"--output_path={folder}",
            ]
        )
        report(outcome)
        folders.append(folder)
    return folders
