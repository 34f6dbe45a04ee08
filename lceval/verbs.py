"""Command groups that are also commands: `lceval train RECIPE` beside `lceval train eval`, and so `lceval judge`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


def group_or(default: str) -> type[TyperGroup]:
    """A group whose first word may be none of its commands: then it is an argument of `default`."""

    class Group(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            named = args and (args[0] in self.commands or args[0] == "--help")
            return super().parse_args(ctx, args if named or not args else [default, *args])

    return Group
