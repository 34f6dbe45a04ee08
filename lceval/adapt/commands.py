"""The commands `lceval train RECIPE`, `lceval train eval` and `lceval train data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lceval.adapt.data_command import data
from lceval.core.options import Json, group_or

app = typer.Typer(
    cls=group_or("recipe"),
    help="Train an adapter from a recipe (lceval train RECIPE) and evaluate it against its base model (eval).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("data")(data)


# Extra arguments are rejected below, by an error that names --set.
@app.command("recipe", hidden=True, context_settings={"allow_extra_args": True})
def recipe(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file or name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. optim.max_steps=50 (repeatable)."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Output folder (default runs/RECIPE).")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print tokens, steps and memory without training.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train from a recipe. Rerun the same command to resume from the last checkpoint."""
    from lceval.adapt import tune
    from lceval.core.errors import UserError

    if context.args:
        raise UserError(f"unexpected argument {context.args[0]!r}: override recipe keys with --set KEY=VALUE")
    if text := tune.run(name, overrides or [], output, dry_run=dry_run, as_json=as_json):
        typer.echo(text)


@app.command("eval")
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Output folder of lceval train.")],
    kv: Annotated[
        list[str] | None, typer.Option("--kv", help="KV recipe (repeatable; default full and three evictions).")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", "--task", help="Task (repeatable; default the tasks trained on, with held-out questions)."
        ),
    ] = None,
    output_path: Annotated[
        Path | None, typer.Option("--output_path", "--output-path", help="Output folder (default ADAPTER/eval).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of questions per cell.")] = None,
    as_json: Json = False,
) -> None:
    """Compare base and adapter on held-out questions: full context, RAG and KV recipes. Rerun to resume."""
    from lceval.adapt import evaluate as evaluation

    text, code = evaluation.run(adapter, kv or [], tasks or [], output_path, limit, as_json=as_json)
    typer.echo(text)
    raise typer.Exit(code)
