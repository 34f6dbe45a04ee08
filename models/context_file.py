"""A compressed context as one safetensors file: all of its tensors, and in the header how they form the layers.

The header (`__metadata__`) has these texts:

    format          "lceval context 1"
    settings        JSON, what determines the stored bytes: KV recipe, model, adapter, dtype
    context         JSON, the context as a tree of values, in which {"tensor": name} is a tensor of the file
    tokens_sha256   of the context's tokens (tensor `tokens`, int32)
    sha256          of the texts above and of all tensors
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lceval.core.errors import InfrastructureError, UserError
from lceval.core.io import decode, replacing
from lceval.kernels.bits import Bits
from lceval.kernels.bounds import Bounds
from lceval.kernels.fp8 import Fp8KV
from lceval.kernels.paged import PagedKV, is_view
from lceval.kernels.quant import Pool, QuantKV
from lceval.kernels.rotated import Rotated
from lceval.kernels.select import Selective, indexed_keys
from lceval.models.bounded import BoundedKV
from lceval.models.compressed import CompressedContext
from lceval.models.policies import Evictor
from lceval.models.policies.retrieval import Centroids, Nearest
from lceval.models.question import NoKV
from lceval.models.states import State
from lceval.models.window_layers import WindowKV

FORMAT = "lceval context 1"
_CLASSES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(CompressedContext, PagedKV, QuantKV, Pool, WindowKV, BoundedKV, NoKV, State),
        *(Fp8KV, Rotated, Selective, Bits, Bounds, Nearest, Centroids),
    )
}


def write(file: Path, context: CompressedContext, ids: Sequence[int], settings: Mapping[str, Any]) -> None:
    """Write a context and its tokens atomically. settings: as for `read`.

    Raises:
        UserError: the folder is not there, or cannot be written.
        InfrastructureError: the file cannot be written completely.
    """
    tensors = {"tokens": torch.tensor(ids, dtype=torch.int32)}
    tree = _encode(context, "", tensors)
    header = {
        "format": FORMAT,
        "settings": json.dumps(settings),
        "context": json.dumps(tree),
        "tokens_sha256": hashlib.sha256(_bytes(tensors["tokens"])).hexdigest(),
    }
    header["sha256"] = _sha256(header, tensors)
    try:
        with replacing(file) as out:
            save_file(tensors, out.name, header)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    except (OSError, SafetensorError) as error:
        raise InfrastructureError(f"cannot write {file}: {error}") from None


def read(
    file: Path, settings: Mapping[str, Any], evictor: Evictor | None, devices: Sequence[torch.device]
) -> tuple[CompressedContext, tuple[int, ...]]:
    """The context of a file and its tokens.

    Args:
        settings: those of the model that will answer. Values are compared as JSON; of a value with a `digest`, only
            the digest.
        evictor: that of the model's recipe.
        devices: where each layer belongs.

    Raises:
        UserError: no such file, one that is damaged or no saved context, or one that was saved under other settings.
    """
    try:
        with safe_open(file, framework="pt") as content:
            header = content.metadata() or {}
            _check_format(file, header)
            _check_settings(file, decode(header["settings"]), decode(json.dumps(settings)))
            tensors: dict[str, Tensor] = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        if header.pop("sha256") != _sha256(header, tensors):
            raise ValueError("its checksum differs")

        def tensor(name: str) -> Tensor:
            return tensors[name].to(devices[int(name.split(".")[1])])

        context = _decode(decode(header["context"]), tensor, evictor)
        return context, tuple(tensors["tokens"].tolist())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged, or no saved context ({error}): save the context again") from None


def _check_format(file: Path, header: Mapping[str, str]) -> None:
    stored = header.get("format", "")
    if stored != FORMAT:
        what = f"has the format {stored!r}, not {FORMAT!r}" if stored.startswith("lceval") else "is no saved context"
        raise UserError(f"{file} {what}: name a file that `save` of this version of lceval wrote")


def _check_settings(file: Path, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name in sorted({*stored, *own}):
        theirs, ours = stored.get(name), own.get(name)
        both = isinstance(theirs, dict) and isinstance(ours, dict)
        if theirs["digest"] != ours["digest"] if both else theirs != ours:  # type: ignore[index]
            raise UserError(
                f"{file} was saved with {name}={_shown(theirs)}, and this model has {name}={_shown(ours)}: "
                "open it with the model that saved it, or compress the text again"
            )


def _shown(value: Any) -> str:
    return f"{value['name']} ({value['digest'][:12]})" if isinstance(value, dict) else str(value)


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors, named by their path, are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Evictor):
        return {"policy": "evictor"}  # part of the recipe
    if isinstance(value, tuple):
        return [_encode(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]
    if isinstance(value, Nearest):
        value = value.saved()
    if not is_dataclass(value):
        return value
    parts = {f.name: _encode(getattr(value, f.name), f"{name}.{f.name}".lstrip("."), tensors) for f in fields(value)}
    if isinstance(value, PagedKV) and is_view(value.k, value.v):
        del tensors[parts["v"]["tensor"]]
        parts["v"] = value.value_dim
    return {"class": type(value).__name__, "fields": parts}


def _decode(value: Any, tensor: Callable[[str], Tensor], evictor: Evictor | None) -> Any:
    """The value of which `_encode` made this JSON."""
    match value:
        case list():
            return tuple(_decode(item, tensor, evictor) for item in value)
        case {"tensor": name}:
            return tensor(name)
        case {"dtype": name}:
            return getattr(torch, name)
        case {"policy": "evictor"}:
            return evictor
        case {"class": name, "fields": parts}:
            decoded = {key: _decode(part, tensor, evictor) for key, part in parts.items()}
            if name == PagedKV.__name__ and isinstance(decoded["v"], int):  # latents: the first channels of the keys
                decoded["v"] = decoded["k"][..., : decoded["v"]]
            whole = _CLASSES[name](**decoded)
            if isinstance(whole, Selective) and isinstance(whole.index, Nearest):
                return replace(whole, index=whole.index.opened(indexed_keys(whole.kv, whole.budget)))
            return whole
        case _:
            return value


def _sha256(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(header.items()))).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(_bytes(x))
    return digest.hexdigest()


def _bytes(x: Tensor) -> Any:
    return x.reshape(-1).view(torch.uint8).numpy()
