"""Benchmark reports as text."""

from __future__ import annotations

from typing import Any

from lceval.bench.comparison import METRICS
from lceval.core.text_tables import aligned


def decode(report: dict[str, Any]) -> str:
    """The sides of `bench decode`, one per line."""
    rows = [["cache", "ms/token", "KV MB", "read MB/step", "x hf", "x full"]]
    rows += [
        [
            side["name"],
            f"{side['ms_per_token']:.1f}",
            f"{side['kv_bytes'] / 1e6:.1f}",
            f"{side['bytes_read_per_step'] / 1e6:.1f}",
            f"{side['speedup_vs_hf']:.2f}",
            f"{side['speedup_vs_full']:.2f}",
        ]
        for side in report["sides"]
    ]
    head = f"{report['model']}, {report['context_tokens']} tokens, {report['dtype']}, {report['machine']['processor']}"
    return f"{head}, {report['machine']['threads']} threads\n{aligned(rows)}"


def prefill(report: dict[str, Any]) -> str:
    """The recipes of `bench prefill`, one per line."""
    timed = ["prefill s", "compress s", "total vs full", "scoring s", "scoring vs prefill"]
    rows = [["recipe", *timed, "KV MB", "peak KV MB", "memory MB"]]
    rows += [
        [
            side["name"],
            *(f"{side[name]:.3f}" for name in ("prefill_s", "compress_s")),
            f"{100 * side['overhead']:+.1f}%",
            f"{side['scoring_s']:.3f}",
            f"{100 * side['scoring_overhead']:.1f}%",
            *(_number(side[name], "{:.1f}", 1e-6) for name in ("kv_bytes", "peak_kv_bytes", "memory_bytes")),
        ]
        for side in report["sides"]
    ]
    return f"{report['model']}, {report['context_tokens']} tokens, {report['rounds']} rounds\n{aligned(rows)}"


def context(report: dict[str, Any]) -> str:
    """The steps of `bench context`, one per line."""
    steps = {
        "prefill": "prefill and compression",
        "save": "save",
        "identify": "hash of the model, once",
        "open": "open",
    }
    rows = [["step", "seconds"], *([label, f"{report[f'{step}_s']:.3f}"] for step, label in steps.items())]
    head = (
        f"{report['model']}, {report['recipe']}, {report['context_tokens']} tokens, {report['file_bytes'] / 1e6:.1f} MB"
    )
    same = "the same answer" if report["same_answer"] else "ANOTHER ANSWER"
    return f"{head}\n{aligned(rows)}\nprefill / (hash + open) = {report['speedup']:.1f}, {same}"


def evaluation(report: dict[str, Any]) -> str:
    """The sides of `bench eval`, one per line; metrics that were not measured have no column."""
    metrics = [m for m in METRICS if any(m in side for side in report["sides"])]
    rows = [["KV", *metrics, "KV kept", "KV MB", "read MB/step", "seconds", "x hf", "x full", "same"]]
    rows += [
        [
            side["kv"],
            *(_interval(side.get(metric)) for metric in metrics),
            _number(side["kept_share"], "{:.3f}"),
            _number(side["kv_bytes"], "{:.1f}", 1e-6),
            _number(side["bytes_read_per_step"], "{:.1f}", 1e-6),
            _number(side["seconds"], "{:.1f}"),
            _number(side["speedup_vs_hf"], "{:.2f}"),
            _number(side["speedup_vs_full"], "{:.2f}"),
            _number(side["same_as_full"], "{:.2f}"),
        ]
        for side in report["sides"]
    ]
    head = f"{report['task']}, {report['pretrained']}, {report['contexts']} contexts, {report['samples']} questions"
    return f"{head}\n{aligned(rows)}"


