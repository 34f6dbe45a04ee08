"""Implementation of `lceval check`: compare, plan, or write a baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from lceval.analysis.check import baseline, render
from lceval.analysis.check import sample_size as plans
from lceval.analysis.check.compare import EXIT, check
from lceval.core.errors import UserError

Inconclusive = Literal["fail", "warn"]


def run(
    runs: Sequence[Path],
    *,
    gate: float | None,
    metric: str | None = None,
    inconclusive: Inconclusive = "fail",
    plan: bool = False,
    discordance: float = 0.1,
    write_baseline: Path | None = None,
    junit: Path | None = None,
    markdown: Path | None = None,
    as_json: bool = False,
) -> tuple[str, int]:
    """The text for stdout, and the exit code.

    Raises:
        UserError, NotComparableError, InfrastructureError: as in the modules of this package.
    """
    if write_baseline is not None:
        (only,) = _count(runs, (1,), "--write-baseline FILE requires one RUN")
        written = baseline.write(write_baseline, only)
        sizes = {task.task: len(task.samples) for task in written.tasks}
        text = f"{write_baseline}: {written.label}, {sum(sizes.values())} samples of {', '.join(sizes)}"
        return json.dumps({"file": str(write_baseline), "samples": sizes}) if as_json else text, 0
    if gate is None:
        raise UserError("missing --gate: the largest acceptable drop in the metric's units, for example --gate 0.05")
    if plan:
        bases = _count(runs, (0, 1), "--plan accepts at most one BASE")
        sample_sizes = plans.plan(gate, discordance, baseline.read(bases[0])[0] if bases else None)
        return json.dumps(asdict(sample_sizes), indent=2) if as_json else plans.render(sample_sizes), 0
    first, second = _count(
        runs, (2,), "expected BASE and NEW, for example: lceval check runs/base runs/new --gate 0.05"
    )
    (base, base_run), (new, new_run) = baseline.read(first), baseline.read(second)
    report = render.CheckReport(
        check(base, new, gate=gate, metric=metric),
        base,
        new,
        warn=inconclusive == "warn",
        base_texts=baseline.answers(base_run),
        new_texts=baseline.answers(new_run),
    )
    verdict = report.check.verdict
    code = 0 if verdict == "inconclusive" and report.warn else EXIT[verdict]
    for file, renderer in ((junit, render.junit), (markdown, render.markdown)):
        if file is not None:
            _write(file, renderer(report) + "\n")
    return render.as_json(report, code) if as_json else render.terminal(report), code


def _count(runs: Sequence[Path], allowed: tuple[int, ...], message: str) -> Sequence[Path]:
    if len(runs) not in allowed:
        raise UserError(f"{message}; received {len(runs)}")
    return runs


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
