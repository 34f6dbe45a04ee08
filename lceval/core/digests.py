"""Digests of what a name of a model, adapter or data file stands for: of its contents, or the commit of the hub."""

from __future__ import annotations

import hashlib
import os
import re
from functools import cache
from pathlib import Path

# Files in a model or adapter folder that do not change outputs: texts about it, and the state of its training.
_UNUSED_FILES = re.compile(
    r"\..*|.*\.md|LICENSE.*|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state.*\.pth|trainer_state\.json|training_args\.bin",
    re.DOTALL,
)
_UNUSED_FOLDERS = re.compile(r"\..*|checkpoints?(-.*)?|__pycache__", re.DOTALL)
_CONFIGURATIONS = ("config.json", "adapter_config.json", "tokenizer_config.json")


def digest_of(name: str, revision: str) -> str | None:
    """The content hash of a local file or folder, else the commit of a hub repository (`hub_commit`)."""
    path = Path(name)
    return content_hash(path) if path.exists() else hub_commit(name, revision)


def content_hash(path: Path) -> str:
    """Hex digest of a file, or of a model or adapter folder: names and contents of all files that change outputs.

    Left out are hidden files, texts (`*.md`), checkpoints, the state of training, and runs and sweeps in sub-folders.
    """
    if path.is_file():
        return _hash_of(path)
    digest = hashlib.sha256()
    for folder, below, files in os.walk(path):
        if Path(folder) != path and {"run.json", "sweep.json"} & {*files}:  # `lceval train eval` has its runs there
            below.clear()
            continue
        below[:] = sorted(name for name in below if not _UNUSED_FOLDERS.fullmatch(name))
        for name in sorted(name for name in files if not _UNUSED_FILES.fullmatch(name)):
            file = Path(folder, name)
            if file.is_file():  # no socket, no dangling link
                digest.update(f"{file.relative_to(path).as_posix()} {_hash_of(file)}\n".encode())
    return digest.hexdigest()


def _hash_of(file: Path) -> str:
    stat = file.stat()
    return _file_hash(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache
def _file_hash(file: Path, *_: int) -> str:
    """Hex digest of a file; cached by size, time and inode, since a sweep needs it for every cell."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hub_commit(name: str, revision: str) -> str | None:
    """The commit of a hub repository; None if neither the hub nor its local cache has it."""
    from huggingface_hub import hf_hub_download

    for file in _CONFIGURATIONS:
        try:
            return Path(hf_hub_download(name, file, revision=revision)).parent.name
        except Exception:  # from the hub or its HTTP client: no common base class
            continue
    return None
