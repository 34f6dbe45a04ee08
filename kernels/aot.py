"""Compile the kernel variants in use for sm_80 and sm_90 without a GPU, and judge the machine code.

Triton's wheel brings ptxas, cuobjdump and nvdisasm: a real cubin shows whether a change made a kernel spill,
outgrow its registers or lose its asynchronous copies, long before a GPU could show it as time.

    python -m lceval.kernels.aot           a table; exit 0 if every limit holds, 1 if not, 4 without the tools
    python -m lceval.kernels.aot --json    the same as JSON rows
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lceval
from lceval.kernels import decode

CAPABILITIES = (80, 90)
INSTRUCTIONS = ("LDGSTS", "HMMA", "HGMMA")
TOOLS = ("ptxas", "ptxas_blackwell", "cuobjdump", "nvdisasm")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Phi-3 has head_dim 96, Gemma 256, most others 64 or 128. G is an argument and asks for no variants.
HEAD_DIMS = {"fp16": (64, 128), "bf16": (64, 96, 128, 256), "fp32": (64, 128)}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as its launcher would compile it.

    Attributes:
        kernel, name: what the row is called; name starts with the dtype.
        fn: the jitted function.
        pointers: Triton type of each pointer argument.
        floats: the arguments that are Python floats; every other one is an int32.
        aligned: prefixes of the int arguments that are multiples of 16 in every cache we build. A launch sees
            that by itself; here, without the hint, the copies of a tile would not be vectorised.
        constants: compile-time arguments.
        options: num_warps, num_stages and the like.
    """

    kernel: str
    name: str
    fn: Any
    pointers: dict[str, str]
    floats: tuple[str, ...]
    aligned: tuple[str, ...]
    constants: dict[str, int]
    options: dict[str, int | bool]


@dataclass(frozen=True)
class Row:
    """What one variant became: stack and shared in bytes, spills as loads and stores of local memory."""

    kernel: str
    variant: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: dict[str, int]


@dataclass(frozen=True)
class Limit:
    """What a kernel may cost. `needs`: of each group at least one instruction must be present."""

    registers: int
    shared: int
    needs: tuple[tuple[str, ...], ...] = ()


# 168 registers let three programs of 128 threads share a multiprocessor's 65,536; its shared memory holds no
# more. 99 KiB is the most a block may have on sm_86 and sm_89. HGMMA wants 64 rows, so 16 heads use HMMA.
TENSOR_CORES = (("LDGSTS",), ("HMMA", "HGMMA"))
LIMITS = {
    ("decode.split", "fp16"): Limit(168, 99 * 1024, TENSOR_CORES),
    ("decode.split", "bf16"): Limit(168, 99 * 1024, TENSOR_CORES),
    ("decode.split", "fp32"): Limit(168, 99 * 1024, (("LDGSTS",),)),
    ("decode.combine", "bf16"): Limit(168, 99 * 1024),
}


def variants() -> list[Variant]:
    """The specialisations that the launchers ask for."""
    return [variant for dtype, dims in HEAD_DIMS.items() for dim in dims for variant in _decode_variants(dtype, dim)]


def _decode_variants(dtype: str, dim: int) -> Iterator[Variant]:
    data, f32, i32 = f"*{dtype}", "*fp32", "*i32"
    pointers = {"q_ptr": data, "k_ptr": data, "v_ptr": data, "table_ptr": i32, "lens_ptr": i32}
    pointers |= {"o_ptr": f32, "lse_ptr": f32}
    shares = Variant(
        kernel="decode.split",
        name=f"{dtype} D{dim}",
        fn=decode.split_kernel,
        pointers=pointers,
        floats=("scaling",),
        aligned=("stride_q", "stride_k", "stride_v"),
        constants=decode.split_constants(DTYPES[dtype], dim),
        options=decode.OPTIONS,
    )
    yield shares
    if dtype != "fp32":
        yield replace(shares, name=f"{shares.name} single", pointers=pointers | {"o_ptr": data})
    if dtype == "bf16":  # the output's dtype only changes the last store
        yield Variant(
            kernel="decode.combine",
            name=f"{dtype} D{dim}",
            fn=decode.combine_kernel,
            pointers={"part_o_ptr": f32, "part_lse_ptr": f32, "o_ptr": data, "lse_ptr": f32},
            floats=(),
            aligned=(),
            constants=decode.combine_constants(dim),
            options=decode.OPTIONS,
        )


