"""Command groups with a default command: `lceval train RECIPE` beside `lceval train eval`; `lceval judge RUN` too."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


def group_or(default: str) -> type[TyperGroup]:
    """A group that passes all arguments to the command `default` if the first is not one of its commands."""

    class Group(TyperGroup):
        default_command = default

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            named = args and (args[0] in self.commands or args[0] == "--help")
            return super().parse_args(ctx, args if named or not args else [default, *args])

    return Group
