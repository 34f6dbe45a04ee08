"""Stored agreement of judges with human labels: written by `lceval judge calibrate`, shown next to a judge's metrics.

One small file per judge, revision and rubric version, in the cache. Human labels exist only for the correctness of an
answer, so one kappa applies to all metrics of a judge. A smaller sample never replaces a larger one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lceval.core.errors import LcevalError
from lceval.core.io import write_json
from lceval.core.paths import cache_dir
from lceval.judge import rubrics

RUBRIC = "financebench"
_STORED = ("judge", "revision", "rubric", "data", "n", "judged", "kappa", "kappa_interval", "accuracy", "clusters")


class BelowError(LcevalError):
    """The judge's agreement with human labels is below the required one, or unknown."""

    exit_code = 1


def _file(judge: str, revision: str, rubric: str) -> Path:
    name = hashlib.sha256(json.dumps([judge, revision, rubric]).encode()).hexdigest()[:16]
    return cache_dir("judge") / "calibrations" / f"{name}.json"


def keep(report: Mapping[str, Any]) -> None:
    """Store a report of `calibrate`, unless one with more judged rows exists."""
    file = _file(report["judge"], report["revision"], report["rubric"])
    stored = _read(file)
    if stored is not None and stored["judged"] > report["judged"]:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {name: report[name] for name in _STORED})


def find(judge: str, revision: str) -> dict[str, Any] | None:
    """The calibration of a judge under the current rubric version; None: uncalibrated, or kappa undefined."""
    calibration = _read(_file(judge, revision, rubrics.load(RUBRIC).key))
    return calibration if calibration is not None and calibration["kappa"] is not None else None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        calibration = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return calibration if isinstance(calibration, dict) and set(_STORED) <= set(calibration) else None


def require(kappa: float | None, minimum: float, judge: str) -> None:
    """Require a minimum agreement with human labels.

    Raises:
        BelowError: kappa is None (uncalibrated) or below `minimum`.
    """
    if kappa is None:
        raise BelowError(
            f"{judge} is uncalibrated, but a kappa of {minimum:g} is required: lceval judge calibrate --judge NAME"
        )
    if kappa < minimum:
        raise BelowError(f"kappa of {judge} is {kappa:.3f}; {minimum:g} is required")
