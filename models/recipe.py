"""The KV recipe: one short string that says how a context's cache is compressed, and labels every table row.

    recipe = part { "+" part }          part = name [ ":" amount ] { ":" key "=" value }

`full` keeps everything. An amount with a decimal point is a share of the context's tokens, an integer is tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lceval.errors import UserError
from lceval.models.policies import EVICTORS, Amount, Evictor

FULL = "full"


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. `str` is its canonical form (defaults left out): `parse(str(r)) == r`."""

    evictor: Evictor | None = None

    @property
    def queries_needed(self) -> int:
        """How many of the context's last queries the prefill must remember."""
        return self.evictor.queries_needed if self.evictor else 0

    def expanded(self) -> dict[str, Any]:
        """Every parameter with its value, defaults too, for the record."""
        if self.evictor is None:
            return {"evict": None}
        return {"evict": {"name": _name(self.evictor), **_parameters(self.evictor)}}

    def __str__(self) -> str:
        if self.evictor is None:
            return FULL
        defaults = {f.name: f.default for f in dataclasses.fields(self.evictor)}
        given = [f"{k}={v}" for k, v in _parameters(self.evictor).items() if k != "amount" and v != defaults[k]]
        return ":".join([_name(self.evictor), str(self.evictor.amount), *given])


def parse(text: str) -> Recipe:
    """The recipe that `text` spells.

    Raises:
        UserError: unknown name, key or value; the message names the nearest valid one.
    """
    evictor: Evictor | None = None
    for part in text.strip().split("+"):
        name, *arguments = part.strip().split(":")
        if name not in (FULL, *EVICTORS):
            raise _unknown("KV method", name, [FULL, *EVICTORS], text)
        if name == FULL:
            if arguments:
                raise UserError(f"bad KV recipe {text!r}: full takes no argument (got {':'.join(arguments)!r})")
            continue
        if evictor is not None:
            raise UserError(f"bad KV recipe {text!r}: at most one evictor, got {_name(evictor)} and {name}")
        evictor = _build(name, arguments, text)
    return Recipe(evictor)


def _build(name: str, arguments: list[str], text: str) -> Evictor:
    cls = EVICTORS[name]
    types = {f.name: type(f.default) for f in dataclasses.fields(cls) if f.name != "amount"}
    values: dict[str, Any] = {}
    for place, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if not equals:
            if place:
                raise UserError(f"bad KV recipe {text!r}: {argument!r} is not key=value")
            values["amount"] = _amount(argument, text)
        elif key not in types:
            raise _unknown(f"key of {name}", key, list(types), text)
        else:
            values[key] = _value(key, value, types[key], text)
    if "amount" not in values:
        raise UserError(f"bad KV recipe {text!r}: {name} needs an amount, as in {name}:0.25 or {name}:2048")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"bad KV recipe {text!r}: {error}") from None


def _amount(value: str, text: str) -> Amount:
    try:
        return Amount.parse(value)
    except ValueError:
        raise UserError(
            f"bad KV recipe {text!r}: the amount {value!r} is neither a share above 0.0 and at most 1.0, "
            "written with a decimal point (0.25), nor a number of tokens (2048)"
        ) from None


def _value(key: str, value: str, kind: type, text: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"bad KV recipe {text!r}: {key}={value!r} is not of type {kind.__name__}") from None


def _unknown(what: str, got: str, known: list[str], text: str) -> UserError:
    near = get_close_matches(got, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"bad KV recipe {text!r}: unknown {what} {got!r}; {hint}known: {', '.join(known)}")


def _name(evictor: Evictor) -> str:
    return next(name for name, cls in EVICTORS.items() if cls is type(evictor))


def _parameters(evictor: Evictor) -> dict[str, Any]:
    values = {f.name: getattr(evictor, f.name) for f in dataclasses.fields(evictor)}
    return values | {"amount": evictor.amount.value}
