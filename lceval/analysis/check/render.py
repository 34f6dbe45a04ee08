"""Renderers of a check: text, markdown, JSON and JUnit XML."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from xml.etree import ElementTree

from lceval.analysis.check.baseline import Baseline
from lceval.analysis.check.compare import Check, Flip, TaskCheck
from lceval.core.text_tables import aligned, pipe
from lceval.stats.paired import LEVEL

FLIPS = 10
_WIDTH = 100
_HEADER = ("task", "metric", "n", "clusters", "base", "new", "drop [lo, hi]", "p", "Holm p", "detects", "verdict")
_TEXT = (0, 1, 10)  # the columns that are not numbers
Texts = Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class CheckReport:
    """A check with its context for rendering.

    base_texts, new_texts: answers by (task, sample), where available.
    warn: an inconclusive task does not fail.
    """

    check: Check
    base: Baseline
    new: Baseline
    warn: bool = False
    base_texts: Texts = field(default_factory=dict)
    new_texts: Texts = field(default_factory=dict)


def terminal(report: CheckReport) -> str:
    """The table, a reason per task, the samples with the largest drops, and the verdict in the last line."""
    lines = [*_title(report), "", aligned([_HEADER, *map(_cells, report.check.tasks)], _TEXT), ""]
    lines += [f"{task.task}: {task.verdict}: {task.reason}{_errors(task)}" for task in report.check.tasks]
    if any(task.paired for task in report.check.tasks):
        lines += _CAPTION
    if flips := _worst(report.check):
        lines += ["", f"Largest drops, {len(flips)} of {sum(len(t.flips) for t in report.check.tasks)} worse samples:"]
        for task, flip in flips:
            lines.append(f"  {task.task} {flip.key}: {_number(flip.base)} -> {_number(flip.new)}")
            old, new = (_answer(texts.get((task.task, flip.key))) for texts in (report.base_texts, report.new_texts))
            lines += [f"    both: {old}"] if old == new else [f"    base: {old}", f"    new:  {new}"]
    return "\n".join([*lines, "", _conclusion(report)])


def markdown(report: CheckReport) -> str:
    """The check as markdown, for the step summary of a CI job."""
    lines = [f"### {_conclusion(report)}", "", *(f"- {_escaped(line)}" for line in _title(report)), ""]
    lines += [pipe(_HEADER, [[*map(_escaped, _cells(task))] for task in report.check.tasks], _TEXT)]
    lines += ["", *(f"- {_escaped(t.task)}: {t.verdict}: {_escaped(t.reason)}{_errors(t)}" for t in report.check.tasks)]
    if any(task.paired for task in report.check.tasks):
        lines += (f"- {line}" for line in _CAPTION)
    if flips := _worst(report.check):
        rows = []
        for task, flip in flips:
            key = (task.task, flip.key)
            texts = (_answer(report.base_texts.get(key)), _answer(report.new_texts.get(key)))
            cells = (f"{task.task} {flip.key}", _number(flip.base), _number(flip.new), *texts)
            rows.append([*map(_escaped, cells)])
        lines += ["", pipe(("largest drops", "base", "new", "base answer", "new answer"), rows, (0, 3, 4))]
    return "\n".join(lines)


def as_json(report: CheckReport, exit_code: int) -> str:
    """Unrounded numbers; null without a value or bound."""
    tasks = []
    for task in report.check.tasks:
        row = asdict(task)
        # A missing bound is infinite, which JSON cannot represent.
        paired = row.pop("paired") or {}
        row["paired"] = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in paired.items()
        } or None
        row["flips"] = [
            {
                **asdict(flip),
                "base_answer": report.base_texts.get((task.task, flip.key)),
                "new_answer": report.new_texts.get((task.task, flip.key)),
            }
            for flip in task.flips[:FLIPS]
        ]
        row["lost"] = len(task.flips)
        tasks.append(row)
    data: dict[str, Any] = {
        "verdict": report.check.verdict,
        "exit_code": exit_code,
        "gate": report.check.gate,
        "level": LEVEL,
        "base": report.base.model_dump(exclude={"tasks"}),
        "new": report.new.model_dump(exclude={"tasks"}),
        "tasks": tasks,
    }
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)


def junit(report: CheckReport) -> str:
    """One testcase per task: failure for a regression or inconclusive result, skipped if the latter only warns."""
    tasks = report.check.tasks
    failed = [t for t in tasks if t.verdict == "regression" or (t.verdict == "inconclusive" and not report.warn)]
    suite = ElementTree.Element("testsuite", name="lceval check", errors="0", tests=str(len(tasks)))
    suite.set("failures", str(len(failed)))
    suite.set("skipped", str(sum(t.verdict == "inconclusive" for t in tasks) if report.warn else 0))
    for task in tasks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_printable(f"lceval.check.{task.metric}"), name=_printable(task.task)
        )
        if task in failed:
            ElementTree.SubElement(case, "failure", type=task.verdict, message=task.reason)
        elif task.verdict == "inconclusive":
            ElementTree.SubElement(case, "skipped", message=f"inconclusive: {task.reason}")
        drops = "".join(f"\n{f.key}: {_number(f.base)} -> {_number(f.new)}" for f in task.flips[:FLIPS])
        numbers = ", ".join(f"{name} {cell}" for name, cell in zip(_HEADER, _cells(task), strict=True))
        ElementTree.SubElement(case, "system-out").text = _printable(f"{numbers}{drops}")
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode")


_CAPTION = (
    f"drop: positive is worse. lo, hi: one-sided {LEVEL:.0%} bounds, with one unseen context of maximum change.",
    "detects: the drop that a comparison of this size and variability detects with 80% power.",
)


def _title(report: CheckReport) -> list[str]:
    return [f"{side}: {_run(run)}" for side, run in (("base", report.base), ("new", report.new))]


def _run(run: Baseline) -> str:
    parts = [run.model, run.pretrained or "", f"+{run.peft}" if run.peft else "", run.recipe]
    return f"{run.label} ({' '.join(part for part in parts if part)})"


def _cells(task: TaskCheck) -> tuple[str, ...]:
    values = (task.task, task.metric, str(task.n), str(task.clusters), _number(task.base), _number(task.new))
    if (paired := task.paired) is None:
        return (*values, "identical", "-", "-", "-", task.verdict)
    drop = f"{paired.drop:.3g} [{_number(paired.lower)}, {_number(paired.upper)}]"
    return (*values, drop, f"{paired.p:.2g}", f"{task.p_holm:.2g}", _number(paired.visible), task.verdict)


def _conclusion(report: CheckReport) -> str:
    check = report.check
    suffix = " (warning only)" if report.warn and check.verdict == "inconclusive" else ""
    return f"{check.verdict} at gate {check.gate:g}{suffix}"


def _errors(task: TaskCheck) -> str:
    if not (task.errors_base or task.errors_new):
        return ""
    return f" (samples without a value, scored 0: {task.errors_base} in base, {task.errors_new} in new)"


def _worst(check: Check) -> list[tuple[TaskCheck, Flip]]:
    worse = [(task, flip) for task in check.tasks for flip in task.flips]
    return sorted(worse, key=lambda pair: -pair[1].drop)[:FLIPS]


def _number(value: float | None) -> str:
    if value is None:
        return "error"
    return f"{value:.4g}" if math.isfinite(value) else ("no bound" if value > 0 else "-")


def _answer(text: str | None) -> str:
    """An answer on one line."""
    if text is None:
        return "(not stored in a baseline)"
    line = _printable(" ".join(text.split())) or "(empty)"
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def _printable(text: str) -> str:
    """The text without characters that are invalid in XML or unsafe in a terminal."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF))


def _escaped(text: str) -> str:
    for character in "\\|*_<`[":
        text = text.replace(character, "\\" + character)
    return text
