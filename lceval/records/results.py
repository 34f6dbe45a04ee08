"""Reads the results of an evaluation: a lceval run folder or any `lm_eval --output_path` folder.

lm-eval writes `results_<date>.json` and, with --log_samples, one `samples_<task>_<date>.jsonl` per task, all
with the same date. A lceval run folder contains them directly, beside `run.json`; plain lm-eval puts them in
a sub-folder named after the model, and a second evaluation adds a second set. A folder of run folders (a
sweep) stands for all its runs. Scores come from the samples, never from lm-eval's aggregates, because an
interval needs every sample with its cluster.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lceval.core.answers import DIAGNOSES
from lceval.core.errors import UserError
from lceval.core.io import read_object, read_objects
from lceval.core.paths import not_a_link, plain_name

# lm-eval logs these among the metrics; none of them is a score. `bypass` is that of --predict_only.
TELEMETRY = frozenset({"kv_bytes", "kv_bytes_full", "kv", "bypass", *DIAGNOSES})
# What lm-eval's ruler counts: the share of the references that are in the output.
RULER_METRIC = "string_match"
LARGEST = 1e100
"""Largest size of a number that counts: the sums of squares of those below it are finite."""
LEVELS = 2
"""Maximum depth of runs in a folder of runs: `sweep/run` or `sweep/group/run`."""


@dataclass(frozen=True)
class Sample:
    """One answer with its score and cost.

    score: the headline metric (of repeats its mean), or None where it is missing, not finite, or the sample ended in an
        error.
    cluster: the context's name; a sample without one is a cluster by itself.
    kv_bytes, kv_bytes_full: None without telemetry.
    status: "ok", "truncated", "error", or the status in the `kv` telemetry.
    diagnosis: the measured values of DIAGNOSES.
    answer: the scored response: a text, or JSON with one log-likelihood per choice.
    prompt_hash: lm-eval's digest of the prompt; empty where there is none.
    metrics: every numeric per-sample metric except telemetry; empty for an error.
    unjudged: whether a judge metric is missing; None where the task logs none (an error needs no judge).
    verdict: the verdict of the run's judge; empty without one.
    uncompressed: whether the row's context was not found in its prompt, so that no KV recipe could compress it.
    """

    id: str
    cluster: str
    score: float | None
    kv_bytes: int | None
    kv_bytes_full: int | None
    kv: Mapping[str, Any]
    status: str
    diagnosis: Mapping[str, float] = field(default_factory=dict)
    answer: str = ""
    prompt_hash: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    unjudged: bool | None = None
    verdict: Mapping[str, Any] = field(default_factory=dict)
    uncompressed: bool = False


@dataclass(frozen=True)
class TaskResult:
    """The samples of one task, scored by its headline metric.

    headline: None if the task has no numeric per-sample metric (only a corpus metric such as BLEU, or --predict_only).
    filters: the lm-eval filters, in order; scores are those of the first.
    expected: number of samples according to lm-eval; None where it is not recorded.
    context: the context setting in the rows of lceval tasks; None for other tasks.
    file: the samples file with all prompts and responses; None before it exists.
    lower_is_better: metrics for which lower is better.
    sources: data sources named in the rows.
    samples: empty only in an unfinished run that has not written this task yet.
    """

    task: str
    version: str | None = None
    headline: str | None = None
    higher_is_better: bool = True
    filters: tuple[str, ...] = ()
    expected: int | None = None
    context: str | None = None
    file: Path | None = None
    samples: tuple[Sample, ...] = ()
    lower_is_better: frozenset[str] = frozenset()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One evaluation: one results file with its samples.

    model: the lm-eval model type (`lcft`, `hf`, ...); `pretrained` and `peft` are the weights it loaded.
    config: run.json merged over the `config` of the results file and its `chat_template_sha`.
    """

    path: Path
    label: str
    model: str
    pretrained: str | None
    peft: str | None
    recipe: str
    finished: bool
    config: Mapping[str, Any]
    tasks: tuple[TaskResult, ...]


