"""The KV recipe: a short string that defines how a context's cache is compressed and labels every table row.

    recipe = "full" | part { "+" part }          part = name [ ":" amount ] { ":" key "=" value }

A part is an evictor, a quantization or a sparse attention, at most one of each; `full` is the uncompressed cache. An
amount with a decimal point is a share of the context's tokens, an integer a number of tokens; an evictor's share is
rounded to the nearest number of tokens, or by `round=down` as in kvpress. An evictor whose scores
have a scale of their own takes `threshold=FLOAT` instead of an amount. `when` says when an
evictor evicts: after the prefill (the default), after every `chunk` tokens that are read, after `every` that are
written, or after every step. The canonical form leaves defaults out and has the order name, amount or threshold,
`round`, `when` and its keys, other keys, `of`, keys of the evictor that `of` names.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from lceval.core.errors import UserError
from lceval.models.policies import (
    EVICTORS,
    QUANTIZERS,
    SPARSE_ATTENTION,
    Amount,
    Evictor,
    Float8,
    Quantizer,
    SparseAttention,
    StatsSpec,
    StepEvictor,
    Threshold,
    Wrapper,
)
from lceval.models.policies.base import shortest
from lceval.models.policies.duo import Duo, HeadPattern
from lceval.models.policies.quantizer import NAMES as BITS

FULL = "full"
DEFAULT_OF = "snapkv"
# The evictors that adakv, criticalkv and chunkkv can name by `of`.
INNER = [name for name, cls in EVICTORS.items() if Wrapper.takes(cls)]
AXES = {"evictor": "evictor", "quantizer": "quantization", "sparse_attention": "sparse attention"}
THRESHOLD = "threshold"
ROUND, ROUNDINGS = "round", ("nearest", "down")
WHEN, PREFILL, CHUNK, DECODE, ALWAYS = "when", "prefill", "chunk", "decode", "always"
EVERY, PROMPT, PROMPTS = "every", "prompt", ("keep", "evict")
READ_CHUNK, WRITE_EVERY = 1024, 128
WHILE_READING = [name for name, cls in EVICTORS.items() if cls.evicts_while_reading]
WHILE_WRITING = [name for name, cls in EVICTORS.items() if cls.evicts_while_writing]
# What a value of each type looks like, and its name in errors.
VALUES: dict[type, tuple[str, str]] = {
    bool: (r"true|false", "true or false"),
    int: (r"[+-]?[0-9]{1,18}", "of type int"),
    float: (r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", "of type float"),
    str: (r".*", "of type str"),
}
NAMES = [FULL, *EVICTORS, *QUANTIZERS, *SPARSE_ATTENTION]


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. `str` is its canonical form, without defaults: `parse(str(r)) == r`."""

    evictor: Evictor | None = None
    quantizer: Quantizer | Float8 | None = None
    sparse_attention: SparseAttention | None = None

    @property
    def stats_spec(self) -> StatsSpec:
        """The statistics that the recipe requires of a prefill of the whole context."""
        return self.evictor.stats_spec if self.evictor and not self.evicts_while_writing else StatsSpec()

    @property
    def reads_in_chunks(self) -> bool:
        """Whether it evicts while a context is read (`when=chunk`), so that it shares no prefill with other recipes."""
        return self.evictor is not None and self.evictor.read_chunk > 0

    @property
    def evicts_while_writing(self) -> bool:
        """Whether it evicts only while an answer is written (`when=decode`)."""
        return self.evictor is not None and self.evictor.write_every > 0

    @property
    def evicts_always(self) -> bool:
        """Whether it evicts after every forward pass (`when=always`)."""
        return isinstance(self.evictor, StepEvictor) and self.evictor.when == ALWAYS

    @property
    def parts(self) -> dict[str, Any]:
        """The policies by axis, absent axes left out."""
        axes = {"evict": self.evictor, "store": self.quantizer, "read": self.sparse_attention}
        return {axis: policy for axis, policy in axes.items() if policy is not None}

    @property
    def needs_scorer(self) -> bool:
        """Whether the evictor requires a scorer, and has none yet."""
        return self.evictor is not None and "" in self.evictor.stats_spec.scorers

    @property
    def pattern(self) -> HeadPattern | None:
        """The retrieval heads of an evictor that has them; None without, or while it has none yet."""
        return self.evictor.pattern if isinstance(self.evictor, Duo) else None

    @property
    def needs_pattern(self) -> bool:
        """Whether the evictor requires a pattern of retrieval heads, and has none yet."""
        return isinstance(self.evictor, Duo) and self.evictor.pattern is None

    def bound(self, scorer: str = "", pattern: HeadPattern | None = None) -> Recipe:
        """The recipe with the scorer of this digest or this pattern of retrieval heads, where it needs one; its
        canonical form is the same."""
        if self.needs_scorer:
            return dataclasses.replace(self, evictor=dataclasses.replace(self.evictor, scorer=scorer))  # type: ignore[type-var]
        if self.needs_pattern:
            return dataclasses.replace(self, evictor=dataclasses.replace(self.evictor, pattern=pattern))  # type: ignore[type-var]
        return self

    def within(self, context: int, question: int) -> Recipe:
        """The recipe with the tokens of a question inside its budget, which is of context and question together.

        All question tokens are kept, so the context gets what they leave, and at least one token.
        """
        if self.evictor is None:
            return self
        tokens = self.evictor.budgeted.tokens(context + question) - question
        return dataclasses.replace(self, evictor=self.evictor.with_amount(Amount(max(1, tokens))))

    def expanded(self) -> dict[str, Any]:
        """Every parameter with its value, including defaults, for run.json."""
        record: dict[str, Any] = {"evict": None, "store": None, "read": None}
        return record | {axis: {"name": _name(p), **_parameters(p)} for axis, p in self.parts.items()}

    def __str__(self) -> str:
        return "+".join(_spell(policy) for policy in self.parts.values()) or FULL


