"""The commands `lceval train RECIPE`, `lceval train eval`, `lceval train data` and `lceval train scorer`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from lceval.core.errors import UserError
from lceval.core.options import Json, group_or
from lceval.core.safe_text import echo

app = typer.Typer(
    cls=group_or("recipe"),
    help="Train an adapter from a recipe (lceval train RECIPE), evaluate it against its base model (eval), or train a "
    "scorer of KV slots (scorer).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file or name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. model.dtype=float32 (repeatable)."),
]
Output = Annotated[Path | None, typer.Option(help="Output folder (default runs/RECIPE).")]


# Extra arguments are rejected below, by an error that names --set.
@app.command("recipe", hidden=True, context_settings={"allow_extra_args": True})
def recipe(
    context: typer.Context,
    name: Recipe,
    overrides: Overrides = None,
    output: Output = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print tokens, steps and memory without training.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train from a recipe. Rerun the same command to resume from the last checkpoint."""
    from lceval.adapt import tune

    _only_options(context)
    if text := tune.run(name, overrides or [], output, dry_run=dry_run, as_json=as_json):
        echo(text)


@app.command("scorer", context_settings={"allow_extra_args": True})
def scorer(
    context: typer.Context,
    name: Recipe,
    overrides: Overrides = None,
    output: Output = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print tokens and bytes without training.")] = False,
    as_json: Json = False,
) -> None:
    """Train a scorer of KV slots, for kv=kvzap. Rerun the same command to resume from the last checkpoint."""
    from lceval.adapt import tune_scorer

    _only_options(context)
    echo(tune_scorer.run(name, overrides or [], output, dry_run=dry_run, as_json=as_json))


def _only_options(context: typer.Context) -> None:
    if context.args:
        raise UserError(f"unexpected argument {context.args[0]!r}: override recipe keys with --set KEY=VALUE")


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
    echo(text)
    raise typer.Exit(code)


@app.command("data")
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
    echo(json.dumps({"file": str(output), **report}, indent=2) if as_json else figures.text(report))
