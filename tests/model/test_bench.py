"""The benchmark commands on the real model and few tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from short_contexts import short_contexts

from lceval import packaged
from lceval.bench import memory, render
from lceval.bench.comparison import requests_of
from lceval.cli import invoke

pytestmark = pytest.mark.model


@pytest.fixture
def lceval(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*argv: str) -> tuple[int, str, str]:
        with short_contexts():
            code = invoke(list(argv))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_decode_compares_every_side_with_hf_and_full(lceval: Any) -> None:
    small = ("--tokens", "200", "--new-tokens", "2", "--rounds", "1", "--json")
    code, out, _ = lceval(
        "bench", "decode", "--kv", "snapkv:100", "--kv", "int4", "--kv", "kvzap:100:when=chunk:chunk=64", *small
    )
    assert code == 0
    report = json.loads(out)
    names = ["hf", "full", "snapkv:100", "int4", "kvzap:100:when=chunk:chunk=64"]
    assert [side["name"] for side in report["sides"]] == names
    assert all(f"\n{name} " in render.decode(report) for name in names)
    by_name = {side["name"]: side for side in report["sides"]}
    for side in report["sides"]:
        assert side["speedup_vs_hf"] == pytest.approx(by_name["hf"]["ms_per_token"] / side["ms_per_token"])
        assert side["speedup_vs_full"] == pytest.approx(by_name["full"]["ms_per_token"] / side["ms_per_token"])
    assert report["speedup_vs_hf"] == by_name["snapkv:100"]["speedup_vs_hf"]
    assert report["speedup_vs_full"] == by_name["snapkv:100"]["speedup_vs_full"]
    # 30 layers, 3 KV heads, keys and values of 64 float32; a position beside each kept slot.
    assert by_name["full"]["kv_bytes"] == by_name["hf"]["kv_bytes"] == 200 * 30 * 3 * 2 * 64 * 4
    kept_bytes = 100 * 30 * 3 * (2 * 64 * 4 + 4)
    assert by_name["snapkv:100"]["kv_bytes"] == by_name["kvzap:100:when=chunk:chunk=64"]["kv_bytes"] == kept_bytes
    assert report["machine"]["threads"] >= 1


def test_prefill_compares_every_recipe_with_full(lceval: Any) -> None:
    code, out, _ = lceval(
        "bench", "prefill", "--kv", "kvzap:0.5", "--kv", "kvzip:0.5", "--tokens", "150", "--rounds", "1", "--json"
    )
    assert code == 0
    report = json.loads(out)
    sides = {side["name"]: side for side in report["sides"]}
    assert list(sides) == ["full", "kvzap:0.5", "kvzip:0.5"]
    assert [line.split()[0] for line in render.prefill(report).splitlines()[2:]] == list(sides)
    full, alone = sides["full"], sides["full"]["prefill_s"] + sides["full"]["compress_s"]
    assert full["overhead"] == 0
    for side in sides.values():
        assert side["overhead"] == pytest.approx((side["prefill_s"] + side["compress_s"]) / alone - 1)
        assert 0 <= side["scoring_s"] < side["prefill_s"] + side["compress_s"]
    # kvzip reads the context again; kvzap multiplies two matrices per layer.
    assert full["scoring_overhead"] < sides["kvzap:0.5"]["scoring_overhead"] < 0.5
    assert sides["kvzip:0.5"]["scoring_overhead"] > 0.5
    # 30 layers of 3 heads; a position of 4 bytes a slot.
    assert sides["kvzip:0.5"]["kv_bytes"] == full["kv_bytes"] / 2 + 4 * 30 * 3 * 75
    assert all(side["kv_bytes"] <= side["kv_bytes_full"] <= side["peak_kv_bytes"] for side in sides.values())


@pytest.mark.skipif(not memory.RESET.exists(), reason="only Linux has a high-water mark to reset")
def test_a_peak_of_memory_is_of_its_block_alone() -> None:
    with memory.peak() as before:
        torch.ones(10_000_000).sum()
    with memory.peak() as after:
        torch.ones(10).sum()
    # The system counts resident pages in batches.
    assert 38_000_000 <= (before.bytes or 0) < 60_000_000
    assert after.bytes is not None
    assert after.bytes < 20_000_000


def test_eval_answers_under_each_recipe_and_resumes_from_its_file(lceval: Any, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    line = ("bench", "eval", "--task", "lc_filings_ao_1k", "--contexts", "1", "--kv", "knorm:0.5", "--kv", "int8")
    line = (*line, "--diagnose", "gold", "--no-hf", "--output", str(file), "--json")
    code, out, _ = lceval(*line)
    assert code == 0
    report = json.loads(out)
    sides = {side["kv"]: side for side in report["sides"]}
    assert list(sides) == ["full", "knorm:0.5", "int8"]
    assert all(f"\n{name} " in render.evaluation(report) for name in sides)
    assert sides["full"]["gold_kept"]["mean"] == sides["int8"]["gold_kept"]["mean"] == 1.0
    assert 0 < sides["knorm:0.5"]["gold_kept"]["mean"] < 1
    assert sides["int8"]["gold_nll"]["mean"] == pytest.approx(sides["full"]["gold_nll"]["mean"], rel=0.05)
    assert sides["full"]["same_as_full"] == 1.0
    assert report["speedup_vs_full"] == sides["int8"]["speedup_vs_full"]
    # With a truncated file, the same command runs the missing side again.
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 3 * report["samples"]
    # The killed run left one sample of the last side, and half a line of the next.
    last = 2 + 2 * report["samples"]
    file.write_text("\n".join([*lines[:last], lines[last][:40]]))
    code, again, _ = lceval(*line)
    assert code == 0
    resumed = {side["kv"]: side for side in json.loads(again)["sides"]}
    assert resumed["full"] == sides["full"]
    assert resumed["int8"]["gold_nll"]["mean"] == pytest.approx(sides["int8"]["gold_nll"]["mean"], abs=1e-4)
    # Results of other settings are not mixed in.
    code, _, err = lceval(*line[:-2], str(file), "--query-aware")
    assert code == 2
    assert "choose another --output" in err


def test_eval_against_hf_gives_the_same_choices(lceval: Any, data_folder: Path) -> None:
    line = ("bench", "eval", "--task", "lc_filings_ao_1k", "--contexts", "1", "--json")
    code, out, _ = lceval(*line)
    assert code == 0
    hf, full = json.loads(out)["sides"]
    assert (hf["kv"], full["kv"]) == ("hf", "full")
    assert hf["same_as_full"] == 1.0
    assert hf["subem"] == full["subem"]
    assert full["speedup_vs_hf"] == pytest.approx(hf["seconds"] / full["seconds"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("decode", "--kv", "snpkv:0.5"), "did you mean 'snapkv'"),
        (("decode", "--tokens", "9000"), "do not fit the model's 8192"),
        (("eval", "--task", "lc_no_such_task"), "no task 'lc_no_such_task'"),
        (("eval", "--task", "lc_icr"), "a group is not one task"),
    ],
)
def test_bad_input_gets_one_line(lceval: Any, line: tuple[str, ...], message: str) -> None:
    code, out, err = lceval("bench", *line)
    assert code == 2
    assert out == ""
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(("template", "ending"), [(True, "assistant\nAnswer:"), (False, "? Answer:")])
def test_a_prompt_can_contain_the_beginning_of_the_reply(lcft: Any, template: bool, ending: str) -> None:
    _, contexts = requests_of("lc_filings_ao_1k", packaged.NAME, lcft(), template, None, "Answer:")
    assert contexts
    assert all(request.args[0].endswith(ending) for context in contexts for request in context.requests)
