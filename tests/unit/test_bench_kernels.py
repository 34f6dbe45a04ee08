"""The kernel benchmark: cases match their description, and predictions match built layers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from lceval.bench import kernel_times, render
from lceval.bench.kernel_times import KernelCase, Shape, build, predict, read_bytes
from lceval.cli import invoke
from lceval.models.recipe import parse

ROOT = Path(__file__).parents[2]
SMALL = Shape(heads=4, kv_heads=2, dim=64, hidden=64, inner=96)


@pytest.mark.parametrize(
    "case", [*kernel_times.cases([500], [2], [1.0, 0.25])], ids=lambda case: f"{case.recipe}-{case.keep}"
)
def test_a_case_keeps_and_attends_to_the_share_in_its_name(case: KernelCase) -> None:
    keep = case.keep
    kv = build(case, SMALL, "cpu", torch.float32)
    assert kv.counts == tuple(kernel_times.ragged(500, keep, 2)) * 2
    assert sum(kv.counts) == pytest.approx(4 * 500 * keep, rel=0.01)
    if parse(case.recipe).sparse_attention is not None:
        # 10% of the slots, and an index of at most 20% of the bytes.
        assert kv.read_bytes < 0.35 * kv.kept_bytes
        return
    q = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(5))
    o, _ = kernel_times.dispatch.attend(q, kv, 0.125)
    k, v = kv.head(3)  # the second sequence's second KV head, shared by query heads 2 and 3
    dense = (0.125 * q[1, 2:, 0] @ k.T).softmax(-1) @ v
    torch.testing.assert_close(o[1, 2:, 0], dense, rtol=1e-5, atol=1e-5)


def test_speedups_are_ratios_within_one_run() -> None:
    cases = [KernelCase(recipe, 200, 1, keep) for recipe in ("full", "int4") for keep in (1.0, 0.5)]
    rows = kernel_times.measure(cases, device="cpu", dtype=torch.float32, shape=SMALL)
    for case, row in zip(cases, rows, strict=True):
        assert row["bytes"] == build(case, SMALL, "cpu", torch.float32).read_bytes
        assert row["speedup_vs_sdpa"] == pytest.approx(row["sdpa_us"] / row["us"])
        assert row["bandwidth_share"] == pytest.approx(row["floor_us"] / row["us"])
    assert rows[0]["ideal_speedup"] == 1
    assert rows[1]["ideal_speedup"] == pytest.approx(2)


def test_a_case_out_of_memory_is_reported_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernel_times.kernel_seconds

    def full(case: KernelCase, *args: object) -> tuple[float, int]:
        if case.batch == 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return real(case, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel_times, "kernel_seconds", full)
    cases = [KernelCase("full", 100, batch, 1.0) for batch in (1, 2, 3)]
    rows = kernel_times.measure(cases, device="cpu", dtype=torch.float32, shape=SMALL)
    assert [row.get("error") for row in rows] == [None, "out of memory", None]


@pytest.mark.parametrize(("recipe", "keep"), [("full", 0.25), ("int4", 1.0), ("quest:0.1", 1.0)])
def test_predicted_bytes_match_a_built_layer_of_another_length(recipe: str, keep: float) -> None:
    slope, intercept = read_bytes(recipe, keep, SMALL)
    built = build(KernelCase(recipe, 16384, 1, keep), SMALL, "cpu", torch.float16).read_bytes
    assert slope * 16384 + intercept == pytest.approx(built, rel=0.01)


def test_a_prediction_is_bound_by_the_slowest_resource() -> None:
    device = kernel_times.Device("test", bytes_s=1e12, flops_s=1e15, alu_s=1e13, launch_s=1e-6)
    small, large = predict([KernelCase("full", 64, 1, 1.0), KernelCase("full", 131072, 8, 0.25)], device, SMALL)
    assert (small["bound_by"], large["bound_by"]) == ("launches", "bytes")
    assert small["us"] == pytest.approx(2.0)
    # 25% of the bytes at 85% of the bandwidth.
    assert large["speedup_vs_sdpa"] == pytest.approx(4 * 0.85, rel=1e-3)


def test_scoring_and_compaction_are_relative_to_a_layers_prefill() -> None:
    side = kernel_times.prefill_side("cpu", torch.float32, SMALL, 256)
    assert side["share"] == pytest.approx((side["score_us"] + side["compact_us"]) / side["prefill_us"])


def test_the_command_predicts_plots_and_rejects_unknown_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "kernels.html"
    line = ["bench", "kernels", "--predict", "h100", "--length", "1024", "--batch", "1", "--keep", "1", "--keep", "0.5"]
    assert invoke([*line, "--plot", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("predicted for H100")
    assert len(out.splitlines()) == 2 + 4 * 2 + 2
    assert "plotly" in page.read_text()[:20000]
    assert invoke(["bench", "kernels", "--predict", "b200"]) == 2
    assert "one of h100, h200, a100" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert invoke(["bench", "kernels"]) == 4
        assert "--predict h100" in capsys.readouterr().err


def test_the_predictions_in_the_documentation_are_the_output_of_the_command() -> None:
    rows = kernel_times.bench("h100", [131072], [8], [1.0, 0.25, 0.1])["rows"]
    text = (ROOT / "docs" / "kernels.md").read_text()
    for recipe in kernel_times.RECIPES:
        cells = [f"{row['us']:.0f} | {row['speedup_vs_sdpa']:.1f}" for row in rows if row["store"] == recipe]
        assert f"| `{recipe}` | {' | '.join(cells)}" in text


def test_predicted_steps_in_the_documentation_follow_from_its_arithmetic() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| (\d+)k \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == 4
    for k, kept, *milliseconds in rows:
        read_s = (15.2e9 + 1024 * int(k) * float(kept) * 57_344) / (0.85 * kernel_times.DEVICES["h200"].bytes_s)
        predicted = 1676 * 12e-6, 972 * 12e-6, read_s + 775 * kernel_times.DEVICES["h200"].launch_s
        assert [float(x) for x in milliseconds] == [round(1000 * second, 1) for second in predicted]


def test_measured_rows_are_rendered() -> None:
    rows = kernel_times.measure([KernelCase("full", 100, 1, 1.0)], device="cpu", dtype=torch.float32, shape=SMALL)
    rows.append({"kernel": "decode", **KernelCase("int4", 100, 1, 1.0).keys, "sdpa_us": None, "error": "out of memory"})
    side = kernel_times.prefill_side("cpu", torch.float32, SMALL, 256)
    report = {"predicted": None, "rows": rows, "prefill": side, "copy_bytes_s": 1e10, "machine": {"device": "cpu"}}
    text = render.kernels(report)
    assert "out of memory" in text
    assert "of the layer's prefill" in text


def test_the_script_for_a_gpu_uses_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    script = ROOT / "tests" / "gpu" / "everything.sh"
    subprocess.run(["sh", "-n", script], check=True)
    lines = re.findall(r"^ *lceval (.*?)(?: >.*)?$", script.read_text(), re.M)
    assert len(lines) == 4
    for line in lines:
        words = [word for word in line.split() if not word.startswith('"')]
        command = words[: 2 if words[0] == "bench" else 1]
        assert invoke([*command, "--help"]) == 0
        known = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert option in known, (line, option)


@pytest.mark.gpu
def test_every_recipe_is_timed_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    selected = list(kernel_times.cases((8192,), (1,), (1.0, 0.25)))
    rows = kernel_times.measure(selected, device="cuda", dtype=torch.bfloat16)
    assert all(row["us"] > 0 for row in rows)
