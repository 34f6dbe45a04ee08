"""Fetches the files of HELMET that tasks read out of the one archive in which the hub holds them.

The archive is 11 GB, 34 GB unpacked, and cannot be read but from its beginning: it is streamed, what is wanted is kept,
and the rest is passed over. It ends at the last file that is wanted.
"""

import os
import shutil
import tarfile
import tempfile
from collections.abc import Set
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from lceval.errors import InfrastructureError
from lceval.tasks.catalogue import Dataset

ARCHIVE = "data.tar.gz"
_BLOCK_BYTES = 1 << 25  # of one request to the hub; each is tried again by itself


def fetch(dataset: Dataset, folder: Path) -> None:
    """Put a dataset's files that are not there yet into a data folder.

    Raises:
        InfrastructureError: The hub or the archive cannot be read, or the archive does not hold them.
    """
    from huggingface_hub import HfFileSystem

    hub = dataset.hub
    assert hub is not None, dataset.dataset
    into = folder / "hub" / hub.repo
    wanted = {name for name in hub.files.values() if not (into / name).is_file()}
    if not wanted:
        return
    try:
        source = HfFileSystem().open(
            f"datasets/{hub.repo}/{ARCHIVE}", "rb", revision=hub.revision, block_size=_BLOCK_BYTES
        )
        with source:
            found = fetch_members(source, wanted, into)
    except Exception as error:  # of the hub, of its HTTP client, of the archive, of the disk: they share no base
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise InfrastructureError(
            f"cannot take the files of {dataset.dataset} from {ARCHIVE} of {hub.repo} ({reason:.120}): run it again "
            f"where there is a network, or unpack them yourself into {into}."
        ) from error
    if absent := sorted(wanted - found):
        raise InfrastructureError(f"{ARCHIVE} of {hub.repo} at {hub.revision} does not hold {' and '.join(absent)}.")


def fetch_members(source: BinaryIO, wanted: Set[str], into: Path) -> set[str]:
    """Extract members of a gzipped tar stream, and stop reading as soon as all were found.

    Args:
        source: The archive, read once from its beginning; it need not be seekable.
        wanted: Names of regular files, with `/`; whatever else the archive holds is passed over.
        into: Where they go, under their names. A file appears there whole or not at all.

    Returns:
        The names that were found.

    Raises:
        ValueError: A name that would lead out of the folder.
        tarfile.TarError, EOFError, OSError: A damaged or cut off archive, or a full disk; earlier files stay.
    """
    unsafe = [name for name in wanted if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if unsafe:
        raise ValueError(f"{unsafe[0]!r} leads out of the folder")
    found: set[str] = set()
    if not wanted:
        return found
    with tarfile.open(fileobj=source, mode="r|gz", bufsize=1 << 20) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if name not in wanted or name in found or not member.isreg():
                continue
            content = archive.extractfile(member)
            assert content is not None, name
            with content:
                _write(content, into / name)
            found.add(name)
            if found == wanted:
                break
    return found


def _write(content: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