def parse(text: str) -> Recipe:
    """Parse a recipe.

    Raises:
        UserError: unknown name, key or value, or incompatible parts; the message names the nearest valid one.
    """
    parts: dict[str, Any] = {}
    for part in text.strip().split("+"):
        name, *arguments = part.strip().split(":")
        if name not in NAMES:
            raise _unknown("KV method", name, NAMES, text)
        if name == FULL:
            if arguments:
                raise _bad(text, f"full takes no argument (got {':'.join(arguments)!r})")
            continue
        axis = "evictor" if name in EVICTORS else "quantizer" if name in QUANTIZERS else "sparse_attention"
        if axis in parts:
            raise _bad(text, f"at most one {AXES[axis]}, got {_name(parts[axis])} and {name}")
        parts[axis] = _build(name, arguments, text)
    evictor = parts.get("evictor")
    if evictor is not None and evictor.write_every and "sparse_attention" in parts:
        raise _bad(text, "when=decode evicts what an index of sparse attention was built on: leave one of them out")
    if isinstance(evictor, StepEvictor) and evictor.when == ALWAYS and len(parts) > 1:
        raise _bad(text, "when=always evicts at every step, which excludes quantization and sparse attention")
    return Recipe(**parts)


def _build(name: str, arguments: list[str], text: str) -> Any:
    amounts = int(name not in QUANTIZERS and bool(arguments) and "=" not in arguments[0])
    keys = dict(_key_values(arguments[amounts:], text))
    if name in QUANTIZERS:
        bits: dict[str, Any] = dict(zip(("k_bits", "v_bits"), BITS.get(name, ()), strict=False))
        return _make(QUANTIZERS[name], name, keys, text, **bits)
    cls: Any = EVICTORS.get(name) or SPARSE_ATTENTION[name]
    if arguments and "=" not in arguments[0]:
        amount: Amount | Threshold = _amount(arguments[0], text)
        if THRESHOLD in keys and has_scale(cls):
            raise _bad(text, f"{name} takes an amount or a threshold, not both")
    elif THRESHOLD in keys and has_scale(cls):
        amount = _threshold(keys.pop(THRESHOLD), text)
    else:
        instead = f", or a threshold, as in {name}:{THRESHOLD}=-4" if has_scale(cls) else ""
        raise _bad(text, f"{name} requires an amount, as in {name}:0.25 or {name}:2048{instead}")
    if THRESHOLD in keys:
        raise _bad(text, f"{name} has no threshold, since its scores have no scale of their own: use an amount")
    if name in EVICTORS and ROUND in keys:
        amount = _rounded(amount, keys.pop(ROUND), text)
    fixed: dict[str, Any] = {"amount": amount, **_schedule(name, amount, keys, text)}
    if not issubclass(cls, Wrapper):
        return _make(cls, name, keys, text, **fixed)
    of = keys.pop("of", DEFAULT_OF)
    if of not in INNER:
        raise _unknown(f"evictor of {name}", of, INNER, text)
    own = {key: keys.pop(key) for key in list(keys) if key in key_types(cls)}
    inner = _make(EVICTORS[of], f"{name} or {of}", keys, text, also=["of", *key_types(cls)], amount=amount)
    return _make(cls, name, own, text, inner=inner, **fixed)


