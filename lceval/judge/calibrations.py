"""What each judge was found to be worth: kept by `lceval judge calibrate`, shown beside what that judge graded.

One small file a judge, revision and rubric with its version, in the cache. People graded only whether an answer is
right, so that one figure stands beside all that a judge grades. A smaller sample never replaces a larger one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lceval.errors import LcevalError
from lceval.home import cache_dir
from lceval.judge import rubrics

RUBRIC = "financebench"
_KEPT = ("judge", "revision", "rubric", "data", "n", "judged", "kappa", "kappa_interval", "accuracy", "clusters")


class BelowError(LcevalError):
    """The judge agrees less with people than was required, or nobody knows how much."""

    exit_code = 1


def _file(judge: str, revision: str, rubric: str) -> Path:
    name = hashlib.sha256(json.dumps([judge, revision, rubric]).encode()).hexdigest()[:16]
    return cache_dir("judge") / "calibrations" / f"{name}.json"


def keep(report: Mapping[str, Any]) -> None:
    """File a report of `calibrate`, unless one over more judged rows is there."""
    file = _file(report["judge"], report["revision"], report["rubric"])
    known = _read(file)
    if known is not None and known["judged"] > report["judged"]:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps({name: report[name] for name in _KEPT}, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, file)


def find(judge: str, revision: str) -> dict[str, Any] | None:
    """What a judge was found to be worth under today's rubric; None: not calibrated, or kappa undefined."""
    found = _read(_file(judge, revision, rubrics.load(RUBRIC).key))
    return found if found is not None and found["kappa"] is not None else None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and set(_KEPT) <= set(found) else None


def require(kappa: float | None, least: float, judge: str) -> None:
    """Refuse a judge that agrees too little.

    Raises:
        BelowError: kappa is None (uncalibrated) or below `least`.
    """
    if kappa is None:
        raise BelowError(
            f"{judge} is uncalibrated, and a kappa of {least:g} was required: lceval judge calibrate --judge NAME"
        )
    if kappa < least:
        raise BelowError(f"kappa of {judge} is {kappa:.3f}, and {least:g} was required")
