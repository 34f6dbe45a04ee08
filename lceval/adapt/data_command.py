"""`lceval train data`: write a file of training rows and report statistics on it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from lceval.core.options import Json


def data(
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Output file.")],
    dataset: Annotated[list[str], typer.Option(help="Dataset of `lceval tasks` (repeatable).")],
    mode: Annotated[list[str], typer.Option(help="Task mode: ao, id, idc, idq, rj, … (repeatable).")] = ["ao"],  # noqa: B006
    length: Annotated[float, typer.Option(help="Prompt length in thousands of tokens; fractions for pools.")] = 1,
    split: Annotated[str, typer.Option(help="Split by source document: train, test or all.")] = "train",
    seed: Annotated[list[int], typer.Option(help="Seed of the contexts (repeatable).")] = [1234],  # noqa: B006
    questions: Annotated[int | None, typer.Option(help="Questions per context (default: the dataset's).")] = None,
    negatives: Annotated[
        str | None, typer.Option(help="Ranking of hard negatives: bm25, dense, hybrid or random.")
    ] = None,
    length_matched: Annotated[
        bool | None, typer.Option(help="Match the lengths of negatives to gold documents (default where supported).")
    ] = None,
    promote: Annotated[
        float, typer.Option(help="Similarity threshold for relabelling negatives as gold (0 disables).")
    ] = 0.6,
    judge: Annotated[
        str | None,
        typer.Option(help="Judge that confirms relabelled negatives: openai:MODEL@BASE_URL, hf:NAME or rule."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of rows; contexts stay whole.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Model whose tokenizer counts the tokens.")] = "smollm2-135m",
    as_json: Json = False,
) -> None:
    """Write training rows with their target replies and report statistics on them."""
    from lceval import packaged
    from lceval.adapt.graders import of_passages
    from lceval.core.errors import UserError
    from lceval.tasks.tokens import meter_for
    from lceval.training import data, figures

    if judge and not promote:
        raise UserError("--judge confirms what --promote relabels: set --promote above 0")
    spec = data.spec(
        datasets=dataset,
        modes=mode,
        length_k=length,
        split=split,
        seeds=seed,
        questions=questions,
        negatives=negatives,
        length_matched=length_matched,
        promote=promote or None,
        limit=limit,
        tokenizer=tokenizer,
    )
    with of_passages(judge) if judge else nullcontext() as passage_judge:
        rows, promotion = data.rows(spec, passage_judge)
    meter = meter_for("training data", {"pretrained": packaged.resolve(spec.tokenizer)})
    report = figures.report(spec, rows, promotion, meter, judge)
    data.write(output, spec, rows, report)
    typer.echo(json.dumps({"file": str(output), **report}, indent=2) if as_json else figures.text(report))
