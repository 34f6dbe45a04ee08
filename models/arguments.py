"""The checks of lcft's model arguments, before anything is loaded."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from lceval.core.errors import UserError
from lceval.models import attention
from lceval.models.boundary import AUTO, check_context_from
from lceval.models.diagnosis import Diagnosis
from lceval.models.loading import check_folders
from lceval.models.policies import Threshold
from lceval.models.recipe import Recipe
from lceval.models.retrieval_heads import files_of

_GIB = 1e6  # more than any machine has
CHOICES = {
    "overlong": ("error", "middle", "end", "skip"),
    "attn": attention.CHOICES,
    "diagnose": Diagnosis.KINDS,
    "budget": ("context", "total"),
}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check lcft's own arguments, and those of HFLM that it restricts or would misread; absent ones are valid.

    Raises:
        UserError: a bad value, an argument that lcft sets itself, or a folder that is not there.
    """

    def bad(name: str, expected: str) -> UserError:
        return UserError(f"bad model argument {name}={arguments[name]!r}: {expected}")

    for name, allowed in CHOICES.items():
        if arguments.get(name, allowed[0]) not in allowed:
            raise bad(name, f"one of {', '.join(allowed)}")
    for name in ("query_aware", "allow_pickle"):
        if not isinstance(arguments.get(name, False), bool):
            raise bad(name, "true or false")
    if not isinstance(arguments.get("scorer") or "", str):
        raise bad("scorer", "a folder or a hub name")
    if not isinstance(arguments.get("heads") or "", str):
        raise bad("heads", "a folder or a text")
    if arguments.get("heads"):
        files_of(str(arguments["heads"]))
    if problem := check_context_from(arguments.get("context_from", AUTO)):
        raise bad("context_from", problem)
    chunk = arguments.get("prefill_chunk", "auto")
    if chunk != "auto" and not _is_count(chunk, least=0):
        raise bad("prefill_chunk", "auto, a number of tokens, or 0")
    gib = arguments.get("prefix_cache_gib", 0)
    if not isinstance(gib, int | float) or not 0 <= gib < _GIB:
        raise bad("prefix_cache_gib", "a number of GiB, or 0")
    batch_size = str(arguments.get("batch_size", 1))
    # lm-eval's auto:N sizes batches N times; here every batch is sized.
    if not re.fullmatch(r"auto(:\d+)?|0*[1-9]\d{0,8}", batch_size):
        raise bad("batch_size", "a number of questions, at least 1, or auto")
    if not _is_count(arguments.get("max_batch_size") or 1, least=1):
        raise bad("max_batch_size", "a number of questions, at least 1")
    if arguments.get("max_length") is not None and not _is_count(arguments["max_length"], least=1):
        raise bad("max_length", "a number of tokens, at least 1")
    for name in ("dtype", "mixed_precision_dtype", "softmax_dtype"):
        automatic = name == "dtype" and arguments.get(name) == "auto"
        if arguments.get(name) is not None and not automatic and not _is_dtype(arguments[name]):
            raise bad(name, "float32, bfloat16, float16" + (" or auto" if name == "dtype" else ""))
    if arguments.get("device") is not None:
        check_device(arguments["device"])
    # lm-eval drops device_map in silence; under tp_plan a method would compare only the heads of its own GPU.
    for name in ("device_map", "tp_plan"):
        if arguments.get(name) is not None:
            raise bad(name, "lcft spreads a model over several GPUs by parallelize=True, use that instead")
    if "attn_implementation" in arguments:
        raise UserError("lcft sets attn_implementation itself: remove it from --model_args")
    check_folders(arguments)


def check_device(device: Any) -> None:
    """Check that PyTorch finds a device.

    Raises:
        UserError: it does not, or this is no device's name.
    """
    try:
        parsed = torch.device(str(device))
        available = torch.get_device_module(parsed).device_count()
    except (RuntimeError, AttributeError):
        raise UserError(f"unknown device={device}: cpu, cuda, cuda:N or mps") from None
    if (parsed.index or 0) >= available:
        number = f"{available} {parsed.type} devices" if available else f"no {parsed.type} device"
        raise UserError(f"device={device}: PyTorch finds {number} on this machine: pass another device, such as cpu")


def check_flags(arguments: Mapping[str, Any], flags: Iterable[str]) -> None:
    """Check that what lm-eval passes by its flags is not among the model arguments too.

    Raises:
        UserError: it is.
    """
    for name in flags:
        if name in arguments:
            raise UserError(f"{name} is no model argument: pass it as --{name} {arguments[name]}")


def check_mode(kv: Recipe, query_aware: bool, budget: str = "context", heads: str | None = None) -> None:
    """Check that a recipe supports the mode, and has what it requires beside the model.

    Raises:
        UserError: it does not.
    """
    if budget == "total" and not query_aware:
        raise UserError("budget=total counts a question's tokens in the budget: it requires query_aware=true")
    if budget == "total" and kv.evictor is not None and isinstance(kv.evictor.amount, Threshold):
        raise UserError(f"kv={kv} has a threshold, not a budget: use budget=context")
    if kv.needs_pattern and not heads:
        raise UserError(
            f"kv={kv} requires heads=PATH: a folder with an attention pattern of DuoAttention, or a text on which the "
            "retrieval heads are found"
        )
    if not query_aware and kv.evictor is not None and kv.evictor.needs_question:
        raise UserError(f"kv={kv} selects by the attention of the question: it requires query_aware=true")
    if query_aware and kv.evicts_while_writing:
        raise UserError(f"kv={kv} evicts after the question: use query_aware=false")
    if query_aware and kv.reads_in_chunks:
        raise UserError(f"kv={kv} evicts before the question is known: use query_aware=false")
    if query_aware and kv.evicts_always:
        raise UserError(f"kv={kv} evicts during decoding: use query_aware=false")


def _is_count(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_dtype(value: Any) -> bool:
    """Whether it is a dtype, or the name of one, in which a model can compute."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1


def unknown_argument(name: str, *models: type) -> UserError:
    """The error for an argument that none of these classes has."""
    parameters = {parameter for model in models for parameter in inspect.signature(model.__init__).parameters}  # type: ignore[misc]
    known = sorted(parameters - {"self", "kwargs"})
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return UserError(f"unknown model argument {name!r}: {hint}")
