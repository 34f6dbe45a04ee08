"""Download the files of HELMET from the single archive on the hub.

The archive is 11 GB (34 GB unpacked) and has no random access: it is streamed, only the required files are written, and
the download stops after the last of them.
"""

import shutil
import tarfile
from collections.abc import Set
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lceval.core.errors import InfrastructureError
from lceval.core.io import replacing
from lceval.tasks.catalogue import Dataset

ARCHIVE = "data.tar.gz"
_BLOCK_BYTES = 1 << 25  # per request to the hub; each request is retried separately


def fetch(dataset: Dataset, folder: Path) -> None:
    """Download the missing files of a dataset into a data folder.

    Raises:
        InfrastructureError: The hub or the archive cannot be read, or the archive lacks a file.
    """
    from huggingface_hub import HfFileSystem

    hub = dataset.hub
    assert hub is not None, dataset.dataset
    into = folder / "hub" / hub.repo
    required = {name for name in hub.files.values() if not (into / name).is_file()}
    if not required:
        return
    try:
        source = HfFileSystem().open(
            f"datasets/{hub.repo}/{ARCHIVE}", "rb", revision=hub.revision, block_size=_BLOCK_BYTES
        )
        with source:
            extracted = fetch_members(source, required, into)
    except Exception as error:  # from the hub, its HTTP client, the archive or the disk: no common base class
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise InfrastructureError(
            f"cannot fetch the files of {dataset.dataset} from {ARCHIVE} of {hub.repo} ({reason:.120}): retry with a "
            f"network connection, or unpack the archive into {into}."
        ) from error
    if absent := sorted(required - extracted):
        raise InfrastructureError(f"{ARCHIVE} of {hub.repo} at {hub.revision} does not contain {' and '.join(absent)}.")


def fetch_members(source: BinaryIO, required: Set[str], into: Path) -> set[str]:
    """Extract members of a gzipped tar stream, and stop reading once all are extracted.

    Args:
        source: The archive, read once from its beginning; it need not be seekable.
        required: Names of regular files, with `/`; other members are skipped.
        into: Target folder. Files are written atomically.

    Returns:
        The names of the extracted files.

    Raises:
        ValueError: A name outside of the folder.
        tarfile.TarError, EOFError, OSError: A damaged or truncated archive, or a full disk; earlier files are kept.
    """
    unsafe = [name for name in required if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if unsafe:
        raise ValueError(f"{unsafe[0]!r} is outside of the folder")
    extracted: set[str] = set()
    if not required:
        return extracted
    with tarfile.open(fileobj=source, mode="r|gz", bufsize=1 << 20) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if name not in required or name in extracted or not member.isreg():
                continue
            content = archive.extractfile(member)
            assert content is not None, name
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            with content, replacing(into / name) as target:
                shutil.copyfileobj(content, target, 1 << 20)
            extracted.add(name)
            if extracted == required:
                break
    return extracted
