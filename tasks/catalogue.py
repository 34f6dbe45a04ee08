"""Catalogue of tasks: every dataset, crossed with its modes and lengths.

A dataset is described in `<suite>/<name>.yaml` (data only); generation and scoring are configured in
`modes/<output format>.yaml`. A task name is `lc_<dataset>_<mode>_<length>`, or `lc_<dataset>_<mode>` where the source
fixes the length. Tasks have no files of their own: lm_eval_config.py makes their configurations, and
lceval/plugin.py adds them to lm-eval's index.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lceval.core.errors import UserError

FOLDER = Path(__file__).parent
CONTEXTS = ("full", "gold", "none", "rag")
GROUPED_K = 8
"""Maximum length of a suite group's tasks, in thousands of tokens: the packaged model supports 8k."""


@dataclass(frozen=True)
class Hub:
    """Files of a dataset repository on the hub, at a pinned commit.

    Attributes:
        files: split -> file name or glob pattern.
        features: column -> "string", "int64" or "list", for files whose schema `datasets` cannot infer.
    """

    repo: str
    revision: str
    files: Mapping[str, str]
    features: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """A dataset of the catalogue.

    Attributes:
        dataset: name, the third part of task names.
        suite: icr, finance, mc, longdoc or tabular.
        about: one-line description.
        rows: dotted name of the row builder, `(Request) -> RowPlan`.
        version: increased with any change of rows or prompts; `metadata.version` is `<version>.<format version>`.
        layout: layout of the context (prompts.LAYOUTS).
        modes: mode -> output format, a template in `modes/`.
        lengths: in thousands of tokens; empty where the source fixes the length.
        contexts: supported values of `context=` (of CONTEXTS).
        retrievers: supported values of `retriever=`, the default first.
        files: files under LCEVAL_DATA; empty for a shipped or generated dataset.
        hub: hub repository used if the files are missing.
        fetch: dotted name of a function `(dataset, folder)` that downloads the files, for sources that need more than
            a copy of hub files.
        count: number of questions, as text.
        licence: licence of the data.
        comparable: whether scores are comparable with published ones: yes, yes with a setting, or no with the reason.
        truncation: where the benchmark truncates prompts that do not fit (`overlong=`); empty if it does not.
        grouped: whether the suite's group includes it.
        splits: supported values of `split=`, by source document; empty if the dataset cannot be split.
        by_length: metric whose mean over all modes is the score of a length; the dataset then has a group a length.
        per_context: default of `questions=`, the questions per context; 0 if it cannot be set.
        options: further keys of the builder.
    """

    dataset: str
    suite: str
    about: str
    rows: str
    version: int
    layout: str
    modes: Mapping[str, str]
    lengths: tuple[int, ...] = ()
    contexts: tuple[str, ...] = ("full",)
    retrievers: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    hub: Hub | None = None
    fetch: str = ""
    count: str = ""
    licence: str = ""
    comparable: str = ""
    truncation: str = ""
    grouped: bool = True
    splits: tuple[str, ...] = ()
    by_length: str = ""
    per_context: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One task of lm-eval: a dataset in a mode at a length."""

    dataset: Dataset
    mode: str
    length_k: int | None

    @property
    def name(self) -> str:
        return group_name(self.dataset, self.mode) + (f"_{self.length_k}k" if self.length_k else "")

    @property
    def output_format(self) -> str:
        return self.dataset.modes[self.mode]


def group_name(dataset: Dataset, mode: str) -> str:
    """Name of the group of all lengths of a dataset in a mode."""
    return f"lc_{dataset.dataset}_{mode}"


@cache
def datasets() -> dict[str, Dataset]:
    """All datasets by name."""
    by_name: dict[str, Dataset] = {}
    for file in sorted(FOLDER.glob("*/*.yaml")):
        if file.parent.name != "modes":
            dataset = _dataset(yaml.safe_load(file.read_text(encoding="utf-8")))
            assert (dataset.dataset, dataset.suite) == (file.stem, file.parent.name), file
            by_name[dataset.dataset] = dataset
    return by_name


def _dataset(fields: dict[str, Any]) -> Dataset:
    if "hub" in fields:
        fields["hub"] = Hub(**fields["hub"])
    for key in ("lengths", "contexts", "retrievers", "files", "splits"):
        if key in fields:
            fields[key] = tuple(fields[key])
    return Dataset(**fields)


@cache
def tasks() -> dict[str, Task]:
    """All tasks by name."""
    all_tasks = [
        Task(dataset, mode, length)
        for dataset in datasets().values()
        for mode in dataset.modes
        for length in dataset.lengths or (None,)
    ]
    return {task.name: task for task in all_tasks}


def find(name: str) -> Task:
    """Return the task of a name.

    Raises:
        UserError: unknown task.
    """
    from difflib import get_close_matches

    if name in tasks():
        return tasks()[name]
    nearest = get_close_matches(name, tasks(), n=3)
    hint = f"did you mean {' '.join(nearest)}?" if nearest else "see `lceval tasks`"
    raise UserError(f"unknown task {name!r}; {hint}")


@cache
def groups() -> dict[str, list[str]]:
    """Members by group name: a dataset, its lengths in a mode, all modes at a length, suites, and `lc_all`.

    A suite's group has the first mode of each grouped dataset, at lengths that fit an 8k model.
    """
    by_mode: dict[str, list[str]] = {}
    whole: dict[str, list[str]] = {}
    suites: dict[str, list[str]] = {}
    for dataset in datasets().values():
        whole[f"lc_{dataset.dataset}"] = [task.name for task in tasks().values() if task.dataset is dataset]
        for mode in dataset.modes:
            members = [task.name for task in tasks().values() if task.dataset is dataset and task.mode == mode]
            if dataset.lengths:
                by_mode[group_name(dataset, mode)] = members
        if dataset.by_length:
            for k in dataset.lengths:
                by_mode[f"lc_{dataset.dataset}_{k}k"] = [Task(dataset, mode, k).name for mode in dataset.modes]
        if dataset.grouped:
            first = next(iter(dataset.modes))
            short = [Task(dataset, first, k).name for k in dataset.lengths if k <= GROUPED_K]
            suites.setdefault(f"lc_{dataset.suite}", []).extend(short or [group_name(dataset, first)])
    return {**whole, **by_mode, **suites, "lc_all": sorted(suites)}


@cache
def group_metrics() -> dict[str, str]:
    """Group name -> the metric that the group averages over its tasks."""
    return {f"lc_{d.dataset}_{k}k": d.by_length for d in datasets().values() if d.by_length for k in d.lengths}


@cache
def output_format_config(output_format: str) -> dict[str, Any]:
    """Return a template of `modes/` with its includes; functions stay dotted names."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: FunctionName(loader.construct_scalar(node)))  # type: ignore[arg-type]
    config: dict[str, Any] = yaml.load((FOLDER / "modes" / f"{output_format}.yaml").read_text(encoding="utf-8"), Loader)
    base = config.pop("include", None)
    return {**output_format_config(base.removesuffix(".yaml")), **config} if base else config


class FunctionName(str):
    """Dotted name of a function in a template."""


def new_tokens(output_format: str) -> int:
    """Tokens reserved for the reply, counted in the length; 0 if the format's length is that of the prompt alone."""
    config = output_format_config(output_format)
    prompt_only = config["metadata"].get("length_of") == "prompt"
    return 0 if prompt_only else int(config.get("generation_kwargs", {}).get("max_gen_toks", 0))