def read_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """All runs in the folders, in order; runs of the same name are prefixed with their parent folder's name.

    Raises:
        UserError: As `read_folder`.
    """
    runs = [(path, run) for path in paths for run in read_folder(path)]
    seen = Counter(run.label for _, run in runs)
    return tuple(
        replace(run, label=f"{_above(path, run)}/{run.label}") if seen[run.label] > 1 else run for path, run in runs
    )


def _above(path: Path, run: Run) -> str:
    """The folder name that distinguishes a run from one with the same label elsewhere."""
    return path.resolve().name if run.path != path else path.resolve().parent.name


def read_folder(path: Path) -> tuple[Run, ...]:
    """The run of a lceval run folder, one run per results file of a plain lm-eval folder, or all in a folder of runs.

    Plain lm-eval runs are labelled with their sub-folder and date where the folder name is ambiguous. Runs in a folder
    of runs are labelled with their relative path, sorted; folders without runs are skipped.

    Raises:
        UserError: No such folder, no results, no samples, or a malformed file.
    """
    if not os.path.isdir(path):
        problem = "not a folder" if os.path.exists(path) else "no such folder"
        raise UserError(f"{path}: {problem}; pass a run folder or the --output_path of an evaluation")
    if _is_one(path):
        return _read_one(path, path.resolve().name)
    below = list(_run_folders(path, LEVELS))
    if not below:
        raise UserError(
            f"{path}: no results_*.json inside; pass the output folder of an evaluation, or a folder of these"
        )
    return tuple(run for folder in below for run in _read_one(folder, folder.relative_to(path).as_posix()))


def _folders(path: Path) -> list[Path]:
    return [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]


def _is_one(path: Path) -> bool:
    """Whether a folder is one evaluation's output: a run folder, or one with results in it or one level below."""
    if (path / "run.json").is_file() or _results_files(path):
        return True
    inside = _folders(path)
    # A folder with results and run folders one level below is a folder of runs.
    return any(_results_files(folder) for folder in inside) and not any(
        (folder / "run.json").is_file() or (not _results_files(folder) and _is_one(folder)) for folder in inside
    )


def _run_folders(path: Path, levels: int) -> Iterator[Path]:
    """The run folders below; folders inside a run are not searched."""
    for folder in _folders(path):
        if _is_one(folder):
            yield folder
        elif levels > 1:
            yield from _run_folders(folder, levels - 1)


def _read_one(path: Path, label: str) -> tuple[Run, ...]:
    """The runs of a folder for which `_is_one` is true; with run.json only the newest, which may be unfinished."""
    files = _results_files(path)
    if (path / "run.json").is_file():
        run_json = _read_json(path / "run.json")
        if not files and run_json.get("status") == "finished":
            raise UserError(f"{path}: the status in run.json is finished, but there is no results_*.json; run it again")
        return (_assemble(path, label, files[-1] if files else None, run_json),)
    files = files or [file for folder in _folders(path) for file in _results_files(folder)]
    per_folder = Counter(file.parent for file in files)
    runs = []
    for file in files:
        name = label
        if len(per_folder) > 1:
            name += f"/{file.parent.name}"
        if per_folder[file.parent] > 1:
            name += f"@{_date(file)}"
        runs.append(_assemble(path, name, file, run_json={}))
    return tuple(runs)


def _assemble(path: Path, label: str, results_file: Path | None, run_json: Mapping[str, Any]) -> Run:
    """One Run from one results file, its samples files and run.json (empty for plain lm-eval)."""
    finished = not run_json or run_json.get("status") == "finished"
    results = _read_json(results_file) if results_file else {}
    # lm-eval stores the template hash beside its configuration.
    template = {"chat_template_sha": results.get("chat_template_sha")} if results else {}
    config = {**_mapping(results.get("config")), **template, **run_json}
    model = str(config.get("model", "-"))
    arguments = config["model_args"] = model_args(config.get("model_args"))
    recipe = config.get("recipe") or arguments.get("kv") or ("full" if model == "lcft" else "-")
    if results_file:
        tasks = tuple(_read_tasks(results_file, results, finished))
    else:
        names = run_json.get("tasks")
        tasks = tuple(TaskResult(str(task)) for task in (names if isinstance(names, list) else []))
    if not tasks:
        raise UserError(f"{path}: no task recorded; pass the folder of an evaluation that has started")
    return Run(
        path=path,
        label=label,
        model=model,
        pretrained=_text(arguments.get("pretrained")),
        peft=_text(arguments.get("peft")),
        recipe=str(recipe),
        finished=finished,
        config=config,
        tasks=tasks,
    )


