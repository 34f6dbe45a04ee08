"""Command line of the judge: `lceval judge RUN...` and `lceval judge calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lceval.core.errors import InfrastructureError
from lceval.core.io import write_objects
from lceval.core.options import Json, group_or
from lceval.core.safe_text import echo

_RUNS = "runs"


app = typer.Typer(
    cls=group_or(_RUNS),
    help="Grade finished runs (lceval judge RUN...), or measure a judge's agreement with human labels (calibrate).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Spec = Annotated[
    str | None, typer.Option("--judge", help="Judge: openai:MODEL@BASE_URL, hf:NAME or rule (default: LCEVAL_JUDGE).")
]
Concurrency = Annotated[int, typer.Option(help="Number of parallel calls.")]
Timeout = Annotated[float, typer.Option(help="Timeout of a call in seconds.")]
Retries = Annotated[int, typer.Option(help="Maximum retries of a failed call.")]
Calls = Annotated[int | None, typer.Option(help="Maximum number of calls, retries included.")]
Tokens = Annotated[int | None, typer.Option(help="Maximum total tokens of prompts and replies.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Maximum tokens of a judge reply (raise for reasoning judges).")
]
MaxCharacters = Annotated[
    int,
    typer.Option(
        "--max-characters", help="Maximum characters of each block (document, answer, ...) in a judge prompt."
    ),
]
Replies = Annotated[Path | None, typer.Option(help="Reply cache, an SQLite file (default: in LCEVAL_CACHE).")]


@app.command(_RUNS)
def runs(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    judge: Spec = None,
    concurrency: Concurrency = 16,
    timeout: Timeout = 120.0,
    retries: Retries = 6,
    calls: Calls = None,
    tokens: Tokens = None,
    max_tokens: MaxTokens = None,
    max_characters: MaxCharacters = 24_000,
    require_kappa: Annotated[
        float | None,
        typer.Option(help="Minimum Cohen's kappa with human labels; exit with 1 if lower or uncalibrated."),
    ] = None,
    replies: Replies = None,
    as_json: Json = False,
) -> None:
    """Add judge metrics to finished runs. Exit code 4: some samples are unjudged; rerun the same command to resume."""
    from lceval.judge import after_run, kappas
    from lceval.judge.client import Limits
    from lceval.judge.connect import connect

    limits = Limits(
        concurrency=concurrency,
        retries=retries,
        calls=calls,
        tokens=tokens,
        timeout=timeout,
        max_tokens=max_tokens,
        max_characters=max_characters,
    )
    with connect(judge, "judging", limits, replies=replies) as client:
        if require_kappa is not None:
            calibration = kappas.find(client.judge.name, client.judge.revision)
            kappas.require(calibration["kappa"] if calibration else None, require_kappa, client.judge.name)
        reports = [after_run.judge_folder(folder, client) for folder in folders]
    echo(json.dumps(reports, indent=2) if as_json else "\n\n".join(map(after_run.render, reports)))
    if missing := sum(map(after_run.missing, reports)):
        raise InfrastructureError(
            f"{missing} samples are unjudged, because their calls failed: rerun the same command to resume"
        )


@app.command("calibrate")
def calibrate_judge(
    judge: Spec = None,
    limit: Annotated[int | None, typer.Option(help="Number of rows, stratified by label (default: all).")] = None,
    repeats: Annotated[int, typer.Option(help="Number of verdicts per row.", min=1)] = 1,
    probes: Annotated[int, typer.Option(help="Number of injection probes (0 disables).", min=0)] = 0,
    require_kappa: Annotated[float | None, typer.Option(help="Minimum Cohen's kappa; exit with 1 if lower.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="File of human-graded predictions (default: in LCEVAL_DATA).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON Lines file to write, with ids and labels of every row.")
    ] = None,
    concurrency: Concurrency = 16,
    timeout: Timeout = 120.0,
    retries: Retries = 6,
    calls: Calls = None,
    tokens: Tokens = None,
    max_tokens: MaxTokens = None,
    max_characters: MaxCharacters = 24_000,
    replies: Replies = None,
    as_json: Json = False,
) -> None:
    """Measure agreement with human labels, self-consistency and robustness to injection on FinanceBench."""
    from lceval.judge import calibration, kappas
    from lceval.judge.client import Limits
    from lceval.judge.connect import connect

    rows = calibration.stratified(calibration.graded(data), limit)
    limits = Limits(
        concurrency=concurrency,
        retries=retries,
        calls=calls,
        tokens=tokens,
        timeout=timeout,
        max_tokens=max_tokens,
        max_characters=max_characters,
    )
    with connect(judge, "calibrating", limits, replies=replies) as client:
        report, lines = calibration.calibrate(client, rows, repeats=repeats, probed=probes)
    kappas.keep(report)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_objects(output, lines)
    echo(json.dumps(report, indent=2) if as_json else calibration.render(report))
    kappa = report["kappa"]
    if require_kappa is not None and (kappa is None or kappa < require_kappa):
        value = "undefined" if kappa is None else f"{kappa:.3f}"
        raise kappas.BelowError(f"kappa of {client.judge.name} is {value}; --require-kappa is {require_kappa}")
