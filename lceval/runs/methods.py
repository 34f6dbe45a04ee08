"""`lceval methods`: the KV methods that a recipe can name.

Everything shown is taken from the policies: keys and defaults from their fields, the rest from their docstrings. The
first paragraph of a docstring is one sentence that ends with the source in parentheses; paragraphs that start with
"Differs from the paper:" and "Cost:" are shown under these headings. So a new policy is listed without a change here.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from difflib import get_close_matches
from typing import Any

from lceval.core.errors import UserError
from lceval.data.listing import columns
from lceval.models import recipe
from lceval.models.policies import EVICTORS, QUANTIZERS, SPARSE_ATTENTION

WIDTH = 100
DESCRIPTION_OF_FULL = "Keep every token in full precision: the uncompressed cache."
CITED = re.compile(r"(?P<description>.*?) \((?P<source>[^()]*\b(?:19|20)\d\d\b[^()]*)\)\.$")
DIFFERS, COST = "Differs from the paper: ", "Cost: "
# One example recipe alone and one with other axes, by axis.
EXAMPLES = {
    "evict": ("{}:0.25", "{}:0.25+int4+quest:0.1"),
    "quantize": ("{}", "snapkv:0.25+{}"),
    "sparse attention": ("{}:0.1", "snapkv:0.25+{}:0.1"),
}
_MORE = (
    "`lceval methods NAME` describes one. AMOUNT: a share of the context's tokens (0.25), or tokens (2048).\n"
    "THRESHOLD: threshold=FLOAT keeps the slots that score at least as high.\n"
    "when=chunk evicts after every `chunk` (1024) tokens that are read; when=decode after every `every` (128)\n"
    "that are written, of the answer (prompt=keep) or of all (prompt=evict); when=always after every step.\n"
    "kvAvB: keys in A bits and values in B (16, 8, 4 or 2, not equal), as kv8v4."
)


def records() -> list[dict[str, Any]]:
    """All methods, in the order of the axes."""
    return [record(name) for name in (recipe.FULL, *EVICTORS, *QUANTIZERS, *SPARSE_ATTENTION)]


def record(name: str) -> dict[str, Any]:
    """One method.

    Returns:
        `method`, `axis` (None for full), `amount` (whether one is required), `threshold` (whether one can replace it),
        `keys` (default and type by name), `when` (when it evicts, the default first), `description`, `source`,
        `details`, `differences`, `cost` (None where the docstring has none) and `examples`.

    Raises:
        UserError: unknown name; the message names the nearest valid one.
    """
    if name not in recipe.NAMES:
        near = get_close_matches(name, recipe.NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(recipe.NAMES)}"
        raise UserError(f"unknown KV method {name!r}: {hint}")
    policy: Any = QUANTIZERS.get(name) or EVICTORS.get(name) or SPARSE_ATTENTION.get(name)
    axis = "evict" if name in EVICTORS else "quantize" if name in QUANTIZERS else "sparse attention" if policy else None
    types = recipe.key_types(policy) if policy else {}
    return {
        "method": name,
        "axis": axis,
        "amount": axis in ("evict", "sparse attention"),
        "threshold": recipe.has_scale(policy),
        "keys": {
            key: {"default": value, "type": types.get(key, str).__name__}
            for key, value in recipe.defaults(name).items()
        },
        "when": recipe.when_values(policy) if name in EVICTORS else [],
        **_described(inspect.getdoc(policy) if policy else DESCRIPTION_OF_FULL),
        "examples": [example.format(name) for example in EXAMPLES[axis]] if axis else [name],
    }


def text(name: str = "", *, as_json: bool = False) -> str:
    """All methods in a table, or one in full."""
    if as_json:
        return json.dumps(record(name) if name else records(), indent=2)
    if name:
        return _in_full(record(name))
    mixed = [quantizer for quantizer in QUANTIZERS if quantizer.startswith("kv")]
    # Keys and values in different bits: one line for all pairs.
    shortened = [r | {"method": "kvAvB"} if r["method"] == mixed[0] else r for r in records()]
    lines = [_line(r) for r in shortened if r["method"] not in mixed]
    return f"{columns(lines)}\n\n{_MORE}"


def _described(docstring: str | None) -> dict[str, Any]:
    first, *paragraphs = (docstring or "").split("\n\n")
    first = " ".join(first.split())
    cited = CITED.match(first)
    labelled = {
        label: next((" ".join(p.removeprefix(label).split()) for p in paragraphs if p.startswith(label)), None)
        for label in (DIFFERS, COST)
    }
    return {
        "description": f"{cited['description']}." if cited else first,
        "source": cited["source"] if cited else None,
        "details": "\n\n".join(p for p in paragraphs if not p.startswith((DIFFERS, COST))) or None,
        "differences": labelled[DIFFERS],
        "cost": labelled[COST],
    }


def _line(method: dict[str, Any]) -> dict[str, str]:
    return {
        "method": method["method"] + ":AMOUNT" * method["amount"] + "|THRESHOLD" * method["threshold"],
        "axis": method["axis"] or "-",
        "keys": " ".join(_key(key, v) for key, v in method["keys"].items() if key != "when") or "-",
        "when": ", ".join(method["when"]) or "-",
        "source": method["source"] or "-",
    }


def _key(key: str, of: dict[str, Any]) -> str:
    """`key=default`, or `key=TYPE` where the default depends on the rest of the recipe."""
    return f"{key}={of['type'].upper() if of['default'] is None else recipe.spelled(of['default'])}"


def _in_full(method: dict[str, Any]) -> str:
    keys = [f"{_key(key, v)} ({v['type']})" for key, v in method["keys"].items() if key != "when"]
    when = ", ".join(method["when"])
    amount = "required, as in 0.25 (share of the context's tokens) or 2048 (tokens)"
    amount += "; or threshold=FLOAT: keep the slots that score at least as high" if method["threshold"] else ""
    facts = {
        "axis": method["axis"],
        "source": method["source"],
        "amount": amount if method["amount"] else None,
        "keys": ", ".join(keys) or None,
        "when": when.replace("chunk", f"chunk (with chunk={recipe.READ_CHUNK}, int)").replace(
            "decode", f"decode (with every={recipe.WRITE_EVERY}, int, and prompt=keep or evict)"
        )
        or None,
        "examples": ", ".join(method["examples"]),
        "differs from the paper": method["differences"],
        "cost": method["cost"],
    }
    body = [_wrapped(f"{label}: {value}", "    ") for label, value in facts.items() if value]
    details = f"\n\n{method['details']}" if method["details"] else ""
    return "\n".join([_wrapped(f"{method['method']}: {method['description']}"), "", *body]) + details


def _wrapped(paragraph: str, indent: str = "") -> str:
    return textwrap.fill(paragraph, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
