"""The commands that evaluate: `run`, `demo`, `sweep`, and `doctor`, `methods` and `model` beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from lceval.core.errors import UserError
from lceval.core.options import Json
from lceval.core.safe_text import echo

app = typer.Typer()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    short_help="Run an evaluation; takes the options of lm_eval's `run`.",
)
def run(context: typer.Context, as_json: Json = False) -> None:
    """Run an evaluation in a run folder (--output_path); rerun the same command to resume.

    Takes the options of lm_eval's `run` and prints the table of the finished run.
    """
    if {"-h", "--help"} & {*context.args}:
        from lceval.runs.run_help import run_help

        echo(run_help())
        return
    from lceval.analysis.table import main as table_text
    from lceval.runs.folder import report
    from lceval.runs.runner import run as run_evaluation

    outcome = run_evaluation(context.args)
    report(outcome)
    echo(table_text([outcome.folder], "json" if as_json else "terminal"))


@app.command()
def demo(
    output_path: Annotated[
        Path,
        typer.Option("--output_path", "--output-path", metavar="FOLDER", help="Folder for the run folders."),
    ] = Path("runs/demo"),
    limit: Annotated[int, typer.Option(help="Number of samples per recipe.")] = 32,
    as_json: Json = False,
) -> None:
    """Evaluate a small packaged model under five KV recipes.

    Needs no network, GPU or data.
    """
    from lceval.analysis.table import main as table_text
    from lceval.runs.demo import demo as run_demo

    echo(table_text(run_demo(output_path, limit), "json" if as_json else "terminal"))


@app.command()
def sweep(
    grid: Annotated[
        Path | None,
        typer.Argument(
            metavar="GRID", help="YAML file with models, recipes, tasks, ... (see docs/sweep.md); or use --preset."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Packaged grid: mini, paper-table1, paper-table2 or paper-table12 (default: none, use GRID).",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a grid key, e.g. limit=8 (repeatable)."),
    ] = None,
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output_path", "--output-path", metavar="FOLDER", help="Folder for the run folders (default runs/NAME)."
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Execution engine: processes of this machine, or a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of worker processes, each with its own model (default one per GPU, else 1)."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Address of a running Ray cluster (default: start one on this machine)."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its estimated cost, then exit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate all combinations of models, recipes, tasks and more.

    Each combination is a cell with its own run folder. Rerun the same command to resume. Exit code 4: some cells
    failed.
    """
    from lceval.runs.sweep import command

    text, code = command.run(
        grid,
        preset,
        overrides or [],
        output_path,
        engine=engine,
        workers=workers,
        address=address,
        dry_run=dry_run,
        as_json=as_json,
    )
    echo(text)
    raise typer.Exit(code)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this installation and print how to fix each problem."""
    from lceval.runs.doctor import examine, render

    findings = examine()
    echo(json.dumps([vars(f) for f in findings], indent=2) if as_json else render(findings))
    if any(f.level == "error" for f in findings):
        raise typer.Exit(4)


@app.command()
def methods(
    name: Annotated[str, typer.Argument(help="A method to describe in full; default: list all.")] = "",
    as_json: Json = False,
) -> None:
    """List the KV methods of recipes with their keys, defaults and sources, or describe one."""
    from lceval.runs import methods as listing

    echo(listing.text(name, as_json=as_json))


@app.command()
def model(name: Annotated[str, typer.Argument(help="Name of the model: smollm2-135m.")], as_json: Json = False) -> None:
    """Print the folder of a packaged model, in Hugging Face format."""
    from lceval import packaged

    if name != packaged.NAME:
        raise UserError(f"no packaged model {name!r}; there is {packaged.NAME}")
    folder = str(packaged.folder())
    echo(json.dumps({"name": name, "folder": folder}) if as_json else folder)