def _schedule(name: str, amount: Amount | Threshold, keys: dict[str, str], text: str) -> dict[str, Any]:
    """Remove `when` and the keys that depend on it from an evictor's keys; the fields that they set."""
    if name not in EVICTORS or WHEN not in keys:
        return {}
    allowed = when_values(EVICTORS[name])
    if keys[WHEN] not in allowed:
        known = {CHUNK: WHILE_READING, DECODE: WHILE_WRITING}.get(keys[WHEN])
        others = f"; when={keys[WHEN]} has {', '.join(known)}" if known else ""
        raise _bad(text, f"{WHEN} of {name} must be {' or '.join(allowed)}{others}")
    if keys[WHEN] == ALWAYS:
        return {}
    when = keys.pop(WHEN)
    if when == CHUNK:
        return {"read_chunk": _positive(CHUNK, keys.pop(CHUNK, str(READ_CHUNK)), text)}
    if when == DECODE:
        if isinstance(amount, Amount) and amount.is_share:
            raise _bad(text, "when=decode requires a number of tokens, since a share of what is written grows")
        every = _positive(EVERY, keys.pop(EVERY, str(WRITE_EVERY)), text)
        prompt = keys.pop(PROMPT, PROMPTS[0])
        if prompt not in PROMPTS:
            raise _bad(text, f"{PROMPT} must be {' or '.join(PROMPTS)}")
        return {"write_every": every, "keeps_prompt": prompt == PROMPTS[0]}
    return {}


def _positive(key: str, value: str, text: str) -> int:
    number = int(_value(key, value, int, text))
    if number < 1:
        raise _bad(text, f"{key} must be at least 1")
    return number


def when_values(cls: type[Evictor]) -> list[str]:
    """The times at which an evictor can evict: the values of its key `when`, the default first."""
    has = {PREFILL: True, CHUNK: cls.evicts_while_reading, DECODE: cls.evicts_while_writing}
    has[ALWAYS] = issubclass(cls, StepEvictor)
    return [when for when, possible in has.items() if possible]


def has_scale(cls: Any) -> bool:
    """Whether a method takes a threshold instead of an amount."""
    return bool(getattr(cls, "has_scale", False))


def _key_values(arguments: list[str], text: str) -> list[tuple[str, str]]:
    for argument in arguments:
        if "=" not in argument:
            raise _bad(text, f"{argument!r} is not key=value")
    pairs = [(key, value) for key, _, value in (argument.partition("=") for argument in arguments)]
    if repeated := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
        raise _bad(text, f"duplicate key {repeated[0]}")
    return pairs


def _make(cls: Any, name: str, keys: dict[str, str], text: str, also: Sequence[str] = (), **fixed: Any) -> Any:
    types = key_types(cls)
    for key in keys:
        if key not in types:
            raise _unknown(f"key of {name}", key, [*types, *also], text)
    try:
        return cls(**fixed, **{key: _value(key, value, types[key], text) for key, value in keys.items()})
    except ValueError as error:
        raise _bad(text, str(error)) from None


def _amount(value: str, text: str) -> Amount:
    try:
        return Amount.parse(value)
    except ValueError:
        raise _bad(
            text,
            f"the amount {value!r} is neither a share above 0.0 and at most 1.0 "
            "with a decimal point (0.25) nor a number of tokens (2048)",
        ) from None


def _rounded(amount: Amount | Threshold, rounding: str, text: str) -> Amount | Threshold:
    if rounding not in ROUNDINGS:
        raise _bad(text, f"{ROUND} must be {' or '.join(ROUNDINGS)}")
    if isinstance(amount, Threshold):
        raise _bad(text, f"a threshold is not rounded: leave {ROUND} out")
    try:
        return Amount(amount.value, rounding == "down")
    except ValueError as error:
        raise _bad(text, str(error)) from None


def _threshold(value: str, text: str) -> Threshold:
    try:
        return Threshold(_value(THRESHOLD, value, float, text))
    except ValueError as error:
        raise _bad(text, str(error)) from None


def _value(key: str, value: str, kind: type, text: str) -> Any:
    pattern, expected = VALUES[kind]
    if not re.fullmatch(pattern, value):
        raise _bad(text, f"{key}={value!r} is not {expected}")
    return value == "true" if kind is bool else kind(value)


