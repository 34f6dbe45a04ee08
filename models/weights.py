"""Weights from safetensors only: other formats are pickles, which can run code when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from lceval.core.errors import UserError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_format(arguments: Mapping[str, Any]) -> None:
    """Check that `pretrained`, `peft` and `delta` have weights in safetensors, before anything of them is loaded.

    Args:
        arguments: of HFLM. A name on the hub that cannot be listed, for want of a connection, is left to `no_pickles`.

    Raises:
        UserError: the only weights of one are pickles.
    """
    for argument in ("pretrained", "peft", "delta"):
        name, of_model = arguments.get(argument), argument == "pretrained"
        if not isinstance(name, str) or (of_model and arguments.get("gguf_file")):
            continue
        files = _files(name, arguments.get("revision"), str(arguments.get("subfolder") or "") if of_model else "")
        pickles = [file for file in files if file.endswith(_PICKLES)]
        if pickles and not any(file.endswith(".safetensors") for file in files):
            raise UserError(_refusal(f"{argument}={name}", pickles[0]))


@contextmanager
def no_pickles(what: str) -> Iterator[None]:
    """Within the block, `torch.load` reads nothing: transformers and peft fall back to it in several ways.

    Raises:
        UserError: in the block, at a file that would be read.
    """
    original = torch.load

    def refuse(file: Any, *_: Any, **__: Any) -> None:
        raise UserError(_refusal(what, str(file)))

    torch.load = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = original


def _refusal(what: str, file: str) -> str:
    return (
        f"{what}: {file} is a pickle, which can run code when it is read: convert it to safetensors, or, if you trust "
        "its source, add allow_pickle=True to --model_args"
    )


def _files(name: str, revision: str | None, subfolder: str) -> list[str]:
    """The names of the files of a folder or hub repository; empty if it cannot be listed."""
    path = Path(name)
    if path.is_file():
        return [path.name]
    if path.is_dir():
        return sorted(file.name for file in (path / subfolder).glob("*"))
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except Exception:  # from the hub or its HTTP client: no common base class
        return []
    return [file for file in files if PurePosixPath(file).parent == PurePosixPath(subfolder)]
