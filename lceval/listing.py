"""`lceval tasks` and `lceval data list`: what can be run, and whether its data is at hand.

Reads the catalogue and looks for files; imports neither torch nor lm_eval, so it answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lceval.errors import UserError
from lceval.tasks import catalogue, sources
from lceval.tasks.catalogue import Dataset, Task

_CLIP = 24
_NAMES = (
    "A task is lc_<dataset>_<mode>_<length>, e.g. lc_filings_ao_2k, or lc_<dataset>_<mode> without a length; "
    "`lceval tasks PATTERN` lists them by name, `lceval tasks --groups` the groups."
)


def hub_folder(dataset: Dataset, root: Path) -> Path:
    """Where a data folder keeps the files of a dataset's hub repository."""
    assert dataset.hub is not None, dataset.dataset
    return root / "hub" / dataset.hub.repo


def missing(dataset: Dataset, root: Path | None) -> list[str]:
    """The files that a dataset wants and a data folder has not; patterns stand for at least one file.

    A dataset that has both a local form and a hub repository needs one of them.
    """
    local = [name for name in dataset.files if root is None or not (root / name).is_file()]
    if dataset.hub is None or (dataset.files and not local):
        return local
    folder = hub_folder(dataset, root) if root is not None else None
    absent = [of for of in dataset.hub.files.values() if folder is None or not any(folder.glob(of))]
    return [f"hub/{dataset.hub.repo}/{pattern}" for pattern in absent]


def source(dataset: Dataset) -> str:
    """Where its questions come from."""
    if dataset.hub is not None:
        return f"hub {dataset.hub.repo}"
    if dataset.fetch:
        return "fetched"
    return "local files" if dataset.files else "shipped"


def at_hand(dataset: Dataset) -> bool:
    """Whether it runs without a network: shipped, or its files lie in the data folder."""
    return not missing(dataset, sources.data_folder())


def task_record(task: Task) -> dict[str, Any]:
    """All there is to say of a task."""
    dataset = task.dataset
    return {
        "task": task.name,
        "dataset": dataset.dataset,
        "suite": dataset.suite,
        "mode": task.mode,
        "length_k": task.length_k,
        "contexts": list(dataset.contexts),
        "retrievers": list(dataset.retrievers),
        "rows": dataset.count,
        "source": source(dataset),
        "at_hand": at_hand(dataset),
        "licence": dataset.licence,
        "about": dataset.about,
    }


def tasks(pattern: str = "") -> list[dict[str, Any]]:
    """The tasks whose names match."""
    every = catalogue.tasks()
    return [task_record(every[name]) for name in _matching(pattern, list(every), "task")]


def groups(pattern: str = "") -> list[dict[str, Any]]:
    """The groups whose names match, with their members."""
    every = catalogue.groups()
    return [{"group": name, "members": every[name]} for name in _matching(pattern, list(every), "group")]


def data() -> list[dict[str, Any]]:
    """Where each dataset's files come from, and which are missing."""
    root = sources.data_folder()
    return [
        {
            "dataset": dataset.dataset,
            "suite": dataset.suite,
            "source": source(dataset),
            "revision": dataset.hub.revision if dataset.hub is not None else None,
            "at_hand": not missing(dataset, root),
            "missing": missing(dataset, root),
            "fetch": dataset.hub is not None or bool(dataset.fetch),
            "licence": dataset.licence,
        }
        for dataset in catalogue.datasets().values()
    ]


def _matching(pattern: str, names: Sequence[str], what: str) -> list[str]:
    """The names that a pattern with * ? [ ] matches as a whole, or that a plain one is a part of."""
    whole = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    found = [name for name in names if fnmatchcase(name, whole)]
    if not found:
        near = get_close_matches(pattern, names, n=3)
        raise UserError(
            f"no {what} matches {pattern!r}; {f'did you mean {chr(32).join(near)}?' if near else 'see `lceval tasks`'}"
        )
    return found


def overview() -> str:
    """One line a dataset: what its tasks' names are made of, and whether it can be run here."""
    lines = [
        {
            "suite": dataset.suite,
            "dataset": dataset.dataset,
            "mode": ",".join(dataset.modes),
            "length": f"{','.join(map(str, dataset.lengths))}k" if dataset.lengths else "-",
            "context": ",".join(dataset.contexts),
            "rows": _clipped(dataset.count),
            "source": source(dataset),
            "at hand": "yes" if at_hand(dataset) else "no",
            "licence": _clipped(dataset.licence),
        }
        for dataset in catalogue.datasets().values()
    ]
    return f"{_columns(lines)}\n\n{_NAMES}"


def named(pattern: str) -> str:
    """One line a task."""
    shown = []
    for record in tasks(pattern):
        line = {
            "task": record["task"],
            "context": ",".join(record["contexts"]),
            "retriever": ",".join(record["retrievers"]) or "-",
            "rows": record["rows"],
            "source": record["source"],
            "at hand": "yes" if record["at_hand"] else "no",
            "licence": record["licence"],
        }
        shown.append(line)
    return _columns(shown)


def groups_text(pattern: str = "") -> str:
    """One line a group."""
    return _columns([{"group": of["group"], "members": " ".join(of["members"])} for of in groups(pattern)])


def data_text() -> str:
    """One line a dataset: at hand or not, and what to do where not."""
    lines = [
        {
            "dataset": of["dataset"],
            "source": of["source"],
            "at hand": "yes" if of["at_hand"] else "no",
            "licence": of["licence"],
            "missing": _remedy(of),
        }
        for of in data()
    ]
    root = sources.data_folder()
    where = f"{sources.DATA_VARIABLE}={root}" if root is not None else f"{sources.DATA_VARIABLE} is not set"
    return f"{_columns(lines)}\n\n{where}"


def _remedy(record: Mapping[str, Any]) -> str:
    if record["at_hand"]:
        return ""
    if record["fetch"]:
        return f"lceval data fetch {record['dataset']}"
    return f"provide {', '.join(record['missing'])}"


def _clipped(text: str) -> str:
    """Words that fit a column of the overview; a task's own line has all of them."""
    return text if len(text) <= _CLIP else f"{text[: _CLIP - 1].rstrip(' ,;')}…"


def _columns(lines: Sequence[Mapping[str, str]]) -> str:
    """Aligned lines under their headings."""
    rows = [{heading: heading.upper() for heading in lines[0]}, *lines]
    widths = {heading: max(len(row[heading]) for row in rows) for heading in lines[0]}
    return "\n".join("  ".join(f"{text:<{widths[key]}}" for key, text in row.items()).rstrip() for row in rows)
