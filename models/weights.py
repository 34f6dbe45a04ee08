"""Weights from safetensors only: other formats are pickles, which can run code when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import PreTrainedModel

from lceval.core.errors import UserError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@contextmanager
def only_safetensors(pretrained: str | PreTrainedModel, arguments: dict[str, Any]) -> Iterator[None]:
    """Within the block, HFLM loads weights from safetensors only; its arguments get `use_safetensors`.

    The formats of `pretrained`, `peft` and `delta` are checked first, before anything is loaded. Then `torch.load` is
    refused in the block, because transformers and peft fall back to it in several ways.

    Raises:
        UserError: the weights are a pickle.
    """
    _check_format("pretrained", pretrained, arguments)
    for name in ("peft", "delta"):
        _check_format(name, arguments.get(name), {"revision": arguments.get("revision")})
    if isinstance(pretrained, str) and not (arguments.get("autogptq") or arguments.get("gptqmodel")):
        arguments.setdefault("use_safetensors", True)
    original = torch.load

    def refuse(file: Any, *_: Any, **__: Any) -> None:
        raise UserError(_refusal("the model", str(file)))

    torch.load = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = original


def _check_format(argument: str, name: object, options: Mapping[str, Any]) -> None:
    """Check that the only weights of a folder or hub repository are not pickles."""
    if not isinstance(name, str) or options.get("gguf_file"):
        return
    files = _files(name, options.get("revision"), str(options.get("subfolder") or ""))
    pickles = [file for file in files if file.endswith(_PICKLES)]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise UserError(_refusal(f"{argument}={name}", pickles[0]))


def _refusal(what: str, file: str) -> str:
    return (
        f"{what}: {file} is a pickle, which can run code when it is read: convert it to safetensors, or, if you trust "
        "its source, add allow_pickle=True to --model_args"
    )


def _files(name: str, revision: str | None, subfolder: str) -> list[str]:
    """The names of its files; empty if it is on the hub and cannot be listed, for want of a connection."""
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
