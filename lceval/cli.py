"""The command line: verbs, results on stdout, progress on stderr, one line for an error.

Exit codes: 0 done, 1 regression, 2 bad usage, 3 not comparable, 4 infrastructure or unexpected, 5 inconclusive.
Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from lceval.errors import LcevalError, UserError
from lceval.judge.commands import app as judge
from lceval.train.commands import app as train

app = typer.Typer(
    help="Long-context evaluation over compressed KV caches.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Format = Literal["terminal", "markdown", "latex", "csv", "html", "json"]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    short_help="Evaluate; takes lm_eval's own `run` flags.",
)
def run(context: typer.Context, as_json: Json = False) -> None:
    """lm_eval's `run`, into a run folder (--output_path) that the same line resumes."""
    from lceval.run import report
    from lceval.run import run as run_evaluation
    from lceval.table import main as table_text

    outcome = run_evaluation(context.args)
    report(outcome)
    typer.echo(table_text([outcome.folder], "json" if as_json else "terminal"))


@app.command()
def demo(
    output_path: Annotated[Path, typer.Option("--output_path", "--output-path")] = Path("runs/demo"),
    limit: Annotated[int, typer.Option(help="Samples per recipe.")] = 32,
    as_json: Json = False,
) -> None:
    """Evaluate the packaged model on the shipped suite under four KV recipes; needs no hub, no GPU, no data."""
    from lceval.demo import demo as run_demo
    from lceval.table import main as table_text

    typer.echo(table_text(run_demo(output_path, limit), "json" if as_json else "terminal"))


