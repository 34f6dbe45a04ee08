"""The gate on compiled code passes for the kernels and fails for each limit that a row breaks."""

from __future__ import annotations

import sys
from dataclasses import replace

import interpreter
import pytest

from lceval.kernels import aot, variant

GOOD = aot.CompiledVariant(
    kernel="decode.split",
    variant="bf16 D128",
    target="sm_90",
    registers=96,
    stack=0,
    spills=0,
    shared=71680,
    instructions={"LDGSTS": 48, "HMMA": 32, "HGMMA": 0},
)

# A launch of every head_dim and dtype.
LAUNCHES = """
from lceval.kernels import decode

for name, dims in variant.USED_HEAD_DIMS.items():
    dtype = variant.TORCH[name]
    for dim in dims:
        for batch, kv_heads, group, pages in [(1, 1, 1, 1), (1, 8, 4, 16), (2, 4, 3, 17), (2, 16, 8, 33)]:
            pool = torch.empty(5, 64, dim, dtype=dtype)
            q = torch.empty(batch, kv_heads * group, dim, dtype=dtype)
            table = torch.zeros(batch, kv_heads, pages, dtype=torch.int32)
            lens = torch.zeros(batch, kv_heads, dtype=torch.int32)
            for splits in (1, 2, 16, 17):
                decode._launch(q, pool, pool, table, lens, 0.1, None, False, splits)
for dim, value_dim, cap, latent in [(128, 128, 50.0, False), (192, 128, None, False), (576, 512, None, True)]:
    k = torch.empty(5, 64, dim, dtype=torch.bfloat16)
    v = k[..., :value_dim] if latent else torch.empty(5, 64, value_dim, dtype=torch.bfloat16)
    q = torch.empty(1, 16, dim, dtype=torch.bfloat16)
    table, lens = torch.zeros(1, 1, 9, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    decode._launch(q, k, v, table, lens, 0.1, cap, latent, 4)
report(aot.variants())
"""


def require_tools() -> None:
    if missing := aot.missing_tools():
        pytest.skip(f"cannot compile for a GPU without {', '.join(missing)}")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # hundreds of compilations: many minutes on two busy cores
def test_gate_passes_for_every_variant_on_hopper_and_the_common_ones_on_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    require_tools()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must not reach the child that compiles
    rows = aot.measure(fast=True)
    assert aot.check(rows) == []
    every, places = aot.variants(), aot.places(fast=True)
    assert {i for i, target in places if target == 90} == {*range(len(every))}
    assert len(aot.places()) == 2 * len(every) > len(places) > 1.2 * len(every)
    expected = {(every[i].kernel, every[i].name, f"sm_{target}") for i, target in places}
    assert {(row.kernel, row.variant, row.target) for row in rows} == expected
    assert len(rows) == len(expected)


def test_launches_are_of_gated_variants_and_a_growing_cache_needs_no_new_one() -> None:
    result = interpreter.recorded_launches(LAUNCHES)
    merges = [row for row in result["launched"] if row[0] == "merge_kernel"]
    splits = [row for row in result["launched"] if row[0] == "split_kernel"]
    assert all(row in result["gated"] for row in splits)
    # Merging is gated for one dtype: the others only change its first load and its last store.
    for row in merges:
        row[1] |= {"rest_o_ptr": "*bf16", "o_ptr": "*bf16"}
        assert row in result["gated"]
    dims = {name: len(dims) for name, dims in variant.USED_HEAD_DIMS.items()}
    assert len(merges) == sum(dims.values()) + 1  # 512 channels
    assert len(splits) == 2 * dims["fp16"] + 2 * dims["bf16"] + dims["fp32"] + 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD, None),
        (replace(GOOD, registers=169), "169 registers, at most 168 allowed"),
        (replace(GOOD, stack=8), "8 stack bytes, at most 0 allowed"),
        (replace(GOOD, spills=2), "2 spills, at most 0 allowed"),
        (replace(GOOD, shared=101377), "101377 shared bytes, at most 101376 allowed"),
        (replace(GOOD, instructions={"LDGSTS": 0, "HMMA": 32, "HGMMA": 0}), "no LDGSTS instruction"),
        (replace(GOOD, instructions={"LDGSTS": 48, "HMMA": 0, "HGMMA": 0}), "no HMMA or HGMMA instruction"),
        (replace(GOOD, instructions={"LDGSTS": 48, "HMMA": 0, "HGMMA": 16}), None),
        (replace(GOOD, kernel="decode.new"), "no limit is set for this kernel and dtype"),
    ],
)
def test_check_names_each_broken_limit(row: aot.CompiledVariant, message: str | None) -> None:
    expected = [] if message is None else [f"{row.kernel} bf16 D128 sm_90: {message}"]
    assert aot.check([row]) == expected


def test_an_interpreting_process_is_refused_in_one_line() -> None:
    require_tools()
    child = interpreter.python("-m", "lceval.kernels.aot", TRITON_INTERPRET="1")
    assert child.returncode == 4
    assert child.stdout == ""
    assert child.stderr == "cannot compile kernels: TRITON_INTERPRET is set; unset it and run again\n"


def test_a_failed_process_is_an_error_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"false -m lceval.kernels.aot --json ended with 1"):
        aot.measure()
