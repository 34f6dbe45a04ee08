"""Compile the kernel variants in use for sm_80 and sm_90 without a GPU, and check the machine code.

Triton's wheel includes ptxas, cuobjdump and nvdisasm: the cubin shows whether a change makes a kernel spill, exceed its
registers or lose its asynchronous copies, without a GPU.

    python -m lceval.kernels.aot           a table; exit 0 if all limits are met, 1 if not, 4 without the tools
    python -m lceval.kernels.aot --json    the same as JSON rows
    python -m lceval.kernels.aot --fast    for sm_80 only the kernels of 128 channels
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import lceval
from lceval.kernels import compact, decode, gather_decode, merge, quant_decode, scan, shifted, step, topk, window
from lceval.kernels.launch import INTERPRETED
from lceval.kernels.variant import INSTRUCTIONS, Limit, Variant

CAPABILITIES = (80, 90)
TOOLS = ("ptxas", "ptxas_blackwell", "cuobjdump", "nvdisasm")


@dataclass(frozen=True)
class CompiledVariant:
    """The compiled cost of one variant: stack and shared memory in bytes, spills as local loads and stores."""

    kernel: str
    variant: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: dict[str, int]


MODULES = (decode, step, scan, topk, gather_decode, window, compact, shifted, merge, quant_decode)
"""All modules with kernels; each defines the specialisations of its launchers and their limits."""


def variants() -> list[Variant]:
    """The specialisations that the launchers use."""
    return [variant for module in MODULES for variant in module.variants()]


def limits() -> dict[tuple[str, str], Limit]:
    """The limits by kernel and dtype (the first word of a variant's name)."""
    return {key: limit for module in MODULES for key, limit in module.LIMITS.items()}


def missing_tools() -> list[str]:
    """Tools that compiling requires and this machine lacks; empty if `measure` can run."""
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


def places(*, fast: bool = False) -> list[tuple[int, int]]:
    """The variants by index, with the targets they are compiled for."""
    every = [(i, capability) for i in range(len(variants())) for capability in CAPABILITIES]
    return [(i, target) for i, target in every if not fast or target == max(CAPABILITIES) or _is_common(i)]


def _is_common(number: int) -> bool:
    return " D128" in variants()[number].name


def measure(*, fast: bool = False) -> list[CompiledVariant]:
    """The rows of `places`, compiled in a new process, since this one may run the interpreter.

    Raises:
        RuntimeError: the process failed; its error output is the message.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The child must compile this copy of the package, not an installed one.
    env["PYTHONPATH"] = os.pathsep.join([str(Path(lceval.__file__).parents[1]), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "lceval.kernels.aot", "--json", *(["--fast"] if fast else [])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return [CompiledVariant(**row) for row in json.loads(done.stdout)]


def check(rows: list[CompiledVariant]) -> list[str]:
    """One line for each violated limit; empty if the check passes."""
    broken = []
    known = limits()
    for row in rows:
        label = f"{row.kernel} {row.variant} {row.target}"
        limit = known.get((row.kernel, row.variant.split()[0]))
        if limit is None:
            broken.append(f"{label}: no limit is set for this kernel and dtype")
            continue
        for name, value, allowed in (
            ("registers", row.registers, limit.registers),
            ("stack bytes", row.stack, 0),
            ("spills", row.spills, 0),
            ("shared bytes", row.shared, limit.shared),
        ):
            if value > allowed:
                broken.append(f"{label}: {value} {name}, at most {allowed} allowed")
        broken += [
            f"{label}: no {' or '.join(group)} instruction"
            for group in limit.needs
            if not any(row.instructions[name] for name in group)
        ]
    return broken


def specialisation(variant: Variant) -> tuple[dict[str, str], dict[tuple[int], list[list[str | int]]]]:
    """In Triton's terms: the type of each argument, and the positions known to be divisible by 16."""
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


def compile_variant(variant: Variant, capability: int) -> CompiledVariant:
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

    return CompiledVariant(
        kernel=variant.kernel,
        variant=variant.name,
        target=f"sm_{capability}",
        registers=used["REG"],
        stack=used["STACK"],
        spills=count("LDL") + count("STL"),
        shared=compiled.metadata.shared,
        instructions={name: count(name) for name in INSTRUCTIONS},
    )


def _compile(place: tuple[int, int]) -> CompiledVariant:
    """Compile a variant by its index, since jitted functions cannot be pickled."""
    return compile_variant(variants()[place[0]], place[1])


def _run(tool: str, *args: str) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, tool).path
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def _table(rows: list[CompiledVariant]) -> str:
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
    parser.add_argument("--fast", action="store_true", help="for sm_80 only the kernels of 128 channels")
    args = parser.parse_args(argv)
    if missing := missing_tools():
        print(f"cannot compile kernels: no {', '.join(missing)} (part of triton)", file=sys.stderr)
        return 4
    if INTERPRETED:
        print("cannot compile kernels: TRITON_INTERPRET is set; unset it and run again", file=sys.stderr)
        return 4
    start = time.perf_counter()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(_compile, places(fast=args.fast), chunksize=4))
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else _table(rows))
    broken = check(rows)
    print(*broken, f"{len(rows)} compiled in {time.perf_counter() - start:.1f} s", sep="\n", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
