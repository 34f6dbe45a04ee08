"""The commands `lceval tasks` and `lceval data ...`: list tasks, list and download their datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lceval.core.options import Json
from lceval.core.safe_text import echo

app = typer.Typer()
data = typer.Typer(help="List and download the datasets of the tasks.", rich_markup_mode=None, no_args_is_help=True)


@app.command()
def tasks(
    pattern: Annotated[
        str, typer.Argument(help="Part of a task name, or a pattern with * and ? (default: an overview of all tasks).")
    ] = "",
    groups: Annotated[bool, typer.Option("--groups", help="List task groups and their members instead.")] = False,
    as_json: Json = False,
) -> None:
    """List the tasks and whether their data is available.

    Also lists their modes, context lengths and context settings.
    """
    from lceval.data import listing

    if as_json:
        echo(json.dumps(listing.groups(pattern) if groups else listing.tasks(pattern), indent=2))
    elif groups:
        echo(listing.groups_text(pattern))
    else:
        echo(listing.tasks_text(pattern) if pattern else listing.overview())


@data.command("list")
def data_list(as_json: Json = False) -> None:
    """List the datasets with their sources and missing files."""
    from lceval.data import listing

    echo(json.dumps(listing.data(), indent=2) if as_json else listing.data_text())


@data.command("fetch")
def data_fetch(
    datasets: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Datasets, or tasks and groups for their datasets.")
    ],
    to: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Data folder (default $LCEVAL_DATA).")] = None,
    as_json: Json = False,
) -> None:
    """Download datasets from the Hugging Face hub.

    Existing files are skipped. Exit code 2: some files are not on the hub and must be provided by hand.
    """
    from lceval.data.fetch import fetch

    outcomes = []
    for outcome in fetch(datasets, to):
        outcomes.append(outcome)
        if not as_json:
            echo(str(outcome))
    if as_json:
        echo(json.dumps([vars(outcome) for outcome in outcomes], indent=2))
    if any(outcome.status == "provide" for outcome in outcomes):
        raise typer.Exit(2)


app.add_typer(data, name="data")
