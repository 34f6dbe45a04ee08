"""Baselines: the part of a run that is compared, small enough to commit.

A baseline contains every sample's id, cluster, prompt digest, answer digest and values, and the settings in which
comparable runs must agree, but no text. Runs are converted to baselines before comparison, so files and folders are
treated alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from lceval.analysis.pairs import unique_names
from lceval.core.answers import DIAGNOSES
from lceval.core.errors import InfrastructureError, UserError
from lceval.core.io import read_object, write_text
from lceval.records.results import LARGEST, TELEMETRY, Run, Sample, read_runs

# Diagnoses available as gate metrics: whether higher is better.
GATED = {"gold_nll": False, "gold_kept": True, "ndcg10": True}
assert set(GATED) == set(DIAGNOSES)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


NO_ANSWER = _digest("")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Item(_Strict):
    """One sample. answer: digest of the scored response. values: by metric; empty for an error."""

    id: str
    cluster: str
    prompt: str
    answer: str
    values: dict[str, Annotated[FiniteFloat, Field(ge=-LARGEST, le=LARGEST)]]


class BaselineTask(_Strict):
    """One task: samples and scoring. filter: the first lm-eval filter; None without one."""

    task: str
    version: str | None
    headline: str | None
    filter: str | None
    lower_is_better: list[str]
    sources: list[str]
    samples: list[Item] = Field(min_length=1)


class Baseline(_Strict):
    """One run. template: digest of the chat template, "on" if it is unknown, or "off".

    fingerprint: of the run's identity, from run.json; None for plain lm-eval. It is not compared.
    """

    format: Literal["lceval-baseline"] = "lceval-baseline"
    format_version: Literal[1] = 1
    label: str
    model: str
    pretrained: str | None
    peft: str | None
    recipe: str
    fingerprint: str | None
    template: str
    tasks: list[BaselineTask] = Field(min_length=1)


def read(path: Path) -> tuple[Baseline, Run | None]:
    """A baseline from a file, or from the single run in a folder; in the second case also the run.

    Raises:
        UserError: no such path, not a baseline, or a folder without exactly one run.
        InfrastructureError: an unfinished run.
    """
    if os.path.isfile(path):
        return _read_file(path), None
    runs = read_runs([path])
    if len(runs) != 1:
        raise UserError(
            f"{path}: {len(runs)} evaluations ({', '.join(r.label for r in runs)}); expected one per folder"
        )
    return of(runs[0]), runs[0]


def of(run: Run) -> Baseline:
    """The baseline of a finished run."""
    for task in run.tasks:
        missing = (task.expected or 0) - len(task.samples)
        if not run.finished or missing > 0 or not task.samples:
            raise InfrastructureError(
                f"{run.path}: not finished ({len(task.samples)} of {task.expected or '?'} samples of {task.task}): "
                "rerun the same command to resume"
            )
    sha = run.config.get("chat_template_sha")
    applied = run.config.get("apply_chat_template", bool(sha)) not in (False, None, "")
    return Baseline(
        label=run.label,
        model=run.model,
        pretrained=run.pretrained,
        peft=run.peft,
        recipe=run.recipe,
        fingerprint=str(digest) if (digest := run.config.get("fingerprint")) else None,
        template=(str(sha)[:16] if sha else "on") if applied else "off",
        tasks=[
            BaselineTask(
                task=task.task,
                version=task.version,
                headline=task.headline,
                filter=task.filters[0] if task.filters else None,
                lower_is_better=sorted(task.lower_is_better - TELEMETRY),
                sources=list(task.sources),
                samples=[_item(sample, task.headline) for sample in task.samples],
            )
            for task in run.tasks
        ],
    )


def answers(run: Run | None) -> dict[tuple[str, str], str]:
    """The answers of a run by task and unique name of the sample; none for a baseline file."""
    by_sample: dict[tuple[str, str], str] = {}
    for task in run.tasks if run else ():
        names = unique_names(sample.id for sample in task.samples)
        by_sample |= {(task.task, name): s.answer for name, s in zip(names, task.samples, strict=True)}
    return by_sample


def write(path: Path, run: Path) -> Baseline:
    """Write the baseline of a run, one sample per line for readable diffs.

    Raises:
        UserError: as `read`, or `path` is a folder or not writable.
    """
    baseline, _ = read(run)
    data = baseline.model_dump()
    tasks = data.pop("tasks")
    lines = [json.dumps(data, ensure_ascii=False)[:-1] + ', "tasks": [']
    for i, task in enumerate(tasks):
        samples = task.pop("samples")
        lines.append(json.dumps(task, ensure_ascii=False)[:-1] + ', "samples": [')
        rows = [json.dumps(sample, ensure_ascii=False) for sample in samples]
        lines.append(",\n".join(rows))
        lines.append("]}" + ("," if i + 1 < len(tasks) else ""))
    try:
        write_text(path, "\n".join([*lines, "]}"]) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the baseline {path}: {error.strerror}") from None
    return baseline


def _read_file(path: Path) -> Baseline:
    data = read_object(path, "pass a run folder, or create it with --write-baseline")
    if data.get("format") != "lceval-baseline":
        raise UserError(f"{path}: not a baseline; pass a run folder, or a file created with --write-baseline")
    if data.get("format_version") != 1:
        raise UserError(
            f"{path}: format version {data.get('format_version')!r}, expected 1; recreate it with --write-baseline"
        )
    try:
        return Baseline.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}; recreate it with --write-baseline") from None


def _item(sample: Sample, headline: str | None) -> Item:
    """One sample; an error has no values, not even its diagnoses."""
    values = {**sample.metrics, **sample.diagnosis}
    if headline and sample.score is not None:
        values[headline] = sample.score
    return Item(
        id=sample.id,
        cluster=sample.cluster,
        prompt=sample.prompt_hash[:16],
        answer=_digest(sample.answer),
        values={} if sample.status == "error" else values,
    )
