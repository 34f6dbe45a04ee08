"""`lceval doctor`: check the installation, devices, models and data, and suggest fixes."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lceval.core.errors import LcevalError

SYMBOLS = {"ok": "ok  ", "note": "note", "error": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """Result of one check: `note` limits what can be run, `error` breaks evaluation; both have a remedy."""

    name: str
    level: Literal["ok", "note", "error"]
    found: str  # a key of `--json`
    remedy: str = ""


def examine() -> list[Finding]:
    """The findings of all checks; takes some seconds, as it imports what it checks."""
    return [_versions(), _plugin(), _device(), _triton(), _packaged(), _data()]


def render(findings: list[Finding]) -> str:
    """The findings as aligned lines, remedies indented below."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{SYMBOLS[finding.level]}  {finding.name:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':>{width + 8}}-> {finding.remedy}")
    return "\n".join(lines)


def _versions() -> Finding:
    from importlib import metadata

    from packaging.requirements import Requirement

    from lceval.records.identity import versions

    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    for text in metadata.requires("lceval") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            return Finding("versions", "error", f"{requirement.name} is not installed", f"pip install '{requirement}'")
        if not requirement.specifier.contains(version, prereleases=True):
            return Finding(
                "versions", "error", f"{requirement.name} {version} is installed", f"pip install '{requirement}'"
            )
    return Finding("versions", "ok", installed)


def _plugin() -> Finding:
    """Whether `lm_eval` in this environment can load the model and the tasks."""
    import subprocess

    code = "from lm_eval.api.registry import get_model; get_model('lcft')"
    switched_off = os.environ.get("LCEVAL_AUTOLOAD") == "0"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.prefix))
    if process.returncode == 0:
        return Finding("lm_eval plugin", "ok", "`lm_eval --model lcft` works")
    remedy = (
        "unset LCEVAL_AUTOLOAD" if switched_off else "pip install --force-reinstall --no-deps lceval (not editable)"
    )
    return Finding("lm_eval plugin", "error", "`lm_eval` does not find the model lcft", remedy)


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("device", "ok", names)
    cpus = f"no CUDA device; CPU with {torch.get_num_threads()} threads"
    return Finding("device", "note", cpus, "sufficient for small models; for a GPU, install a CUDA build of torch")


def _triton() -> Finding:
    try:
        import triton
    except ImportError:
        return Finding("kernels", "note", "triton is not installed", "pip install triton (Linux); not required on CPUs")
    import torch

    backend = "Triton kernels" if torch.cuda.is_available() else "PyTorch reference (CPU path)"
    return Finding("kernels", "ok", f"triton {triton.__version__}; attention uses the {backend}")


def _packaged() -> Finding:
    from lceval import packaged

    try:
        return Finding("packaged model", "ok", str(packaged.folder()))
    except LcevalError as error:
        return Finding("packaged model", "note", str(error), packaged.INSTALL)


def _data() -> Finding:
    remedy = "set LCEVAL_DATA to a folder with data (see `lceval data list`); lc_filings_* requires none"
    value = os.environ.get("LCEVAL_DATA")
    if not value:
        return Finding("data folder", "note", "LCEVAL_DATA is not set", remedy)
    folder = Path(value).expanduser()
    if not folder.is_dir():
        return Finding("data folder", "error", f"LCEVAL_DATA={value} is not a folder", remedy)
    from lceval.data import listing

    available = [
        dataset["dataset"] for dataset in listing.data() if dataset["at_hand"] and dataset["source"] != "shipped"
    ]
    if not available:
        return Finding("data folder", "note", f"no dataset files in {folder}", remedy)
    return Finding("data folder", "ok", f"{folder}: {', '.join(available)}")