def _unknown(what: str, got: str, known: Sequence[str], text: str) -> UserError:
    near = get_close_matches(got, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return _bad(text, f"unknown {what} {got!r}; {hint}" + (f"known: {', '.join(known)}" if known else "it has no keys"))


def _bad(text: str, reason: str) -> UserError:
    return UserError(f"bad KV recipe {text!r}: {reason}")


def key_types(cls: Any) -> dict[str, type]:
    """The keys of a policy in a recipe and their types: the dataclass fields that have a default."""
    hints = get_type_hints(cls)
    keys = [
        f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING and f.metadata.get("key", True)
    ]
    return {key: next(kind for kind in (hints[key], *get_args(hints[key])) if kind in VALUES) for key in keys}


def defaults(name: str) -> dict[str, Any]:
    """The keys that a method of `NAMES` accepts in a recipe, with their defaults; one with `of` also accepts the keys
    of the evictor that it names."""
    if name == FULL:
        return {}
    cls: Any = QUANTIZERS.get(name) or EVICTORS.get(name) or SPARSE_ATTENTION[name]
    values = {f.name: f.default for f in dataclasses.fields(cls) if f.name in key_types(cls)}
    return {"of": DEFAULT_OF, **values} if issubclass(cls, Wrapper) else values


def _name(policy: Any) -> str:
    if isinstance(policy, Quantizer):
        return next(name for name, bits in BITS.items() if bits == (policy.k_bits, policy.v_bits))
    return next(name for name, cls in {**EVICTORS, **QUANTIZERS, **SPARSE_ATTENTION}.items() if cls is type(policy))


def _parameters(policy: Any) -> dict[str, Any]:
    """Amount or threshold, and keys as in the recipe, with those of an inner evictor."""
    values = {key: getattr(policy, key) for key in key_types(type(policy))}
    values |= {key: value for key, (value, _) in _schedule_of(policy).items()}
    amount, inner = getattr(policy, "amount", None), getattr(policy, "inner", None)
    if isinstance(policy, Quantizer):
        values = {"k_bits": policy.k_bits, "v_bits": policy.v_bits, **values}
    elif isinstance(amount, Threshold):
        values = {"amount": None, THRESHOLD: amount.value, **values}
    elif amount is not None:
        rounding = {ROUND: "down"} if amount.down else {}
        values = {"amount": amount.value, **rounding, **values}
    return values | ({"of": _name(inner), **_parameters(inner)} if inner else {})


def _spell(policy: Any) -> str:
    defaults = {f.name: f.default for f in dataclasses.fields(policy)}
    values = {key: getattr(policy, key) for key in key_types(type(policy))}
    keys = [f"{key}={spelled(value)}" for key, value in values.items() if value != defaults[key]]
    inner, amount = getattr(policy, "inner", None), getattr(policy, "amount", None)
    if inner is not None:
        name, *inner_keys = _spell(inner).split(":")
        inner_keys = [key for key in inner_keys if "=" in key and not key.startswith(f"{ROUND}=")]
        keys = [*keys, *([f"of={name}"] if name != DEFAULT_OF else []), *inner_keys]
    schedule = [f"{key}={value}" for key, (value, default) in _schedule_of(policy).items() if value != default]
    keys = [*schedule, *keys]
    if isinstance(amount, Threshold):
        keys = [f"{THRESHOLD}={shortest(amount.value)}", *keys]
    elif amount is not None and amount.down:
        keys = [f"{ROUND}=down", *keys]
    return ":".join([_name(policy), *([str(amount)] if isinstance(amount, Amount) else []), *keys])


def _schedule_of(policy: Any) -> dict[str, tuple[Any, Any]]:
    """`when` and the keys that depend on it, with their defaults; empty for eviction after the prefill."""
    if chunk := getattr(policy, "read_chunk", 0):
        return {WHEN: (CHUNK, None), CHUNK: (chunk, READ_CHUNK)}
    if every := getattr(policy, "write_every", 0):
        prompt = PROMPTS[0] if policy.keeps_prompt else PROMPTS[1]
        return {WHEN: (DECODE, None), EVERY: (every, WRITE_EVERY), PROMPT: (prompt, PROMPTS[0])}
    return {}


def spelled(value: Any) -> str:
    """A value as recipes spell it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return shortest(value) if isinstance(value, float) else str(value)
