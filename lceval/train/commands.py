"""The command line of training: `lceval train RECIPE`, `lceval train eval` and `lceval train data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lceval.train.data_command import data
from lceval.verbs import group_or

app = typer.Typer(
    cls=group_or("recipe"),
    help="Tune an adapter by a recipe (lceval train RECIPE), and say what it is worth (eval).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
app.command("data")(data)


@app.command("recipe", hidden=True)
def recipe(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe's name.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. optim.max_steps=50 (repeatable)."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Output folder (default runs/RECIPE).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print tokens, steps and memory; train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train by a recipe; the same line goes on from the last checkpoint."""
    from lceval.train import tune

    if text := tune.run(name, changes or [], output, dry_run=dry_run, as_json=as_json):
        typer.echo(text)


@app.command("eval")
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="What lceval train wrote.")],
    kv: Annotated[list[str] | None, typer.Option("--kv", help="A KV recipe; repeatable.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", "--task", help="Default: the other side of its data.")
    ] = None,
    output_path: Annotated[Path | None, typer.Option("--output_path", "--output-path", help="ADAPTER/eval.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions a cell.")] = None,
    as_json: Json = False,
) -> None:
    """Base against adapter: the whole context, RAG, KV recipes, on held-out questions; the same line goes on."""
    from lceval.train import evaluate as held_out

    text, code = held_out.run(adapter, kv or [], tasks or [], output_path, limit, as_json=as_json)
    typer.echo(text)
    raise typer.Exit(code)
