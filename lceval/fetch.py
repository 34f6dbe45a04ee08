"""`lceval data fetch`: fills a data folder with the files that tasks read, so that they run without a network.

Files of a hub repository go to `hub/<owner>/<name>/` of the folder, where lceval.tasks.sources looks first. They are
downloaded beside it and put in place in one move, so what lies there is whole, whenever a download was cut off.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from lceval.errors import InfrastructureError, UserError
from lceval.listing import hub_folder, missing
from lceval.tasks import catalogue, sources
from lceval.tasks.catalogue import Dataset

_REVISION = ".lceval-revision"
"""In a copy that was fetched: the commit it is of. A copy that somebody provided has none and is left as it is."""


@dataclass(frozen=True)
class Outcome:
    """What was done for a dataset; `provide`: nothing can be done here, somebody has to bring the files."""

    dataset: str
    status: Literal["shipped", "there", "fetched", "provide"]
    detail: str

    def __str__(self) -> str:
        return f"{self.dataset}: {self.detail}"


def fetch(names: Sequence[str], to: Path | None = None) -> Iterator[Outcome]:
    """Fetch what is not there yet, dataset by dataset.

    Args:
        names: Datasets; a task's or a group's name stands for its datasets.
        to: The data folder; LCEVAL_DATA where it is None.

    Raises:
        UserError: A name that does not exist, or no folder.
        InfrastructureError: The network or the disk failed; what was fetched before stays.
    """
    wanted = {of.dataset: of for name in names for of in _datasets(name)}
    root = to.expanduser() if to is not None else sources.data_folder()
    if root is None:
        raise UserError(f"no folder to fetch into: set {sources.DATA_VARIABLE} or pass --to FOLDER.")
    # The names are judged before anything is downloaded, hence the generator inside.
    return (_fetched(dataset, root) for dataset in wanted.values())


def _datasets(name: str) -> list[Dataset]:
    if name in catalogue.datasets():
        return [catalogue.datasets()[name]]
    if name in catalogue.tasks():
        return [catalogue.tasks()[name].dataset]
    if name in catalogue.groups():
        return [dataset for member in catalogue.groups()[name] for dataset in _datasets(member)]
    near = get_close_matches(name, [*catalogue.datasets(), *catalogue.tasks(), *catalogue.groups()], n=3)
    raise UserError(
        f"unknown dataset {name!r}; {f'did you mean {chr(32).join(near)}?' if near else 'see `lceval data list`'}"
    )


def _fetched(dataset: Dataset, root: Path) -> Outcome:
    name, absent = dataset.dataset, missing(dataset, root)
    if not dataset.files and dataset.hub is None:
        return Outcome(name, "shipped", "ships with the package, nothing to fetch")
    if not absent and not _outdated(dataset, root):
        return Outcome(name, "there", f"there already, in {root}")
    if dataset.hub is None and not dataset.fetch:
        return Outcome(name, "provide", f"not on the hub in this form: put {' and '.join(absent)} into {root}")
    try:
        detail = _from_elsewhere(dataset, root) if dataset.fetch else _from_hub(dataset, root)
    except OSError as error:
        raise InfrastructureError(f"cannot fetch {name} into {root} ({_reason(error)})") from error
    if absent := missing(dataset, root):
        raise InfrastructureError(f"fetched {name}, and {' and '.join(absent)} is still not in {root}")
    return Outcome(name, "fetched", detail)


def _outdated(dataset: Dataset, root: Path) -> bool:
    """Whether an earlier fetch left the files of another commit, and those are what would be read."""
    if dataset.hub is None or (dataset.files and all((root / file).is_file() for file in dataset.files)):
        return False
    marker = hub_folder(dataset, root) / _REVISION
    return marker.is_file() and marker.read_text(encoding="utf-8").strip() != dataset.hub.revision


def _from_elsewhere(dataset: Dataset, root: Path) -> str:
    module, _, name = dataset.fetch.rpartition(".")
    function: Callable[[Dataset, Path], None] = getattr(importlib.import_module(module), name)
    root.mkdir(parents=True, exist_ok=True)
    function(dataset, root)
    return f"fetched into {root}"


def _from_hub(dataset: Dataset, root: Path) -> str:
    import huggingface_hub

    assert dataset.hub is not None
    hub, folder = dataset.hub, hub_folder(dataset, root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A new folder each time: given one that holds something, the hub's client takes it for the data when it is offline.
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-", suffix=".part", ignore_cleanup_errors=True
    ) as scratch:
        part = Path(scratch) / "new"
        part.mkdir()
        try:
            huggingface_hub.snapshot_download(
                repo_id=hub.repo,
                repo_type="dataset",
                revision=hub.revision,
                allow_patterns=list(hub.files.values()),
                local_dir=part,
            )
        except Exception as error:  # of the hub, of its HTTP client, of the disk: they share no base
            raise InfrastructureError(
                f"cannot fetch {dataset.dataset} from {hub.repo} on the hub ({_reason(error)}): connect, or bring "
                f"{' and '.join(hub.files.values())} to {folder} from a machine that is connected."
            ) from error
        if absent := [pattern for pattern in hub.files.values() if not any(part.glob(pattern))]:
            raise InfrastructureError(f"{hub.repo} at {hub.revision} has no {' and no '.join(absent)} to fetch.")
        shutil.rmtree(part / ".cache", ignore_errors=True)  # the client's own notes
        (part / _REVISION).write_text(hub.revision, encoding="utf-8")
        if folder.exists():
            if not _outdated(dataset, root):
                _keep(folder, part)
            # A folder cannot be replaced in one step; between these two there is none, never half of one.
            folder.rename(Path(scratch) / "old")
        part.rename(folder)
    return f"fetched {hub.repo} at {hub.revision[:12]} into {folder}"


def _keep(folder: Path, part: Path) -> None:
    """Give a new copy the files of other datasets that lie in the one it replaces."""
    for file in folder.rglob("*"):
        target = part / file.relative_to(folder)
        if file.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # a file system without links
                shutil.copy2(file, target)


def _reason(error: BaseException) -> str:
    """The first line of an error, short enough for a line."""
    first = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
    return f"{first:.120}"
