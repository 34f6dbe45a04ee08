"""Errors while a model is loaded, as one line that names the argument and what is wrong with it."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lceval.core.errors import InfrastructureError, LcevalError, UserError

# Model argument -> the file that a folder must contain.
REQUIRED = {
    "pretrained": "config.json",
    "delta": "config.json",
    "peft": "adapter_config.json",
    "scorer": "config.json",
    "tokenizer": None,
}
_MAX_REASON = 300


def check_folders(arguments: Mapping[str, Any]) -> None:
    """Check the local folders among the model arguments. A hub name is resolved by loading it.

    Raises:
        UserError: no such folder, or a folder without the file that makes it a model or an adapter.
    """
    for name, required in REQUIRED.items():
        value = arguments.get(name)
        if not isinstance(value, str) or not value:
            continue
        path = Path(value)
        if not path.exists() and value.startswith(("/", "./", "../", "~")):
            raise UserError(f"{name}={value}: no such folder")
        elsewhere = name not in ("peft", "scorer") and (arguments.get("subfolder") or arguments.get("gguf_file"))
        if path.is_dir() and required and not elsewhere and not (path / required).is_file():
            what = {"peft": "an adapter", "scorer": "a scorer"}.get(name, "a model")
            raise UserError(f"{name}={value}: the folder has no {required}, so it is not {what}")


@contextmanager
def loading(part: str = "", **arguments: Any) -> Iterator[None]:
    """Let an error of the block name these model arguments, in one line; the original error is its cause.

    Args:
        part: what is loaded of them, as `the tokenizer of `.

    Raises:
        UserError: what they name cannot be loaded.
        InfrastructureError: it does not fit into the memory.
    """
    try:
        with warnings.catch_warnings():
            # PEFT would leave such weights at their initial values: the base model under the adapter's label.
            warnings.filterwarnings("error", message=".*Found missing adapter keys")
            yield
    except LcevalError:
        raise
    except Exception as error:  # transformers, peft and the hub have no common base class
        named = {name: value for name, value in arguments.items() if isinstance(value, str) and value}
        what = part + (", ".join(f"{name}={value}" for name, value in named.items()) or "the model")
        reason = textwrap.shorten(str(error), _MAX_REASON) or "no message"
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise InfrastructureError(f"cannot load {what}: out of memory: {reason}") from error
        if damaged := _damaged([Path(value) for value in named.values()]):
            raise UserError(f"cannot load {what}: {damaged}: copy or download the file again") from error
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"cannot load {what}: {kind}{reason}") from error


def loading_tokenizer(pretrained: Any, tokenizer: Any) -> AbstractContextManager[None]:
    """`loading` for the tokenizer of these model arguments."""
    if tokenizer:
        return loading(tokenizer=tokenizer)
    return loading("the tokenizer of ", pretrained=getattr(pretrained, "name_or_path", pretrained))


def _damaged(folders: list[Path]) -> str | None:
    """The first safetensors file whose header and size do not agree, with the reason."""
    for file in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file} is damaged ({error})"
    return None
