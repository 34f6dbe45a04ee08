"""The checks of lcft's own model arguments, before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from lceval.core.errors import UserError
from lceval.models import attention
from lceval.models.diagnosis import Diagnosis

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
    chunk = arguments["prefill_chunk"]
    if chunk != "auto" and (not isinstance(chunk, int) or chunk < 0):
        raise bad("prefill_chunk", "auto, a number of tokens, or 0")
    if not isinstance(arguments["prefix_cache_gib"], int | float) or arguments["prefix_cache_gib"] < 0:
        raise bad("prefix_cache_gib", "a number of GiB, or 0")
    if str(arguments.get("batch_size", 1)).startswith("auto"):
        raise UserError("lcft does not choose batch sizes automatically: pass a number as --batch_size")
    # lm-eval drops device_map in silence; under tp_plan a method would compare only the heads of its own GPU.
    for name in ("device_map", "tp_plan"):
        if arguments.get(name) is not None:
            raise bad(name, "lcft spreads a model over several GPUs by parallelize=True, use that instead")
    if "attn_implementation" in arguments:
        raise UserError("lcft sets attn_implementation itself: remove it from --model_args")


def unknown_argument(name: str, *models: type) -> UserError:
    """The error for an argument that none of these classes has."""
    parameters = {parameter for model in models for parameter in inspect.signature(model.__init__).parameters}  # type: ignore[misc]
    known = sorted(parameters - {"self", "kwargs"})
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return UserError(f"unknown model argument {name!r}: {hint}")
