"""The checks of lcft's own model arguments, before anything is loaded, and the errors of what cannot be loaded."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch

from lceval.core.errors import LcevalError, UserError
from lceval.models import attention
from lceval.models.diagnosis import Diagnosis

_GIB = 1e6  # more than any machine has
CHOICES = {
    "overlong": ("error", "middle", "end", "skip"),
    "attn": attention.CHOICES,
    "diagnose": Diagnosis.KINDS,
}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check lcft's own arguments, and those of HFLM that lcft does not support.

    Raises:
        UserError: a bad value, or an argument that lcft sets itself.
    """

    def bad(name: str, expected: str) -> UserError:
        return UserError(f"bad model argument {name}={arguments[name]!r}: {expected}")

    for name, allowed in CHOICES.items():
        if arguments[name] not in allowed:
            raise bad(name, f"one of {', '.join(allowed)}")
    if not isinstance(arguments["query_aware"], bool):
        raise bad("query_aware", "true or false")
    if not isinstance(arguments["prefill_chunk"], int) or arguments["prefill_chunk"] < 0:
        raise bad("prefill_chunk", "a number of tokens, or 0")
    if not isinstance(arguments["prefix_cache_gib"], int | float) or not 0 <= arguments["prefix_cache_gib"] < _GIB:
        raise bad("prefix_cache_gib", "a number of GiB, or 0")
    size = str(arguments.get("batch_size") or 1)
    if size.startswith("auto"):
        raise UserError("lcft does not choose batch sizes automatically: pass a number as --batch_size")
    if not (size.isdecimal() and len(size) < 10 and int(size) > 0):
        raise bad("batch_size", "a number of questions")
    if "attn_implementation" in arguments:
        raise UserError("lcft sets attn_implementation itself: remove it from --model_args")


@contextmanager
def loaded_whole(pretrained: object, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, a model or adapter that cannot be loaded, or not with all of its weights, is a UserError.

    Args:
        arguments: further arguments, as `peft`; an unknown one among them raises its TypeError.
    """
    try:
        with warnings.catch_warnings():
            # PEFT would leave such weights at their initial values, which is the base model.
            warnings.filterwarnings("error", message=".*Found missing adapter keys")
            yield
    except (LcevalError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of transformers, PEFT or safetensors: no common base class
        if unknown_keyword(error) in arguments:
            raise
        name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        adapter = f" with peft={arguments['peft']}" if arguments.get("peft") else ""
        raise UserError(f"cannot load pretrained={name}{adapter}: {error!r}") from error


def unknown_keyword(error: Exception) -> str | None:
    """The name in a TypeError about an unexpected keyword argument; None for other errors."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return unknown[1] if unknown else None


def unknown_argument(name: str, *models: type) -> UserError:
    """The error for an argument that none of these classes has."""
    parameters = {parameter for model in models for parameter in inspect.signature(model.__init__).parameters}  # type: ignore[misc]
    known = sorted(parameters - {"self", "kwargs"})
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return UserError(f"unknown model argument {name!r}: {hint}")
