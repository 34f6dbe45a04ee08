"""`train.json`, the record of a training run in its output folder: what a rerun of the command resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lceval.core.errors import UserError
from lceval.core.io import read_object

RECORD = "train.json"
# Folder of the scorer that was trained together with an adapter, in the output of a run and in its checkpoints.
SCORER = "scorer"
ELSEWHERE = "choose another folder (--output FOLDER)"


def recorded(output: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the run that a folder contains; None without one.

    Args:
        recipe: the recipe of the run to start or resume, without what may change.

    Raises:
        UserError: a damaged record, or a run of another recipe.
    """
    file = output / RECORD
    if not file.is_file():
        return None
    record = read_object(file, ELSEWHERE)
    before = record["recipe"]
    changed = sorted(key for key in {*recipe, *before} if key not in before or before[key] != recipe.get(key))
    if changed:
        raise UserError(f"{output} contains a run with different {', '.join(changed)}: {ELSEWHERE}")
    return record


def check_data(output: Path, before: Mapping[str, Any] | None, record: Mapping[str, Any]) -> None:
    """Check that a run to resume had the same data.

    Raises:
        UserError: it had other data.
    """
    if before is not None and before["data"] != record["data"]:
        raise UserError(f"{output}: the data has changed since the run was started: {ELSEWHERE}")
