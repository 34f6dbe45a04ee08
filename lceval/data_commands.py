"""The commands `lceval data ...`: list and download the datasets of the tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lceval.verbs import Json

app = typer.Typer(help="List and download the datasets of the tasks.", rich_markup_mode=None, no_args_is_help=True)


@app.command("list")
def data_list(as_json: Json = False) -> None:
    """List the datasets with their sources and missing files."""
    from lceval import listing

    typer.echo(json.dumps(listing.data(), indent=2) if as_json else listing.data_text())


@app.command("fetch")
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
    from lceval.fetch import fetch

    outcomes = []
    for outcome in fetch(datasets, to):
        outcomes.append(outcome)
        if not as_json:
            typer.echo(str(outcome))
    if as_json:
        typer.echo(json.dumps([vars(outcome) for outcome in outcomes], indent=2))
    if any(outcome.status == "provide" for outcome in outcomes):
        raise typer.Exit(2)