def missing_tools() -> list[str]:
    """What a compile needs and this machine lacks; empty where `measure` can run."""
    try:
        from triton import knobs
    except ImportError:
        return ["triton"]
    missing = []
    for tool in TOOLS:
        try:
            getattr(knobs.nvidia, tool)
        except RuntimeError:
            missing.append(tool)
    return missing


def measure() -> list[Row]:
    """The rows of all variants, compiled in a fresh process: this one may be interpreting its kernels.

    Raises:
        RuntimeError: the process failed; its error output is the message.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The child must compile this copy of the package, whichever other is installed.
    env["PYTHONPATH"] = os.pathsep.join([str(Path(lceval.__file__).parents[1]), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "lceval.kernels.aot", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return [Row(**row) for row in json.loads(done.stdout)]


def check(rows: list[Row]) -> list[str]:
    """One line for each limit that a row breaks; empty when the gate is green."""
    broken = []
    for row in rows:
        at = f"{row.kernel} {row.variant} {row.target}"
        limit = LIMITS.get((row.kernel, row.variant.split()[0]))
        if limit is None:
            broken.append(f"{at}: no limit is set for this kernel and dtype")
            continue
        for name, value, most in (
            ("registers", row.registers, limit.registers),
            ("stack bytes", row.stack, 0),
            ("spills", row.spills, 0),
            ("shared bytes", row.shared, limit.shared),
        ):
            if value > most:
                broken.append(f"{at}: {value} {name}, at most {most} allowed")
        broken += [
            f"{at}: no {' or '.join(group)} instruction"
            for group in limit.needs
            if not any(row.instructions[name] for name in group)
        ]
    return broken


def specialisation(variant: Variant) -> tuple[dict[str, str], dict[tuple[int], list[list[str | int]]]]:
    """Triton's terms: the type of each argument, and which positions are known to be divisible by 16."""
    signature: dict[str, str] = {}
    hints: dict[tuple[int], list[list[str | int]]] = {}
    for i, name in enumerate(variant.fn.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = variant.pointers.get(name, "fp32" if name in variant.floats else "i32")
        if name in variant.pointers or name.startswith(variant.aligned):
            hints[(i,)] = [["tt.divisibility", 16]]
    return signature, hints


def compile_variant(variant: Variant, capability: int) -> Row:
    """Compile one variant in this process and read its cost from the cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, hints = specialisation(variant)
    source = ASTSource(variant.fn, signature, variant.constants, hints)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(variant.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _run("nvdisasm", "-ndf", "-c", cubin.name)
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}

    def count(instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", code))

    return Row(
        kernel=variant.kernel,
        variant=variant.name,
        target=f"sm_{capability}",
        registers=used["REG"],
        stack=used["STACK"],
        spills=count("LDL") + count("STL"),
        shared=compiled.metadata.shared,
        instructions={name: count(name) for name in INSTRUCTIONS},
    )


def _run(tool: str, *args: str) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, tool).path
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def _table(rows: list[Row]) -> str:
    head = ["kernel", "variant", "target", "registers", "stack", "spills", "shared", *INSTRUCTIONS]
    text = [head]
    for row in rows:
        *cells, counts = asdict(row).values()
        text.append([str(cell) for cell in (*cells, *counts.values())])
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    justify = [str.ljust] * 3 + [str.rjust] * (len(head) - 3)
    return "\n".join("  ".join(map(lambda f, c, w: f(c, w), justify, line, widths)) for line in text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lceval.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON rows instead of a table")
    args = parser.parse_args(argv)
    if missing := missing_tools():
        print(f"cannot compile kernels: no {', '.join(missing)} (part of triton)", file=sys.stderr)
        return 4
    if decode.INTERPRETED:
        print("cannot compile kernels: TRITON_INTERPRET is set; unset it and run again", file=sys.stderr)
        return 4
    start = time.perf_counter()
    rows = [compile_variant(variant, capability) for variant in variants() for capability in CAPABILITIES]
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else _table(rows))
    broken = check(rows)
    print(*broken, f"{len(rows)} compiled in {time.perf_counter() - start:.1f} s", sep="\n", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