def _read_tasks(results_file: Path, results: Mapping[str, Any], finished: bool) -> Iterator[TaskResult]:
    """The tasks of a results file, in run order; each requires its samples file."""
    configs = _mapping(results.get("configs"))
    for task in dict.fromkeys((*_mapping(results.get("n-samples")), *configs)):
        name = f"samples_{plain_name(task, f'{results_file}: task')}_{_date(results_file)}.jsonl"
        file = not_a_link(results_file.parent / name)
        if os.path.isfile(file):  # Path.is_file raises for a name that is too long
            yield _read_task(task, file, results)
        elif finished:
            raise UserError(f"{results_file}: no samples of task {task} beside it; run with --log_samples")
        else:
            yield TaskResult(task)


def _read_task(task: str, file: Path, results: Mapping[str, Any]) -> TaskResult:
    """One task's samples; of several filters, the first is used."""
    config = _mapping(_mapping(results.get("configs")).get(task))
    filters: dict[str, None] = {}
    rows = []
    for _, row in read_objects(file):
        name = str(row.get("filter", "none"))
        filters[name] = None
        if name == next(iter(filters)):
            rows.append(_without_lengths(row))
    if not rows:
        raise UserError(f"{file}: no samples inside; run the task again with --log_samples")
    headline = _headline(config, rows)
    better = _mapping(_mapping(results.get("higher_is_better")).get(task))
    version = _mapping(results.get("versions")).get(task)
    expected = _mapping(_mapping(results.get("n-samples")).get(task)).get("effective")
    return TaskResult(
        task=task,
        version=None if version is None else str(version),
        headline=headline,
        higher_is_better=better.get(headline or "") is not False,
        filters=tuple(filters),
        expected=expected if isinstance(expected, int) else None,
        context=_context_setting(_mapping(rows[0].get("doc"))),
        file=file,
        samples=tuple(_sample(row, headline, index) for index, row in enumerate(rows)),
        lower_is_better=frozenset(metric for metric, higher in better.items() if higher is False),
        sources=tuple(sorted({str(source) for row in rows if (source := _mapping(row.get("doc")).get("source"))})),
    )


