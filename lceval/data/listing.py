"""`lceval tasks` and `lceval data list`: all tasks, and whether their data is available locally.

Reads the catalogue and checks for files; imports neither torch nor lm_eval, so it is fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lceval.core.errors import UserError
from lceval.core.text_tables import aligned
from lceval.tasks import catalogue, sources
from lceval.tasks.catalogue import Dataset

_CLIP = 24
_NAMES = (
    "A task is lc_<dataset>_<mode>_<length>, e.g. lc_filings_ao_2k, or lc_<dataset>_<mode> without a length; "
    "`lceval tasks PATTERN` lists tasks by name, `lceval tasks --groups` lists groups."
)


def hub_folder(dataset: Dataset, root: Path) -> Path:
    """Path of a dataset's hub repository in a data folder."""
    assert dataset.hub is not None, dataset.dataset
    return root / "hub" / dataset.hub.repo


def missing(dataset: Dataset, root: Path | None) -> list[str]:
    """Files of a dataset that are not in a data folder; a pattern is present if at least one file matches.

    A dataset with both local files and a hub repository requires one of them.
    """
    local = [name for name in dataset.files if root is None or not (root / name).is_file()]
    if dataset.hub is None or (dataset.files and not local):
        return local
    folder = hub_folder(dataset, root) if root is not None else None
    absent = [pattern for pattern in dataset.hub.files.values() if folder is None or not any(folder.glob(pattern))]
    return [f"hub/{dataset.hub.repo}/{pattern}" for pattern in absent]


def source(dataset: Dataset) -> str:
    """Source of the dataset, for tables."""
    if dataset.hub is not None:
        return f"hub {dataset.hub.repo}"
    if dataset.fetch:
        return "fetched"
    return "local files" if dataset.files else "shipped"


def at_hand(dataset: Dataset) -> bool:
    """Whether the dataset is available offline: shipped, or its files are in the data folder."""
    return not missing(dataset, sources.data_folder())


def tasks(pattern: str = "") -> list[dict[str, Any]]:
    """Records of the tasks whose names match."""
    by_name = catalogue.tasks()
    matching = (by_name[name] for name in _matching(pattern, list(by_name), "task"))
    return [
        {
            "task": task.name,
            "dataset": task.dataset.dataset,
            "suite": task.dataset.suite,
            "mode": task.mode,
            "length_k": task.length_k,
            "contexts": list(task.dataset.contexts),
            "retrievers": list(task.dataset.retrievers),
            "rows": task.dataset.count,
            "source": source(task.dataset),
            "at_hand": at_hand(task.dataset),
            "licence": task.dataset.licence,
            "comparable": task.dataset.comparable,
            "about": task.dataset.about,
        }
        for task in matching
    ]


def groups(pattern: str = "") -> list[dict[str, Any]]:
    """Groups whose names match, with their members."""
    by_name = catalogue.groups()
    return [{"group": name, "members": by_name[name]} for name in _matching(pattern, list(by_name), "group")]


def data() -> list[dict[str, Any]]:
    """Source and missing files of each dataset."""
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
    """Names that match a glob pattern, or contain a plain one.

    Raises:
        UserError: no match.
    """
    glob = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    matches = [name for name in names if fnmatchcase(name, glob)]
    if not matches:
        nearest = get_close_matches(pattern, names, n=3)
        hint = f"did you mean {' '.join(nearest)}?" if nearest else "see `lceval tasks`"
        raise UserError(f"no {what} matches {pattern!r}; {hint}")
    return matches


def overview() -> str:
    """Table of datasets: the parts of their task names, and whether they are available."""
    lines = [
        {
            "suite": dataset.suite,
            "dataset": dataset.dataset,
            "mode": ",".join(dataset.modes),
            "length": f"{','.join(map(str, dataset.lengths))}k" if dataset.lengths else "-",
            "context": ",".join(dataset.contexts),
            "rows": _clipped(dataset.count),
            "source": source(dataset),
            "available": "yes" if at_hand(dataset) else "no",
            "licence": _clipped(dataset.licence),
        }
        for dataset in catalogue.datasets().values()
    ]
    return f"{columns(lines)}\n\n{_NAMES}"


def tasks_text(pattern: str) -> str:
    """Table of the matching tasks, one per line."""
    lines = []
    for record in tasks(pattern):
        line = {
            "task": record["task"],
            "context": ",".join(record["contexts"]),
            "retriever": ",".join(record["retrievers"]) or "-",
            "rows": record["rows"],
            "source": record["source"],
            "available": "yes" if record["at_hand"] else "no",
            "licence": record["licence"],
        }
        lines.append(line)
    return columns(lines)


def groups_text(pattern: str = "") -> str:
    """Table of the matching groups, one per line."""
    return columns([{"group": record["group"], "members": " ".join(record["members"])} for record in groups(pattern)])


def data_text() -> str:
    """Table of datasets: available or not, and how to get missing files."""
    lines = [
        {
            "dataset": record["dataset"],
            "source": record["source"],
            "available": "yes" if record["at_hand"] else "no",
            "licence": record["licence"],
            "missing": _remedy(record),
        }
        for record in data()
    ]
    root = sources.data_folder()
    where = f"{sources.DATA_VARIABLE}={root}" if root is not None else f"{sources.DATA_VARIABLE} is not set"
    return f"{columns(lines)}\n\n{where}"


def _remedy(record: Mapping[str, Any]) -> str:
    if record["at_hand"]:
        return ""
    if record["fetch"]:
        return f"lceval data fetch {record['dataset']}"
    return f"provide {', '.join(record['missing'])}"


def _clipped(text: str) -> str:
    """Truncate a cell of the overview; the table of tasks has the full text."""
    return text if len(text) <= _CLIP else f"{text[: _CLIP - 1].rstrip(' ,;')}…"


def columns(lines: Sequence[Mapping[str, str]]) -> str:
    """Aligned columns with headings."""
    rows = [[heading.upper() for heading in lines[0]], *(list(line.values()) for line in lines)]
    return aligned(rows, left=range(len(lines[0])))
