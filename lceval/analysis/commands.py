"""The commands on finished runs: `table`, `check`, `report`, and `score` on predictions made elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from lceval.core.errors import UserError
from lceval.core.options import Json, key_values
from lceval.core.safe_text import echo

Format = Literal["terminal", "markdown", "latex", "csv", "html", "json"]

app = typer.Typer()


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
    from lceval.analysis.table import main as table_text

    text = table_text(
        runs, "json" if as_json else output_format, by=by, reference=reference or (), require_kappa=require_kappa
    )
    echo(text)


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
    from lceval.analysis.check import command

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
    echo(text)
    raise typer.Exit(code)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run folders, folders of run folders, or lm_eval output folders."),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="HTML file to write; an existing report is replaced.")
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write a static site instead; an existing site is replaced."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an HTML report (--output), or a leaderboard as a static site (--site).

    The report is one file that opens offline, with plots and all samples. The site has methods by budget, a plot, a
    page a run, and downloads.
    """
    if (output is None) == (site is None):
        raise UserError("pass either --output FILE or --site FOLDER")
    if site is not None:
        from lceval.analysis.report.site import write as write_site

        written = write_site(runs, site)
        if as_json:
            echo(json.dumps({**vars(written), "folder": str(site)}))
        else:
            size = f"{written.bytes / 1e6:.1f} MB"
            echo(f"{site}: {written.runs} runs, {written.rows} rows, {written.samples} samples, {size}")
        return
    from lceval.analysis.report.page import write

    assert output is not None
    page = write(runs, output)
    if as_json:
        echo(json.dumps({**vars(page), "html": str(page.html)}))
    else:
        echo(f"{page.html}: {page.runs} runs, {page.rows} rows, {page.samples} samples, {page.bytes / 1e6:.1f} MB")


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
    from lceval.analysis.predictions import render
    from lceval.analysis.predictions import score as score_predictions

    scores = score_predictions(task, predictions, gold=gold, by=by, metadata=key_values(metadata or []))
    echo(json.dumps(scores, indent=2) if as_json else render(scores))