def shifted(report: dict[str, Any]) -> str:
    """The lengths of `bench shifted`, one per line."""
    rows = [["tokens", "group", "full ms", "shifted ms", "x full"]]
    rows += [
        [str(r["tokens"]), str(r["group"]), f"{r['full_ms']:.1f}", f"{r['shifted_ms']:.1f}", f"{r['speedup']:.2f}"]
        for r in report["rows"]
    ]
    machine = report["machine"]
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    head = f"{report['heads']} heads, {report['kv_heads']} KV heads of {report['dim']}, {report['dtype']}, forward and"
    return f"{head} backward, {device}, {machine['threads']} threads\n{aligned(rows)}"


def kernels(report: dict[str, Any]) -> str:
    """The cases of `bench kernels`, one per line."""
    predicted = report["predicted"]
    bound = "bound" if predicted else "of copy"
    rows = [["KV", "length", "batch", "keep", "us", "floor us", bound, "sdpa us", "x sdpa", "ideal x"]]
    for row in report["rows"]:
        head = [row["store"], str(row["length"]), str(row["batch"]), f"{row['keep']:g}"]
        if error := row.get("error"):
            rows.append([*head, error, *["-"] * 5])
            continue
        share = row["bound_by"] if predicted else _number(row["bandwidth_share"], "{:.2f}")
        times = [_number(row[key], "{:.1f}") for key in ("us", "floor_us")]
        ratios = [_number(row[key], "{:.2f}") for key in ("speedup_vs_sdpa", "ideal_speedup")]
        rows.append([*head, *times, share, _number(row["sdpa_us"], "{:.1f}"), *ratios])
    if predicted:
        return f"predicted for {predicted}, one layer of Llama-3.1-8B, 16 bit\n{aligned(rows)}"
    side = report["prefill"]
    text = (
        f"{report['machine']['device']}, copy {report['copy_bytes_s'] / 1e12:.2f} TB/s, one layer of Llama-3.1-8B, bf16"
    )
    prefill = (
        f"scoring and compacting {side['length']} tokens to 25%: {side['score_us'] + side['compact_us']:.0f} us, "
        f"{100 * side['share']:.1f}% of the layer's prefill ({100 * side['share_int4']:.1f}% with int4)"
    )
    return f"{text}\n{aligned(rows)}\n{prefill}"


def kernels_plot(report: dict[str, Any]) -> str:
    """A self-contained page: speedup over SDPA by share kept, one panel per length and batch."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = [row for row in report["rows"] if row.get("speedup_vs_sdpa")]
    lengths, batches, recipes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("length", "batch", "store"))
    titles = [f"{length:,} tokens, batch {batch}" for length in lengths for batch in batches]
    figure = make_subplots(len(lengths), len(batches), subplot_titles=titles, shared_xaxes=True, shared_yaxes=True)
    palette = ("#1f6feb", "#d1495b", "#2a9d8f", "#8f5bd1", "#e08e0b", "#5c6773")
    for number, recipe in enumerate(recipes):
        for panel, (length, batch) in enumerate((length, batch) for length in lengths for batch in batches):
            own = [row for row in rows if (row["store"], row["length"], row["batch"]) == (recipe, length, batch)]
            figure.add_trace(
                go.Scatter(
                    x=[row["keep"] for row in own],
                    y=[row["speedup_vs_sdpa"] for row in own],
                    name=recipe,
                    legendgroup=recipe,
                    showlegend=panel == 0,
                    mode="lines+markers",
                    line={"color": palette[number % len(palette)]},
                ),
                row=panel // len(batches) + 1,
                col=panel % len(batches) + 1,
            )
    source = f"predicted for {report['predicted']}" if report["predicted"] else report["machine"]["device"]
    figure.update_layout(
        title=f"Decode attention: speedup over SDPA on the full cache ({source})", template="plotly_white"
    )
    figure.update_xaxes(type="log", tickvals=[0.1, 0.25, 0.5, 1])
    figure.update_yaxes(type="log")
    return str(figure.to_html(include_plotlyjs=True, div_id="kernels"))


def _number(value: float | None, template: str, scale: float = 1.0) -> str:
    return "-" if value is None else template.format(value * scale)


def _interval(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    if score["low"] is None:
        return f"{score['mean']:.3f}"
    return f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
