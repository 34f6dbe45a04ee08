"""The commands `lceval bench ...`; each compares its sides within one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lceval.core.options import Json, key_values
from lceval.core.safe_text import echo

app = typer.Typer(
    help="Measure speed, memory and quality on this machine.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
Pretrained = Annotated[
    str, typer.Option(metavar="NAME", help="Model: a Hugging Face name, a folder, or the packaged smollm2-135m.")
]
Recipes = Annotated[list[str], typer.Option("--kv", metavar="RECIPE", help="KV recipe to measure (repeatable).")]


@app.command("decode")
def decode(
    kv: Recipes = ["snapkv:600"],  # noqa: B006
    pretrained: Pretrained = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Context length in tokens.")] = 6000,
    new_tokens: Annotated[int, typer.Option(help="Decoding steps per round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Number of rounds; the sides alternate in each.")] = 3,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Of the weights: float32, bfloat16, float16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure decoding speed: --model hf, full cache, KV recipes."""
    from lceval.bench import render
    from lceval.bench.decoding import bench

    report = bench(pretrained, kv, tokens=tokens, new_tokens=new_tokens, rounds=rounds, dtype=dtype)
    echo(json.dumps(report, indent=2) if as_json else render.decode(report))


@app.command("prefill")
def prefill(
    kv: Recipes = ["kvzap:0.25", "snapkv:0.25", "kvzip:0.25"],  # noqa: B006
    pretrained: Pretrained = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Context length in tokens.")] = 2000,
    rounds: Annotated[int, typer.Option(help="Number of rounds; the recipes alternate in each.")] = 5,
    scorer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Scorer of kvzap: folder or hub name (default the model's own).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what eviction adds to the prefill of a context."""
    from lceval.bench import render
    from lceval.bench.prefilling import bench

    report = bench(pretrained, kv, tokens=tokens, rounds=rounds, scorer=scorer)
    echo(json.dumps(report, indent=2) if as_json else render.prefill(report))


@app.command("context")
def context(
    kv: Annotated[str, typer.Option("--kv", metavar="RECIPE", help="KV recipe of the context.")] = "snapkv:0.25",
    pretrained: Pretrained = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Context length in tokens.")] = 8000,
    as_json: Json = False,
) -> None:
    """Measure opening a saved context against its prefill."""
    from lceval.bench import render
    from lceval.bench.opening import bench

    report = bench(pretrained, kv, tokens=tokens)
    echo(json.dumps(report, indent=2) if as_json else render.context(report))


@app.command("eval")
def evaluate(
    task: Annotated[str, typer.Option("--tasks", "--task", metavar="TASK", help="Name of one task.")],
    kv: Recipes = ["full"],  # noqa: B006
    pretrained: Pretrained = "smollm2-135m",
    contexts: Annotated[
        int | None, typer.Option(help="Number of contexts, each with all its questions (default all).")
    ] = None,
    hf: Annotated[bool, typer.Option(help="Also evaluate lm_eval's --model hf.")] = True,
    diagnose: Annotated[
        str,
        typer.Option(
            metavar="[none|gold|attention]",
            help="Extra metrics: gold adds gold_kept and gold_nll, attention adds ndcg10.",
        ),
    ] = "none",
    query_aware: Annotated[
        bool,
        typer.Option(
            "--query-aware", help="Let the question take part in the eviction scores (default query-agnostic)."
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", help="Questions per batch.")] = 1,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="lm_eval's --metadata, e.g. context=rag (repeatable)."),
    ] = None,
    nll_only: Annotated[
        bool,
        typer.Option(
            "--nll-only", help="Compute gold_nll only, without generation (requires --diagnose gold and --no-hf)."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSONL file of samples; rerun the same command to resume from it (default: keep no samples).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure quality and cost of KV recipes on one task.

    All recipes share one prefill per context.
    """
    from lceval.bench import render
    from lceval.bench.comparison import bench

    report = bench(
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
        metadata=key_values(metadata or []),
    )
    echo(json.dumps(report, indent=2) if as_json else render.evaluation(report))


@app.command("kernels")
def kernels(
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="[h100|h200|a100]",
            help="Print a roofline estimate for this GPU instead of measuring (default: measure).",
        ),
    ] = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--length", metavar="INT", help="Context length in tokens (repeatable; default 8192, 32768, 131072)."
        ),
    ] = None,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", metavar="INT", help="Batch size (repeatable; default 1, 8, 32).")
    ] = None,
    keeps: Annotated[
        list[float] | None,
        typer.Option(
            "--keep", metavar="FLOAT", help="Share of the cache that is kept (repeatable; default 1, 0.5, 0.25, 0.1)."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write an HTML page with a plot.")] = None,
    as_json: Json = False,
) -> None:
    """Measure the decode attention kernels on a GPU.

    Baselines: SDPA over the full cache, and the memory bandwidth.
    """
    from lceval.bench import render
    from lceval.bench.kernel_times import bench

    report = bench(predict, lengths, batches, keeps)
    if plot is not None:
        plot.write_text(render.kernels_plot(report))
    echo(json.dumps(report, indent=2) if as_json else render.kernels(report))


@app.command("shifted")
def shifted(
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--length", metavar="INT", help="Sequence length in tokens (repeatable; default 2048, 4096, 8192)."
        ),
    ] = None,
    heads: Annotated[int, typer.Option(help="Number of query heads.")] = 9,
    kv_heads: Annotated[int, typer.Option("--kv-heads", help="Number of KV heads.")] = 3,
    dim: Annotated[int, typer.Option(help="Head dimension.")] = 64,
    group: Annotated[float, typer.Option(help="Group size as a share of the sequence length.")] = 0.25,
    dtype: Annotated[str, typer.Option(metavar="[fp32|bf16]", help="Data type.")] = "fp32",
    rounds: Annotated[int, typer.Option(help="Number of rounds; the sides alternate in each.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure LongLoRA's shifted attention against full attention.

    Times are of one layer, forward and backward.
    """
    from lceval.bench import render
    from lceval.bench.shifted_times import bench

    report = bench(lengths, heads=heads, kv_heads=kv_heads, dim=dim, share=group, dtype=dtype, rounds=rounds)
    echo(json.dumps(report, indent=2) if as_json else render.shifted(report))


@app.command("aot")
def aot(as_json: Json = False) -> None:
    """Compile all Triton kernels for sm_80 and sm_90, without a GPU.

    Fails if a kernel exceeds the limits on registers, stack or spills.
    """
    from lceval.kernels.aot import main

    raise typer.Exit(main(["--json"] if as_json else []))
