"""`lceval data fetch`: download the files of tasks into a data folder, so that they run offline.

Files of a hub repository are stored in `hub/<owner>/<name>/` of the folder, which lceval.tasks.sources checks first.
They are downloaded to a temporary folder and moved into place, so an interrupted download leaves no partial copy.
"""

from __future__ import annotations

import os
import pkgutil
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from lceval.core.errors import InfrastructureError, UserError
from lceval.data.listing import hub_folder, missing
from lceval.tasks import catalogue, sources
from lceval.tasks.catalogue import Dataset

_REVISION = ".lceval-revision"
"""File in a fetched copy with its commit. A copy provided by the user has none and is never replaced."""


@dataclass(frozen=True)
class FetchResult:
    """Result of fetching a dataset; `provide`: the files are not on the hub and have to be provided by the user."""

    dataset: str
    status: Literal["shipped", "there", "fetched", "provide"]
    detail: str

    def __str__(self) -> str:
        return f"{self.dataset}: {self.detail}"


def fetch(names: Sequence[str], to: Path | None = None) -> Iterator[FetchResult]:
    """Fetch the missing files of each dataset.

    Args:
        names: Names of datasets, tasks or groups.
        to: Data folder; None for LCEVAL_DATA.

    Raises:
        UserError: An unknown name, or no folder.
        InfrastructureError: The network or the disk failed; datasets fetched before are kept.
    """
    selected = {dataset.dataset: dataset for name in names for dataset in _datasets(name)}
    root = to.expanduser() if to is not None else sources.data_folder()
    if root is None:
        raise UserError(f"no folder to fetch into: set {sources.DATA_VARIABLE} or pass --to FOLDER.")
    # A generator expression, so that names are validated before anything is downloaded.
    return (_fetched(dataset, root) for dataset in selected.values())


def _datasets(name: str) -> list[Dataset]:
    if name in catalogue.datasets():
        return [catalogue.datasets()[name]]
    if name in catalogue.tasks():
        return [catalogue.tasks()[name].dataset]
    if name in catalogue.groups():
        return [dataset for member in catalogue.groups()[name] for dataset in _datasets(member)]
    nearest = get_close_matches(name, [*catalogue.datasets(), *catalogue.tasks(), *catalogue.groups()], n=3)
    hint = f"did you mean {' '.join(nearest)}?" if nearest else "see `lceval data list`"
    raise UserError(f"unknown dataset {name!r}; {hint}")


def _fetched(dataset: Dataset, root: Path) -> FetchResult:
    name, absent = dataset.dataset, missing(dataset, root)
    if not dataset.files and dataset.hub is None:
        return FetchResult(name, "shipped", "shipped with the package")
    if not absent and not _outdated(dataset, root):
        return FetchResult(name, "there", f"already in {root}")
    if dataset.hub is None and not dataset.fetch:
        return FetchResult(name, "provide", f"not on the hub in this format: copy {' and '.join(absent)} into {root}")
    try:
        detail = _from_elsewhere(dataset, root) if dataset.fetch else _from_hub(dataset, root)
    except OSError as error:
        raise InfrastructureError(f"cannot fetch {name} into {root} ({_reason(error)})") from error
    if absent := missing(dataset, root):
        raise InfrastructureError(f"fetched {name}, but {' and '.join(absent)} is still missing in {root}")
    return FetchResult(name, "fetched", detail)


def _outdated(dataset: Dataset, root: Path) -> bool:
    """Whether the copy that would be used is of another commit, from an earlier fetch."""
    if dataset.hub is None or (dataset.files and all((root / file).is_file() for file in dataset.files)):
        return False
    marker = hub_folder(dataset, root) / _REVISION
    return marker.is_file() and marker.read_text(encoding="utf-8").strip() != dataset.hub.revision


def _from_elsewhere(dataset: Dataset, root: Path) -> str:
    function: Callable[[Dataset, Path], None] = pkgutil.resolve_name(dataset.fetch)
    root.mkdir(parents=True, exist_ok=True)
    function(dataset, root)
    return f"fetched into {root}"


def _from_hub(dataset: Dataset, root: Path) -> str:
    import huggingface_hub

    assert dataset.hub is not None
    hub, folder = dataset.hub, hub_folder(dataset, root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Always an empty folder: offline, the hub's client takes any files in it for the data.
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
        except Exception as error:  # from the hub, its HTTP client or the disk: no common base class
            raise InfrastructureError(
                f"cannot fetch {dataset.dataset} from {hub.repo} on the hub ({_reason(error)}): connect to the "
                f"network, or copy {' and '.join(hub.files.values())} into {folder} from another machine."
            ) from error
        if absent := [pattern for pattern in hub.files.values() if not any(part.glob(pattern))]:
            raise InfrastructureError(f"{hub.repo} at {hub.revision} has no {' and no '.join(absent)}.")
        shutil.rmtree(part / ".cache", ignore_errors=True)  # the client's metadata
        (part / _REVISION).write_text(hub.revision, encoding="utf-8")
        if folder.exists():
            if not _outdated(dataset, root):
                _keep_other_files(folder, part)
            # A folder cannot be replaced atomically; between these two steps there is none, never a partial one.
            folder.rename(Path(scratch) / "old")
        part.rename(folder)
    return f"fetched {hub.repo} at {hub.revision[:12]} into {folder}"


def _keep_other_files(folder: Path, part: Path) -> None:
    """Link the files of other datasets from the replaced copy into the new one."""
    for file in folder.rglob("*"):
        target = part / file.relative_to(folder)
        if file.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # no hard links on this file system
                shutil.copy2(file, target)


def _reason(error: BaseException) -> str:
    """First line of an error, at most 120 characters."""
    first = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
    return f"{first:.120}"
