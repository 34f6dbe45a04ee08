"""`lceval train data`: make a file of training rows and say what is in it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer


def data(
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to write.")],
    dataset: Annotated[list[str], typer.Option(help="Of `lceval tasks`; repeatable.")],
    mode: Annotated[list[str], typer.Option(help="ao, id, idc, idq, rj, …; repeatable.")] = ["ao"],  # noqa: B006
    length: Annotated[float, typer.Option(help="Thousands of tokens; pools take fractions.")] = 1,
    split: Annotated[str, typer.Option(help="train, test or all, by source document.")] = "train",
    seed: Annotated[list[int], typer.Option(help="Each draws other contexts; repeatable.")] = [1234],  # noqa: B006
    questions: Annotated[int | None, typer.Option(help="On a context; default the dataset's.")] = None,
    negatives: Annotated[str | None, typer.Option(help="bm25, dense, hybrid or random.")] = None,
    length_matched: Annotated[
        bool | None, typer.Option(help="Negatives as long as gold documents; default where it can be.")
    ] = None,
    promote: Annotated[float, typer.Option(help="Least likeness to gold of what counts as gold; 0: none does.")] = 0.6,
    judge: Annotated[
        str | None, typer.Option(help="Confirms what counts as gold: openai:MODEL@BASE_URL, hf:NAME or rule.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows, in whole contexts.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Whose tokens are counted.")] = "smollm2-135m",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make training rows with their replies, and say what they are like."""
    from lceval.errors import UserError
    from lceval.judge.grader import of_passages
    from lceval.models import packaged
    from lceval.tasks.tokens import meter_for
    from lceval.training import data, figures

    if judge and not promote:
        raise UserError("--judge confirms what --promote finds: give a --promote above 0")
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
    with of_passages(judge) if judge else nullcontext() as confirming:
        rows, promotion = data.rows(spec, confirming)
    meter = meter_for("training data", {"pretrained": packaged.resolve(spec.tokenizer)})
    report = figures.report(spec, rows, promotion, meter, judge)
    data.write(output, spec, rows, report)
    typer.echo(json.dumps({"file": str(output), **report}, indent=2) if as_json else figures.text(report))
