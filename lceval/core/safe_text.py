"""Text from models, data and folder names is untrusted: control characters are shown, never sent to a terminal."""

from __future__ import annotations

import re
import sys

# The special characters of markdown, as far as they have an effect inside a line: `]` only where it completes a link or
# its definition, `_` only at the edge of a word, `&` only where it begins an entity.
_MARKDOWN = re.compile(r"""[\\`*<|~$]|\](?=[(\[]|:\s*\S+(?:\s+["'(].*)?$)|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])""")


def printable(text: str, keep: str = "") -> str:
    """The text with every invisible character but those in `keep` as its escape (`\\x1b`, `\\u202e`, `\\n`)."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def markdown(text: str) -> str:
    """The text as markdown that renders it as it is, on one line."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def echo(text: object, *, err: bool = False) -> None:
    """Print to stdout or stderr without control characters."""
    print(printable(str(text), keep="\n\t"), file=sys.stderr if err else sys.stdout, flush=True)