@app.command()
def table(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, folders of them, or what lm_eval wrote.")],
    form: Annotated[Format, typer.Option("--format", help="How to print it.")] = "terminal",
    by: Annotated[
        Literal["task", "suite", "length"], typer.Option(help="What a row is, or is the mean over.")
    ] = "task",
    reference: Annotated[
        list[str] | None, typer.Option(help="Quote published figures: paper-table1, paper-table2; repeatable.")
    ] = None,
    require_kappa: Annotated[
        float | None, typer.Option(help="Exit code 1 if a judge agrees less with people, or is uncalibrated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set runs side by side: score with interval, what is left of full's, what was kept, what it cost."""
    from lceval.table import main as table_text

    typer.echo(
        table_text(runs, "json" if as_json else form, by=by, reference=reference or (), require_kappa=require_kappa)
    )


@app.command()
def sweep(
    grid: Annotated[Path | None, typer.Argument(help="grid.yaml: models, recipes, contexts, tasks, …")] = None,
    preset: Annotated[str | None, typer.Option(help="A shipped grid: mini, paper-table1, …")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the grid; repeatable.")] = None,
    output_path: Annotated[
        Path | None, typer.Option("--output_path", "--output-path", help="Default runs/NAME.")
    ] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Where cells are run.")] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes, each with a model; default one a GPU.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; default one of this machine.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its cost, run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run a grid of cells, each a run folder; the same line goes on. Exit code 4: some cells failed."""
    from lceval.sweep import command

    text, code = command.run(
        grid,
        preset,
        changes or [],
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
        list[Path] | None, typer.Argument(help="BASE and NEW: run folders; BASE may be a baseline.")
    ] = None,
    gate: Annotated[float | None, typer.Option(help="The drop that is too much, in the metric's units.")] = None,
    metric: Annotated[str | None, typer.Option(help="What to gate on, as gold_nll; default the headline.")] = None,
    inconclusive: Annotated[Literal["fail", "warn"], typer.Option(help="What too little data does.")] = "fail",
    plan: Annotated[bool, typer.Option("--plan", help="How many samples the gate needs [for BASE].")] = False,
    discordance: Annotated[float, typer.Option(help="For --plan: the share of scores that change.")] = 0.1,
    write_baseline: Annotated[Path | None, typer.Option(help="Write the baseline of the one run given.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Is NEW worse than BASE? 0 pass, 1 regression, 3 not comparable, 5 inconclusive."""
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
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that lm_eval wrote.")],
    output: Annotated[Path, typer.Option(help="HTML file to write (an earlier report is replaced).")],
    as_json: Json = False,
) -> None:
    """One HTML page of runs: leaderboard, plots and every sample; opens offline."""
    from lceval.report.page import write

    made = write(runs, output)
    if as_json:
        typer.echo(json.dumps({**vars(made), "html": str(made.html)}))
    else:
        typer.echo(
            f"{made.html}: {made.runs} runs, {made.rows} rows, {made.samples} samples, {made.bytes / 1e6:.1f} MB"
        )


@app.command()
def model(name: Annotated[str, typer.Argument(help="smollm2-135m")], as_json: Json = False) -> None:
    """Print the folder of a packaged model, which `--model hf`, vLLM or kvpress can load."""
    from lceval.models import packaged

    if name != packaged.NAME:
        raise UserError(f"no packaged model {name!r}; there is {packaged.NAME}")
    folder = str(packaged.folder())
    typer.echo(json.dumps({"name": name, "folder": folder}) if as_json else folder)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this installation; every finding comes with what to do about it."""
    from lceval.doctor import examine, render

    findings = examine()
    typer.echo(json.dumps([vars(f) for f in findings], indent=2) if as_json else render(findings))
    if any(f.level == "error" for f in findings):
        raise typer.Exit(4)


@app.command()
def tasks(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with * and ?.")] = "",
    groups: Annotated[bool, typer.Option("--groups", help="List groups and their members instead.")] = False,
    as_json: Json = False,
) -> None:
    """What can be run: modes, lengths, contexts, and whether the data is at hand."""
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


data = typer.Typer(help="The data of the tasks: what is at hand, and fetching the rest.", rich_markup_mode=None)
app.add_typer(data, name="data")


@data.command("list")
def data_list(as_json: Json = False) -> None:
    """Where each dataset comes from, and which files are missing."""
    from lceval import listing

    typer.echo(json.dumps(listing.data(), indent=2) if as_json else listing.data_text())


@data.command("fetch")
def data_fetch(
    datasets: Annotated[list[str], typer.Argument(help="Datasets, or tasks and groups for the datasets they read.")],
    to: Annotated[Path | None, typer.Option(help="The data folder; default LCEVAL_DATA.")] = None,
    as_json: Json = False,
) -> None:
    """Fill a data folder from the hub; what is there is skipped. Exit code 2: some files must be provided."""
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


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="A task, or loft_retrieval, loft_rag, loft_rag_multi.")],
    predictions: Annotated[Path, typer.Argument(help="jsonl: id, prediction and, without rows, ground_truth.")],
    gold: Annotated[Path | None, typer.Option(help="LOFT's queries, for LOFT's predictions.")] = None,
    by: Annotated[str | None, typer.Option(help="rows or ground_truth; default rows where they are at hand.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, as pretrained=NAME; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Apply a task's metrics to outputs made elsewhere; a missing or empty output is wrong, never dropped."""
    from lceval.score import render
    from lceval.score import score as score_predictions

    report = score_predictions(task, predictions, gold=gold, by=by, metadata=_pairs(metadata or []))
    typer.echo(json.dumps(report, indent=2) if as_json else render(report))


app.add_typer(judge, name="judge")
app.add_typer(train, name="train")

bench = typer.Typer(help="Measure this machine; every claim is a ratio within one run.", rich_markup_mode=None)
app.add_typer(bench, name="bench")
Pretrained = Annotated[str, typer.Option(help="A name or folder, as for --model hf.")]
Recipes = Annotated[list[str], typer.Option("--kv", help="A KV recipe; may be given more than once.")]


@bench.command("decode")
def bench_decode(
    kv: Recipes = ["snapkv:600"],  # noqa: B006
    pretrained: Pretrained = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Tokens of the context.")] = 6000,
    new_tokens: Annotated[int, typer.Option(help="Steps a round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds; the sides take turns.")] = 3,
    as_json: Json = False,
) -> None:
    """Decoding speed: --model hf, our own full cache, and recipes, in turns."""
    from lceval.bench.decode import bench as measure
    from lceval.bench.render import decode

    report = measure(pretrained, kv, tokens=tokens, new_tokens=new_tokens, rounds=rounds)
    typer.echo(json.dumps(report, indent=2) if as_json else decode(report))


@bench.command("eval")
def bench_eval(
    task: Annotated[str, typer.Option("--tasks", "--task", help="One task.")],
    kv: Recipes = ["full"],  # noqa: B006
    pretrained: Pretrained = "smollm2-135m",
    contexts: Annotated[int | None, typer.Option(help="Contexts, each with all its questions; default all.")] = None,
    hf: Annotated[bool, typer.Option(help="Let --model hf answer too.")] = True,
    diagnose: Annotated[str, typer.Option(help="none, gold or attention.")] = "none",
    query_aware: Annotated[
        bool, typer.Option("--query-aware", help="Let the question's tokens take part in the eviction scores.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", help="Questions at a time.")] = 1,
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of lm_eval's --metadata; repeatable.")] = None,
    nll_only: Annotated[bool, typer.Option("--nll-only", help="Generate nothing; predict the gold answer.")] = False,
    output: Annotated[Path | None, typer.Option(help="jsonl of samples; the same line goes on from it.")] = None,
    as_json: Json = False,
) -> None:
    """Quality and cost of recipes on one task: one prefill a context serves them all."""
    from lceval.bench.evaluate import bench as measure
    from lceval.bench.render import evaluation

    report = measure(
        task,
        kv,
        pretrained=pretrained,
        contexts=contexts,
        against_hf=hf,
        diagnose=diagnose,
        output=output,
        nll_only=nll_only,
        query_aware=query_aware,
        batch_size=batch_size,
        metadata=_pairs(metadata or []),
    )
    typer.echo(json.dumps(report, indent=2) if as_json else evaluation(report))


@bench.command("kernels")
def bench_kernels(
    predict: Annotated[str | None, typer.Option(help="h100, h200 or a100: what bytes and operations allow.")] = None,
    lengths: Annotated[list[int] | None, typer.Option("--length", help="Tokens; default 8k, 32k, 128k.")] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="Sequences; default 1, 8, 32.")] = None,
    keeps: Annotated[list[float] | None, typer.Option("--keep", help="Shares; default 1, .5, .25, .1.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a page with a plot.")] = None,
    as_json: Json = False,
) -> None:
    """On a GPU: a decoding step's attention for every store, against the memory's speed and against SDPA."""
    from lceval.bench import render
    from lceval.bench.kernels import bench as measure

    report = measure(predict, lengths, batches, keeps)
    if plot is not None:
        plot.write_text(render.kernels_plot(report))
    typer.echo(json.dumps(report, indent=2) if as_json else render.kernels(report))


@bench.command("shifted")
def bench_shifted(
    lengths: Annotated[list[int] | None, typer.Option("--length", help="Tokens; default 2k, 4k, 8k.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 9,
    kv_heads: Annotated[int, typer.Option("--kv-heads", help="KV heads.")] = 3,
    dim: Annotated[int, typer.Option(help="Of a head.")] = 64,
    group: Annotated[float, typer.Option(help="A group's share of the sequence.")] = 0.25,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    rounds: Annotated[int, typer.Option(help="Rounds; the sides take turns.")] = 5,
    as_json: Json = False,
) -> None:
    """Training's attention, full against LongLoRA's shifted, forward and backward."""
    from lceval.bench.render import shifted
    from lceval.bench.shifted import bench as measure

    report = measure(lengths, heads=heads, kv_heads=kv_heads, dim=dim, share=group, dtype=dtype, rounds=rounds)
    typer.echo(json.dumps(report, indent=2) if as_json else shifted(report))


@bench.command("aot")
def bench_aot(as_json: Json = False) -> None:
    """Compile every kernel for sm_80 and sm_90, without a GPU, and hold its cost against the limits."""
    from lceval.kernels import aot

    raise typer.Exit(aot.main(["--json"] if as_json else []))


def _pairs(texts: list[str]) -> dict[str, str | int]:
    """KEY=VALUE as lm_eval reads them; a whole number is one."""
    found: dict[str, str | int] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not (key and separator):
            raise UserError(f"--metadata {text!r}: expected KEY=VALUE")
        found[key] = int(value) if value.isdecimal() else value
    return found


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
        return _fail("interrupted; the same line goes on from here", 130)
    except Exception as error:
        # Typer keeps its usage errors private; they are the ones that format themselves.
        if usage := getattr(error, "format_message", None):
            return _fail(f"{usage()} (see lceval --help)", 2)
        if os.environ.get("LCEVAL_DEBUG"):
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        return _fail(f"unexpected {type(error).__name__}: {first} (LCEVAL_DEBUG=1 shows the traceback)", 4)


def _fail(message: str, code: int) -> int:
    typer.echo(f"lceval: error: {message}", err=True)
    return code
