"""The gate on machine code: green on the kernels as they are, red on every way to fail it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lceval
from lceval.kernels import aot, variant

GOOD = aot.Row(
    kernel="decode.split",
    variant="bf16 D128",
    target="sm_90",
    registers=96,
    stack=0,
    spills=0,
    shared=71680,
    instructions={"LDGSTS": 48, "HMMA": 32, "HGMMA": 0},
)

# A launch of every head_dim and dtype, stopped where it would compile. It asks no GPU: the driver is a
# stand-in that only names the target, and Triton's own hook reports each specialisation before it compiles.
LAUNCHES = """
import json
import torch
import triton
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

triton.runtime.driver.set_active(Driver())
from lceval.kernels import aot, decode, variant

launched = {}
def hook(*, fn, compile, **_):
    hints = {str(i): hint for (i,), hint in compile["configs"][0].items() if hint}
    constants = sorted(compile["constants"].values())
    launched[compile["key"]] = [fn.name, compile["signature"], hints, constants]
    return True  # do not compile

triton.knobs.runtime.jit_cache_hook = hook
for name, dims in variant.USED_HEAD_DIMS.items():
    dtype = variant.TORCH[name]
    for dim in dims:
        for batch, kv_heads, group, pages in [(1, 1, 1, 1), (1, 8, 4, 16), (2, 4, 3, 17), (2, 16, 8, 33)]:
            pool = torch.empty(5, 64, dim, dtype=dtype)
            q = torch.empty(batch, kv_heads * group, dim, dtype=dtype)
            table = torch.zeros(batch, kv_heads, pages, dtype=torch.int32)
            lens = torch.zeros(batch, kv_heads, dtype=torch.int32)
            for splits in (1, 2, 16, 17):
                decode._launch(q, pool, pool, table, lens, 0.1, splits)

gated = []
for wanted in aot.variants():
    signature, hints = aot.specialisation(wanted)
    constants = sorted(wanted.constants.values())
    gated.append([wanted.fn.__name__, signature, {str(i): hint for (i,), hint in hints.items()}, constants])
print(json.dumps({"launched": [*launched.values()], "gated": gated}))
"""


def child(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(Path(lceval.__file__).parents[1]), **changes}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)


def need_tools() -> None:
    if missing := aot.missing_tools():
        pytest.skip(f"cannot compile for a GPU without {', '.join(missing)}")


@pytest.mark.slow
def test_gate_is_green_for_every_variant_and_target(monkeypatch: pytest.MonkeyPatch) -> None:
    need_tools()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must not reach the process that compiles
    rows = aot.measure()
    assert aot.check(rows) == []
    expected = {(v.kernel, v.name, f"sm_{target}") for v in aot.variants() for target in (80, 90)}
    assert {(row.kernel, row.variant, row.target) for row in rows} == expected
    assert len(rows) == len(expected)


def test_launches_ask_only_for_gated_variants_and_a_growing_cache_for_no_new_one() -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    done = child("-c", LAUNCHES)
    assert done.returncode == 0, done.stderr
    result: dict[str, list[Any]] = json.loads(done.stdout)
    merges = [row for row in result["launched"] if row[0] == "merge_kernel"]
    splits = [row for row in result["launched"] if row[0] == "split_kernel"]
    assert all(row in result["gated"] for row in splits)
    # Merging is gated for one dtype: the others only change its first load and its last store.
    for row in merges:
        row[1] |= {"rest_o_ptr": "*bf16", "o_ptr": "*bf16"}
        assert row in result["gated"]
    dims = {name: len(dims) for name, dims in variant.USED_HEAD_DIMS.items()}
    assert len(merges) == sum(dims.values())
    assert len(splits) == 2 * dims["fp16"] + 2 * dims["bf16"] + dims["fp32"]


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
def test_check_names_each_broken_limit(row: aot.Row, message: str | None) -> None:
    expected = [] if message is None else [f"{row.kernel} bf16 D128 sm_90: {message}"]
    assert aot.check([row]) == expected


def test_an_interpreting_process_is_refused_in_one_line() -> None:
    need_tools()
    done = child("-m", "lceval.kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr == "cannot compile kernels: TRITON_INTERPRET is set; unset it and run again\n"


def test_a_failed_process_is_an_error_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"false -m lceval.kernels.aot --json ended with 1"):
        aot.measure()
