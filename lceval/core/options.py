"""What commands share: the option --json, KEY=VALUE texts, and groups with a default command.

Such a group runs `lceval train RECIPE` beside `lceval train eval`, and `lceval judge RUN` likewise.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lceval.core.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


def key_values(texts: list[str]) -> dict[str, str | int]:
    """KEY=VALUE texts as lm_eval's --metadata reads them: whole numbers become int.

    Raises:
        UserError: a text without a key or without `=`.
    """
    metadata: dict[str, str | int] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not (key and separator):
            raise UserError(f"--metadata {text!r}: expected KEY=VALUE")
        # Python refuses to parse thousands of digits.
        metadata[key] = int(value) if value.isdecimal() and len(value) < 20 else value
    return metadata


def group_or(default: str) -> type[TyperGroup]:
    """A group that passes all arguments to the command `default` if the first is not one of its commands."""

    class Group(TyperGroup):
        default_command = default

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            named = args and (args[0] in self.commands or args[0] == "--help")
            return super().parse_args(ctx, args if named or not args else [default, *args])

    return Group
