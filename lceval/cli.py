"""The command line: results on stdout, progress on stderr, one line per error.

Exit codes: 0 done, 1 regression, 2 bad usage, 3 not comparable, 4 infrastructure or unexpected, 5 inconclusive.
Each command imports its heavy dependencies itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from lceval.bench.commands import app as bench
from lceval.data_commands import app as data
from lceval.errors import LcevalError, UserError
from lceval.judge.commands import app as judge
from lceval.train.commands import app as train
from lceval.verbs import Json, key_values

app = typer.Typer(
    help="Evaluate long-context language models over compressed KV caches.",
    epilog="Exit codes: 0 done, 1 regression, 2 bad usage, 3 not comparable, 4 infrastructure or unexpected error, "
    "5 inconclusive.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Format = Literal["terminal", "markdown", "latex", "csv", "html", "json"]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    short_help="Run an evaluation; takes the options of lm_eval's `run`.",
)
def run(context: typer.Context, as_json: Json = False) -> None:
    """Run an evaluation in a run folder (--output_path); rerun the same command to resume.

    Takes the options of lm_eval's `run` and prints the table of the finished run.
    """
    if {"-h", "--help"} & {*context.args}:
        from lceval.run_help import run_help

        typer.echo(run_help())
        return
    from lceval.run import report
    from lceval.run import run as run_evaluation
    from lceval.table import main as table_text

    outcome = run_evaluation(context.args)
    report(outcome)
    typer.echo(table_text([outcome.folder], "json" if as_json else "terminal"))


@app.command()
def demo(
    output_path: Annotated[
        Path,
        typer.Option("--output_path", "--output-path", metavar="FOLDER", help="Folder for the four run folders."),
    ] = Path("runs/demo"),
    limit: Annotated[int, typer.Option(help="Number of samples per recipe.")] = 32,
    as_json: Json = False,
) -> None:
    """Evaluate a small packaged model under four KV recipes.

    Needs no network, GPU or data.
    """
    from lceval.demo import demo as run_demo
    from lceval.table import main as table_text

    typer.echo(table_text(run_demo(output_path, limit), "json" if as_json else "terminal"))


@app.command()
def table(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run folders, folders of run folders, or lm_eval output folders."),
    ],
    output_format: Annotated[Format, typer.Option("--format", help="Output format.")] = "terminal",
    by: Annotated[
        Literal["task", "suite", "length"],
        typer.Option(help="Rows: one per task, or means per suite or per context length."),
    ] = "task",
    reference: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Published results to show below, marked as quoted: paper-table1, paper-table2 (repeatable; default "
            "none).",
        ),
    ] = None,
    require_kappa: Annotated[
        float | None,
        typer.Option(
            help="Minimum agreement of the judge with human labels (Cohen's kappa); exit code 1 if it is lower or "
            "unknown (default no check)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs in one table.

    Columns: score with confidence interval, retention against the full cache, KV size and speed.
    """
    from lceval.table import main as table_text

    text = table_text(
        runs, "json" if as_json else output_format, by=by, reference=reference or (), require_kappa=require_kappa
    )
    typer.echo(text)


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
    from lceval.sweep import command

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
    typer.echo(text)
    raise typer.Exit(code)


@app.command()
def check(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN", help="BASE and NEW: run folders; BASE may also be a baseline file (see --write-baseline)."
        ),
    ] = None,
    gate: Annotated[
        float | None,
        typer.Option(help="Largest acceptable drop, in the metric's units, e.g. 0.05 (required to compare)."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Metric to compare, e.g. gold_nll (default the task's headline metric)."),
    ] = None,
    inconclusive: Annotated[
        Literal["fail", "warn"],
        typer.Option(help="Exit status when the result is inconclusive: fail exits with 5, warn with 0."),
    ] = "fail",
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the sample size that --gate requires, optionally for one BASE.")
    ] = False,
    discordance: Annotated[
        float, typer.Option(help="With --plan: expected share of samples whose score changes.")
    ] = 0.1,
    write_baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a baseline file of one run and exit (scores and digests, no text)."),
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a JUnit XML report.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a markdown report.")] = None,
    as_json: Json = False,
) -> None:
    """Test whether run NEW is worse than run BASE, for use in CI.

    Runs are compared sample by sample. Exit codes: 0 pass, 1 regression, 3 not comparable, 5 inconclusive.
    """
    from lceval.check import command

    text, code = command.run(
        runs or [],
        gate=gate,
        metric=metric,
        inconclusive=inconclusive,
        plan=plan,
        discordance=discordance,
        write_baseline=write_baseline,
        junit=junit,
        markdown=markdown,
        as_json=as_json,
    )
    typer.echo(text)
    raise typer.Exit(code)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run folders, folders of run folders, or lm_eval output folders."),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="HTML file to write; an existing report is replaced.")],
    as_json: Json = False,
) -> None:
    """Write an HTML report: leaderboard, plots and all samples.

    The report is one file that opens offline.
    """
    from lceval.report.page import write

    page = write(runs, output)
    if as_json:
        typer.echo(json.dumps({**vars(page), "html": str(page.html)}))
    else:
        typer.echo(
            f"{page.html}: {page.runs} runs, {page.rows} rows, {page.samples} samples, {page.bytes / 1e6:.1f} MB"
        )


