"""Which tasks there are: every dataset's YAML, crossed with its modes and lengths.

A dataset is described once, in `<suite>/<name>.yaml` (data only); what its samples generate and how they are scored
stands in `modes/<form>.yaml`. The names follow from both: `lc_<dataset>_<mode>_<length>`, or `lc_<dataset>_<mode>`
where the source fixes the length. lm-eval's index gets an entry for each (lceval/plugin.py): no name has a file.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lceval.errors import UserError

if TYPE_CHECKING:
    from lceval.tasks.build import Plan, Request

FOLDER = Path(__file__).parent
CONTEXTS = ("full", "gold", "none", "rag")
GROUPED_K = 8
"""Suite groups hold the lengths up to this many thousand tokens, so that they run on the packaged model."""


@dataclass(frozen=True)
class Hub:
    """Files of a dataset repository on the hub, at a commit.

    Attributes:
        files: what to read, by split name; patterns as `datasets` takes them.
        features: for files whose columns `datasets` cannot infer: column -> "string", "int64" or "list".
    """

    repo: str
    revision: str
    files: Mapping[str, str]
    features: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """One source of questions.

    Attributes:
        suite: icr, finance, mc, longdoc or tabular.
        rows: dotted name of the function that plans its rows.
        version: raised with any change of its rows or prompts; `metadata.version` is `<version>.<form's version>`.
        layout: how its context is laid out (prompts.LAYOUTS).
        modes: mode -> form, the template in `modes/`.
        lengths: in thousands of tokens; empty where the source fixes the length.
        contexts: which of CONTEXTS make sense.
        retrievers: what `retriever=` may be.
        files: local files under LCEVAL_DATA, as the builder reads them; empty for a shipped or generated dataset.
        hub: where they come from otherwise.
        fetch: dotted name of a function `(dataset, folder)` that puts `files` into a data folder, for those whose
            source is neither ours nor a hub repository.
        count: questions, as a person would say it.
        grouped: whether the suite's group holds it.
        splits: sides that `split=` may ask for, by source document; empty where the source is not ours to part.
        per_context: questions on a context where `questions=` may ask for another number; 0 where it may not.
        options: further keys for the builder.
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
    grouped: bool = True
    splits: tuple[str, ...] = ()
    per_context: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> "Callable[[Request], Plan]":
        """The function that plans its rows."""
        module, _, name = self.rows.rpartition(".")
        function: Callable[[Request], Plan] = getattr(importlib.import_module(module), name)
        return function


@dataclass(frozen=True)
class Task:
    """One name that lm_eval can run."""

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
    """The name of all lengths of a dataset in a mode."""
    return f"lc_{dataset.dataset}_{mode}"


@cache
def datasets() -> dict[str, Dataset]:
    """Every dataset, by name."""
    found: dict[str, Dataset] = {}
    for file in sorted(FOLDER.glob("*/*.yaml")):
        if file.parent.name != "modes":
            made = _dataset(yaml.safe_load(file.read_text(encoding="utf-8")))
            assert (made.dataset, made.suite) == (file.stem, file.parent.name), file
            found[made.dataset] = made
    return found


def _dataset(said: dict[str, Any]) -> Dataset:
    if "hub" in said:
        said["hub"] = Hub(**said["hub"])
    for key in ("lengths", "contexts", "retrievers", "files", "splits"):
        if key in said:
            said[key] = tuple(said[key])
    return Dataset(**said)


@cache
def tasks() -> dict[str, Task]:
    """Every task, by name."""
    every = [
        Task(dataset, mode, length)
        for dataset in datasets().values()
        for mode in dataset.modes
        for length in dataset.lengths or (None,)
    ]
    return {task.name: task for task in every}


def find(name: str) -> Task:
    """The task of a name.

    Raises:
        UserError: there is none.
    """
    from difflib import get_close_matches

    if name in tasks():
        return tasks()[name]
    near = get_close_matches(name, tasks(), n=3)
    raise UserError(f"unknown task {name!r}; {f'did you mean {chr(32).join(near)}?' if near else 'see `lceval tasks`'}")


@cache
def groups() -> dict[str, list[str]]:
    """Members by group name: all lengths of a dataset in a mode, suites, everything.

    A suite's group holds the first mode of each dataset that belongs in it, at lengths that an 8k model can read.
    """
    found: dict[str, list[str]] = {}
    suites: dict[str, list[str]] = {}
    for dataset in datasets().values():
        for mode in dataset.modes:
            members = [task.name for task in tasks().values() if task.dataset is dataset and task.mode == mode]
            if dataset.lengths:
                found[group_name(dataset, mode)] = members
        if dataset.grouped:
            first = next(iter(dataset.modes))
            short = [Task(dataset, first, k).name for k in dataset.lengths if k <= GROUPED_K]
            suites.setdefault(f"lc_{dataset.suite}", []).extend(short or [group_name(dataset, first)])
    return {**found, **suites, "lc_all": sorted(suites)}


@cache
def output_format_config(output_format: str) -> dict[str, Any]:
    """A template of `modes/` with its includes, functions left as their dotted names."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: _Function(loader.construct_scalar(node)))  # type: ignore[arg-type]
    said: dict[str, Any] = yaml.load((FOLDER / "modes" / f"{output_format}.yaml").read_text(encoding="utf-8"), Loader)
    included = said.pop("include", None)
    return {**output_format_config(included.removesuffix(".yaml")), **said} if included else said


class _Function(str):
    """The dotted name of a function that a template names."""


_METRIC = {"aggregation": "mean", "higher_is_better": True}  # of a template's metric, unless it says otherwise


def _resolved(value: Any) -> Any:
    if isinstance(value, _Function):
        module, _, name = value.rpartition(".")
        return getattr(importlib.import_module(module), name)
    if isinstance(value, dict):
        return {key: _resolved(item) for key, item in value.items()}
    return [_resolved(item) for item in value] if isinstance(value, list) else value


def new_tokens(output_format: str) -> int:
    """Room for the reply; part of the length contract. 0 for forms whose promise is the prompt alone."""
    config = output_format_config(output_format)
    alone = config["metadata"].get("length_of") == "prompt"
    return 0 if alone else int(config.get("generation_kwargs", {}).get("max_gen_toks", 0))


def task_config(task: Task) -> dict[str, Any]:
    """lm-eval's configuration of a task."""
    config: dict[str, Any] = _resolved(output_format_config(task.output_format))
    metadata = config["metadata"]
    metrics = [*config["metric_list"], *_resolved(output_format_config("_telemetry"))["metric_list"]]
    return {
        **config,
        "metric_list": [{**_METRIC, **metric} for metric in metrics],
        "task": task.name,
        "custom_dataset": _custom_dataset,
        "dataset_kwargs": {"lc_task": task.name},
        "metadata": {**metadata, "version": f"{task.dataset.version}.{metadata['version']}"},
    }


def _custom_dataset(**metadata: Any) -> Any:
    from lceval.tasks.build import dataset

    return dataset(**metadata)


def group_config(name: str) -> dict[str, Any]:
    """lm-eval's configuration of a group."""
    return {"group": name, "task": list(groups()[name]), "metadata": {"version": "1"}}