def _without_lengths(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of lm-eval's ruler with one metric: it has one for each length, -1 except for the row's own."""
    lengths = [name for name in _list(row.get("metrics")) if isinstance(name, str) and name.isdecimal()]
    if len(lengths) < 2:
        return row
    scores = [score for name in lengths if (score := row.get(name)) != -1]
    rest = {name: value for name, value in row.items() if name not in lengths}
    return {**rest, "metrics": [RULER_METRIC], RULER_METRIC: scores[0] if scores else None}


def _headline(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The headline metric: the declared one, else the first numeric per-sample metric."""
    logged = [metric for row in rows for metric in _list(row.get("metrics"))]
    if logged and all(metric == "bypass" for metric in logged):
        return None
    declared = _mapping(config.get("metadata")).get("headline")
    if isinstance(declared, str):
        return declared
    listed = [entry.get("metric") for entry in _list(config.get("metric_list")) if isinstance(entry, dict)]
    for metric in dict.fromkeys(metric for metric in [*listed, *logged] if isinstance(metric, str)):
        if metric not in TELEMETRY and any(isinstance(row.get(metric), int | float) for row in rows):
            return metric
    return None


def _sample(row: Mapping[str, Any], headline: str | None, index: int) -> Sample:
    """One line of a samples file; `index` identifies samples without an id. Of repeats the mean counts."""
    means = {name: _mean_of(values) for name, values in _mapping(row.get("repeats")).items()}
    row = {**row, **{name: mean for name, mean in means.items() if mean is not None}}
    doc = _mapping(row.get("doc"))
    kv = _mapping(row.get("kv"))
    name, cluster = doc.get("id"), doc.get("cluster")
    score = number(row.get(headline)) if headline else None
    status = str(kv.get("status", "ok"))
    if status == "error" or (headline and score is None):
        score, status = None, "error"
    elif status == "ok" and kv.get("truncated"):
        status = "truncated"
    return Sample(
        id=str(row.get("doc_id", index) if name is None else name),
        cluster=cluster if isinstance(cluster, str) and cluster else f"sample {index}",
        score=score,
        kv_bytes=_count(row.get("kv_bytes")),
        kv_bytes_full=_count(row.get("kv_bytes_full")),
        kv=kv,
        status=status,
        diagnosis=_numbers(row, DIAGNOSES),
        answer=_answer(row.get("filtered_resps")),
        prompt_hash=str(row.get("prompt_hash") or ""),
        metrics={} if status == "error" else _numbers(row, _logged(row)),
        unjudged=_unjudged(row, status),
        verdict=_mapping(row.get("verdict")),
        # Rows with context=none have an empty context, and nothing to find.
        uncompressed=kv.get("boundary") is False and doc.get("context") != "",
    )


def _logged(row: Mapping[str, Any]) -> list[str]:
    return [name for name in _list(row.get("metrics")) if isinstance(name, str) and name not in TELEMETRY]


def _numbers(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    return {name: value for name in names if (value := number(row.get(name))) is not None}


def _unjudged(row: Mapping[str, Any], status: str) -> bool | None:
    if verdict := _mapping(row.get("verdict")):
        return verdict.get("status") == "unjudged"
    judged = [name for name in _logged(row) if name == "judged" or name.startswith("judge_")]
    return (status != "error" and any(number(row.get(name)) is None for name in judged)) if judged else None


def _answer(responses: object) -> str:
    """The scored response: the generated text, or the log-likelihoods of the choices as JSON."""
    if not isinstance(responses, list) or not responses:
        return ""
    first = responses[0]
    if isinstance(first, str):
        return first
    return json.dumps([x[0] if isinstance(x, list) and x else x for x in responses], ensure_ascii=False)


def model_args(value: object) -> Mapping[str, Any]:
    """lm-eval's model arguments, logged as a mapping or as the string "a=b,c=d", under their current names."""
    if isinstance(value, str):
        value = {key.strip(): text for key, _, text in (part.partition("=") for part in value.split(","))}
    arguments = {**_mapping(value)}
    if "compress" in arguments:  # versions before 0.2 had `compress=agnostic|aware`
        arguments["query_aware"] = arguments.pop("compress") == "aware"
    return arguments


def _context_setting(doc: Mapping[str, Any]) -> str | None:
    """The context setting of an lceval row; before 0.2 its key was `shown` and its suffix `:alike`."""
    setting = doc.get("context_setting") or doc.get("shown")
    return re.sub(r":alike$", ":length_matched", str(setting)) if setting else None


def _results_files(folder: Path) -> list[Path]:
    """The results files directly inside, oldest first (the ISO dates in their names sort by time)."""
    return sorted(folder.glob("results_*.json"))


def _date(results_file: Path) -> str:
    return results_file.stem.removeprefix("results_")


def _read_json(file: Path) -> Mapping[str, Any]:
    return read_object(not_a_link(file), "run the evaluation again")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def number(value: object) -> float | None:
    """A number up to `LARGEST` in size; None for anything else."""
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST else None


def _mean_of(values: object) -> float | None:
    numbers = [number(value) for value in _list(values)]
    known = [value for value in numbers if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(numbers) else None


def _count(value: object) -> int | None:
    """A whole number from 0, or None."""
    size = number(value)
    return None if size is None or size < 0 else int(size)


def _text(value: object) -> str | None:
    return None if value is None or value == "" else str(value)