@app.command()
def model(name: Annotated[str, typer.Argument(help="Name of the model: smollm2-135m.")], as_json: Json = False) -> None:
    """Print the folder of a packaged model, in Hugging Face format."""
    from lceval.models import packaged

    if name != packaged.NAME:
        raise UserError(f"no packaged model {name!r}; there is {packaged.NAME}")
    folder = str(packaged.folder())
    typer.echo(json.dumps({"name": name, "folder": folder}) if as_json else folder)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this installation and print how to fix each problem."""
    from lceval.doctor import examine, render

    findings = examine()
    typer.echo(json.dumps([vars(f) for f in findings], indent=2) if as_json else render(findings))
    if any(f.level == "error" for f in findings):
        raise typer.Exit(4)


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
    from lceval import listing

    if as_json:
        typer.echo(json.dumps(listing.groups(pattern) if groups else listing.tasks(pattern), indent=2))
    elif groups:
        typer.echo(listing.groups_text(pattern))
    else:
        typer.echo(listing.tasks_text(pattern) if pattern else listing.overview())


@app.command()
def methods(
    name: Annotated[str, typer.Argument(help="A method to describe in full; default: list all.")] = "",
    as_json: Json = False,
) -> None:
    """List the KV methods of recipes with their keys, defaults and sources, or describe one."""
    from lceval import methods as listing

    typer.echo(listing.text(name, as_json=as_json))


@app.command()
def score(
    task: Annotated[
        str, typer.Argument(help="Task name, or loft_retrieval, loft_rag, loft_rag_multi for LOFT's own files.")
    ],
    predictions: Annotated[
        Path,
        typer.Argument(help="JSONL file with the fields id, prediction and, without the task's data, ground_truth."),
    ],
    gold: Annotated[
        Path | None, typer.Option(metavar="FILE", help="LOFT's file of queries (required for the loft_ tasks).")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="[rows|ground_truth]",
            help="Source of the references: the task's data or the predictions file (default rows where the data is "
            "available).",
        ),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="lm_eval's --metadata, e.g. pretrained=NAME for the tokenizer (repeatable)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score predictions made elsewhere with a task's metrics.

    Missing and empty predictions count as wrong.
    """
    from lceval.score import render
    from lceval.score import score as score_predictions

    scores = score_predictions(task, predictions, gold=gold, by=by, metadata=key_values(metadata or []))
    typer.echo(json.dumps(scores, indent=2) if as_json else render(scores))


app.add_typer(data, name="data")
app.add_typer(judge, name="judge")
app.add_typer(train, name="train")
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the `lceval` command."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(argv: list[str]) -> int:
    """Run one command line; returns its exit code."""
    try:
        command = typer.main.get_command(app)
        result = command.main(argv or ["--help"], prog_name="lceval", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except LcevalError as error:
        return _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted; rerun the same command to resume", 130)
    except Exception as error:
        # Typer's usage errors are private classes; only they have `format_message`.
        if usage := getattr(error, "format_message", None):
            return _fail(f"{usage()} (see lceval --help)", 2)
        if os.environ.get("LCEVAL_DEBUG"):
            raise
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return _fail(f"unexpected {type(error).__name__}: {first_line} (LCEVAL_DEBUG=1 shows the traceback)", 4)


def _fail(message: str, code: int) -> int:
    typer.echo(f"lceval: error: {message}", err=True)
    return code
