"""The command line of the judge: `lceval judge RUN…` and `lceval judge calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lceval.errors import InfrastructureError
from lceval.verbs import group_or

_RUNS = "runs"


app = typer.Typer(
    cls=group_or(_RUNS),
    help="Judged metrics for runs that are done (lceval judge RUN…), and what a judge is worth (calibrate).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Spec = Annotated[str | None, typer.Option("--judge", help="openai:MODEL@BASE_URL, hf:NAME or rule; else LCEVAL_JUDGE.")]
Concurrency = Annotated[int, typer.Option(help="Calls at a time.")]
Timeout = Annotated[float, typer.Option(help="Seconds for one reply.")]
Retries = Annotated[int, typer.Option(help="Further attempts at a call that failed.")]
Calls = Annotated[int | None, typer.Option(help="At most so many calls, retries included.")]
Tokens = Annotated[int | None, typer.Option(help="At most so many tokens, prompts and replies together.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Of a reply; a judge that thinks needs more.")]
MaxCharacters = Annotated[int, typer.Option("--max-characters", help="Of a block that the judge is shown.")]
Replies = Annotated[Path | None, typer.Option(help="The file of replies; default in LCEVAL_CACHE.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
        float | None, typer.Option(help="Refuse a judge calibrated below this, or not at all; exit code 1.")
    ] = None,
    replies: Replies = None,
    as_json: Json = False,
) -> None:
    """Add judged metrics beside a run's own. Exit code 4: some samples are unjudged; the same line goes on."""
    from lceval.judge import afterwards, calibrations
    from lceval.judge.asking import asking
    from lceval.judge.client import Limits

    limits = Limits(concurrency=concurrency, retries=retries, calls=calls, tokens=tokens)
    with asking(
        judge,
        "judging",
        replies=replies,
        timeout=timeout,
        max_tokens=max_tokens,
        max_characters=max_characters,
        limits=limits,
    ) as (made, client):
        if require_kappa is not None:
            known = calibrations.find(made.name, made.revision)
            calibrations.require(known["kappa"] if known else None, require_kappa, made.name)
        reports = [afterwards.judge_folder(folder, made, client) for folder in folders]
    typer.echo(json.dumps(reports, indent=2) if as_json else "\n\n".join(map(afterwards.render, reports)))
    if missing := sum(map(afterwards.missing, reports)):
        raise InfrastructureError(
            f"{missing} samples are unjudged for want of a reply: the same line asks for them again"
        )


@app.command("calibrate")
def calibrate_judge(
    judge: Spec = None,
    limit: Annotated[int | None, typer.Option(help="Rows, the grades in their proportions; default all.")] = None,
    repeats: Annotated[int, typer.Option(help="Times that each row is judged.", min=1)] = 1,
    probes: Annotated[int, typer.Option(help="Wrong answers to dress up; 0 for none.", min=0)] = 0,
    require_kappa: Annotated[float | None, typer.Option(help="Exit code 1 below this agreement.")] = None,
    data: Annotated[Path | None, typer.Option(help="The graded predictions; default in LCEVAL_DATA.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write a line a row: ids and grades, no text.")] = None,
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
    """Agreement with the people who graded FinanceBench's predictions, self-consistency, and attacks."""
    from lceval.judge import calibrate, calibrations
    from lceval.judge.asking import asking
    from lceval.judge.client import Limits

    rows = calibrate.stratified(calibrate.graded(data), limit)
    limits = Limits(concurrency=concurrency, retries=retries, calls=calls, tokens=tokens)
    with asking(
        judge,
        "calibrating",
        replies=replies,
        timeout=timeout,
        max_tokens=max_tokens,
        max_characters=max_characters,
        limits=limits,
    ) as (made, client):
        report, lines = calibrate.calibrate(made, client, rows, repeats=repeats, probed=probes)
    calibrations.keep(report)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    typer.echo(json.dumps(report, indent=2) if as_json else calibrate.render(report))
    found = report["kappa"]
    if require_kappa is not None and (found is None or found < require_kappa):
        said = "is undefined" if found is None else f"is {found:.3f}"
        raise calibrations.BelowError(f"kappa of {made.name} {said}, and {require_kappa} was required")
