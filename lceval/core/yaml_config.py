"""Configurations: YAML with KEY=VALUE overrides, checked against a pydantic model before anything is loaded."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lceval.core.errors import UserError
from lceval.core.io import MOST_LEVELS, read_text

Model = TypeVar("Model", bound=BaseModel)
_INTEGER_BITS = 63


def shipped(package: str) -> list[str]:
    """Names of the YAML files in a package."""
    return sorted(Path(file.name).stem for file in files(package).iterdir() if file.name.endswith(".yaml"))


def read(
    model: type[Model],
    source: Path | str,
    package: str,
    what: str,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Model:
    """A configuration from a file, or a shipped one by name.

    Args:
        source: the file, or the name.
        package: where the shipped ones are.
        what: what it is called in errors, e.g. "recipe".
        overrides: KEY=VALUE with dots between sections, e.g. `optim.learning_rate=1e-4`; VALUE is YAML.
        defaults: values of keys that the file lacks.

    Raises:
        UserError: no such file or name, invalid YAML, or the first invalid key.
    """
    if os.path.isfile(source):
        text = read_text(Path(source))
    elif str(source) in shipped(package):
        text = (files(package) / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise UserError(f"no {what} {str(source)!r}: expected a YAML file or one of {', '.join(shipped(package))}")
    values = load(text, str(source)) or {}
    if isinstance(values, dict):
        values = {**(defaults or {}), **values}
        for override in overrides:
            _override(values, override)
    return parse(model, values, str(source), [override.partition("=")[0] for override in overrides])


def parse(model: type[Model], values: Any, source: str, overridden: Sequence[str] = ()) -> Model:
    """A configuration from plain values.

    Args:
        source: its name in errors.
        overridden: keys that were set by `--set`, for errors.

    Raises:
        UserError: the first invalid key.
    """
    if not isinstance(values, Mapping):
        keys = ", ".join([*model.model_fields][:3])
        raise UserError(f"{source}: expected keys such as {keys}, got {type(values).__name__}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        by_set = any(where == key or where.startswith(f"{key}.") for key in overridden)
        place = f"--set {where}" if by_set else f"{source}: {where}" if where else source
        if first["type"] == "extra_forbidden":
            known = _known(model, first["loc"][:-1])
            near = get_close_matches(str(first["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
            raise UserError(f"{place}: unknown key; {hint}") from None
        message = first["msg"].lower().removeprefix("value error, ")
        # reprlib, because the aliases of a short text can describe a value without end.
        raise UserError(f"{place}: {message} (got {reprlib.repr(first['input']):.60})") from None


def load(text: str, source: str) -> Any:
    """The value of a YAML text, of plain types.

    Raises:
        UserError: invalid YAML, or a value that is too large.
    """
    # Also in quotes, where nobody leaves a hundred open. The parser needs a minute for 100 kB of them.
    brackets = accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    if max(brackets, default=0) > MOST_LEVELS:
        raise UserError(f"{source}: invalid YAML (nested deeper than {MOST_LEVELS} levels)")
    try:
        value = yaml.safe_load(text)
    except Exception as error:  # also RecursionError, and whatever the value of a tag such as !!int raises
        raise UserError(f"{source}: invalid YAML ({error})") from None
    if any(isinstance(one, int) and one.bit_length() > _INTEGER_BITS for one in _values(value)):
        raise UserError(f"{source}: invalid YAML (an integer has more than {_INTEGER_BITS} bits)")
    return value


def _values(value: Any) -> Iterator[Any]:
    """A value and all inside of it, each object once: aliases may repeat it, or contain itself."""
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []


def _override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--set {override}: expected --set KEY=VALUE, e.g. --set limit=8")
    *sections, key = path.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    value = load(text, f"--set {override}")
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        with suppress(ValueError):
            value = float(value)
    values[key] = value


def _known(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The valid keys of the section at a path."""
    section: Any = model
    for part in path:
        kind = section.model_fields[part].annotation
        section = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel))
    return list(section.model_fields)
