"""Child processes of the kernel tests, above all those in which Triton interprets its kernels on a CPU.

A process chooses between compiling and interpreting once, when it first imports triton. So a test file of a kernel is
also a script: its cases run in one child process with TRITON_INTERPRET=1, which prints their results as JSON, and the
fixture `interpreted` (conftest.py) hands these to the tests, one case each.

The interpreter has no bfloat16 arithmetic: launchers widen such inputs to float32 and round the result. Ids of these
cases begin with `bf16_in_fp32`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import lceval

# The dtype as the interpreter computes in it, for the ids of cases.
LABELS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16_in_fp32"}

# Prelude of a child that records launches for an sm_90 GPU and stops each where it would compile: the driver only
# names the target, and Triton's hook receives each specialisation. `report(variants)` prints both sides.
RECORDING = """
import json
import torch
import triton
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

triton.runtime.driver.set_active(Driver())
from lceval.kernels import aot, variant

launches = {}
def record(*, fn, compile, **_):
    hints = {str(i): hint for (i,), hint in compile["configs"][0].items() if hint}
    constants = sorted(compile["constants"].values())
    launches[compile["key"]] = [fn.name, compile["signature"], hints, constants]
    return True  # do not compile

triton.knobs.runtime.jit_cache_hook = record

def report(variants):
    gated = []
    for required in variants:
        signature, hints = aot.specialisation(required)
        constants = sorted(required.constants.values())
        gated.append([required.fn.__name__, signature, {str(i): hint for (i,), hint in hints.items()}, constants])
    print(json.dumps({"launched": [*launches.values()], "gated": gated}))
"""


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child that imports this process's copy of the package, compiling unless told otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(map(str, (Path(lceval.__file__).parents[1], Path(__file__).parent)))
    return {**inherited, "PYTHONPATH": path, **changes}


def python(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A finished child; `changes` are added to its environment."""
    line = [sys.executable, *command]
    return subprocess.run(line, env=environment(**changes), capture_output=True, text=True, check=False)


def require_triton() -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")


def recorded_launches(code: str) -> dict[str, list[Any]]:
    """The specialisations that `code` launches ("launched") and those that the gate compiles ("gated").

    code: launches kernels, then calls `report` with the gate's variants.
    """
    require_triton()
    child = python("-c", RECORDING + code)
    assert child.returncode == 0, child.stderr
    return dict(json.loads(child.stdout))


def run_cases(file: str) -> Callable[[str], Any]:
    """Run a test file's cases in an interpreting child; the function returns the result of a case by its name."""
    require_triton()
    child = python("-W", "error", file, TRITON_INTERPRET="1")
    assert child.returncode == 0, child.stderr
    results: dict[str, dict[str, Any]] = json.loads(child.stdout)

    def result(case: str) -> Any:
        if "error" in results[case]:
            pytest.fail(results[case]["error"])
        return results[case]["value"]

    return result


def main(cases: Mapping[str, Callable[[], Any]]) -> None:
    """What the child does: run every case on one thread, and print each value or traceback."""
    import torch

    from lceval.kernels import launch

    assert launch.INTERPRETED
    torch.set_num_threads(1)
    results = {}
    for name, case in cases.items():
        try:
            results[name] = {"value": case()}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    print(json.dumps(results, indent=1))
