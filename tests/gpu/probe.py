"""Facts about lceval's kernels and engine on one GPU, on a machine that has PyTorch, Triton, transformers and no more.

Two commands, from the root of a checkout; wheels of what the machine lacks (transformers 5.24 or newer) lie in .whl/.
The first takes seven minutes, the second, the kernels' own tests, three:

    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl && export PYTHONPATH=/tmp/site:$PWD LCEVAL_AUTOLOAD=0 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 && timeout 390 python3 tests/gpu/probe.py --out DIR --limit 330
    PYTHONPATH=/tmp/site:$PWD LCEVAL_AUTOLOAD=0 HF_HUB_OFFLINE=1 timeout 180 python3 -m pytest -m gpu -q -n 12 -W default -o addopts= tests/unit/test_kernels_*.py

`sh tests/gpu/everything.sh DIR` runs both. On a CPU, `--device cpu` runs every check over a tiny shape.

A check is one fact in DIR/facts.json, which is rewritten around each, in this order: versions; each kernel's error
against its reference and its registers and spills, decode.split first; every recipe; decoding steps; bandwidth;
prefills; what was launched. Exit status: 0 without a failed check, 1 with one, 2 for a bad argument.
"""  # noqa: E501

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A worker ends with this where its CUDA context is lost: every later call would fail, but a new process can go on.
CONTEXT_LOST = 75
PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest", "hypothesis", "lm_eval", "faiss-cpu")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The parsed command line; a bad one ends with status 2."""
    parser = argparse.ArgumentParser(prog="probe.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of facts.json")
    parser.add_argument("--limit", type=float, default=480.0, metavar="SECONDS", help="no check begins after this")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu implies --small")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that every check runs")
    parser.add_argument("--resume", action="store_true", help="continue after the facts that DIR has")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.limit < 0:
        parser.error(f"--limit is a number of seconds, at least 0, got {args.limit}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run all checks, each at most once, in a process that is replaced when it dies."""
    args = arguments(argv)
    if args.worker:
        return work(args)
    start, resume = time.perf_counter(), args.resume
    while True:
        before = _facts(args.out) if resume else 0
        left_s = max(0.0, args.limit - (time.perf_counter() - start))
        command = [sys.executable, __file__, "--worker", "--out", str(args.out), "--limit", str(left_s)]
        command += ["--device", args.device, *(["--small"] * args.small), *(["--resume"] * resume)]
        status = _run(command)
        # A worker that died began a check, which the next one records as failed: each round adds a fact.
        if status in (0, 1, 2) or _facts(args.out) + _running(args.out) <= before:
            return status if status in (0, 1, 2) else 1
        print(f"the process ended with status {status}: the remaining checks run in a new one", flush=True)
        resume = True


def work(args: argparse.Namespace) -> int:
    """Run the checks in this process and print what failed and what was left out."""
    import torch
    from recording import Recorder
    from workload import Setup

    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs every check over a tiny shape", file=sys.stderr)
        return 2
    setup = Setup(args.device, args.small or args.device == "cpu")
    recorder = Recorder(args.out, args.limit, resume=args.resume)
    for name, check in all_checks(setup):
        failures = len(recorder.failed)
        recorder.run(name, check)
        if len(recorder.failed) > failures and args.device == "cuda":
            try:
                setup.synchronize()
                setup.free()
            except RuntimeError:
                return CONTEXT_LOST
    for why in dict.fromkeys(recorder.left_out.values()):
        print(f"left out ({why}): {', '.join(name for name, own in recorder.left_out.items() if own == why)}")
    for name in recorder.failed:
        print(f"FAILED: {name}: {recorder.facts[name]['failed']}")
    print(f"{len(recorder.facts)} facts, {len(recorder.failed)} failed, {len(recorder.left_out)} left out")
    return 1 if recorder.failed else 0


def all_checks(setup: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and function of each check, the most valuable first."""
    yield "versions", lambda: versions(setup)
    import kernel_checks

    yield from kernel_checks.checks(setup)
    from engine_checks import EngineChecks
    from step_checks import StepChecks

    engine_checks = EngineChecks(setup)
    step_checks = StepChecks(engine_checks)
    yield from engine_checks.checks()
    yield from step_checks.step_checks()
    yield from step_checks.bandwidth_checks()
    yield from step_checks.prefill_checks()
    yield from kernel_checks.launched_checks(setup)


def versions(setup: Any) -> dict[str, Any]:
    """Of everything a measurement depends on."""
    import torch
    from torch.nn.attention import SDPBackend

    values: dict[str, Any] = {"python": platform.python_version(), "device": "cpu", "small": setup.small}
    for package in PACKAGES:
        try:
            values[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            values[package] = None
    if setup.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        values |= {
            "device": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            # Which attention PyTorch tries first: cuDNN plans for every exact length anew.
            "sdpa_order": [SDPBackend(x).name for x in torch._C._get_sdp_priority_order()],
            "sdpa_cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        }
    return values


def _run(command: list[str]) -> int:
    """Exit status of a worker, which ends with this process."""
    with subprocess.Popen(command) as worker:
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return worker.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)
            worker.kill()


def _record(folder: Path) -> dict[str, Any]:
    file = folder / "facts.json"
    return dict(json.loads(file.read_text())) if file.exists() else {"facts": {}, "running": None}


def _facts(folder: Path) -> int:
    return len(_record(folder)["facts"])


def _running(folder: Path) -> bool:
    return _record(folder)["running"] is not None


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
