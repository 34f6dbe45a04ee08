"""`lceval doctor`: what is installed, what is at hand, and what to do about what is not."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lceval.errors import LcevalError

SYMBOLS = {"ok": "ok  ", "note": "note", "error": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `note` limits what can be run, `error` breaks the main job; both name a remedy."""

    name: str
    level: Literal["ok", "note", "error"]
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything; takes some seconds, since it imports what it checks."""
    return [_versions(), _plugin(), _device(), _triton(), _packaged(), _data()]


def render(findings: list[Finding]) -> str:
    """The findings as aligned lines, remedies indented below."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{SYMBOLS[f.level]}  {f.name:<{width}}  {f.found}")
        if f.remedy:
            lines.append(f"{'':>{width + 8}}-> {f.remedy}")
    return "\n".join(lines)


def _versions() -> Finding:
    from importlib import metadata

    from packaging.requirements import Requirement

    from lceval.identity import versions

    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    for text in metadata.requires("lceval") or []:
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            return Finding("versions", "error", f"{need.name} is not installed", f"pip install '{need}'")
        if not need.specifier.contains(have, prereleases=True):
            return Finding("versions", "error", f"{need.name} {have} is installed", f"pip install '{need}'")
    return Finding("versions", "ok", found)


def _plugin() -> Finding:
    """Whether a plain `lm_eval` in this environment finds the model and the tasks."""
    import subprocess

    code = "from lm_eval.api.registry import get_model; get_model('lcft')"
    switched_off = os.environ.get("LCEVAL_AUTOLOAD") == "0"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.prefix))
    if ran.returncode == 0:
        return Finding("lm_eval plugin", "ok", "a plain `lm_eval --model lcft` works here")
    remedy = (
        "unset LCEVAL_AUTOLOAD" if switched_off else "pip install --force-reinstall --no-deps lceval (not editable)"
    )
    return Finding("lm_eval plugin", "error", "a plain `lm_eval` does not know lcft", remedy)


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("device", "ok", names)
    cpus = f"no CUDA device; CPU with {torch.get_num_threads()} threads"
    return Finding("device", "note", cpus, "fine for small models; on a GPU machine install a CUDA build of torch")


def _triton() -> Finding:
    try:
        import triton
    except ImportError:
        return Finding("kernels", "note", "triton is not installed", "pip install triton (Linux); CPUs do without it")
    import torch

    used = "Triton kernels" if torch.cuda.is_available() else "PyTorch reference (CPU path)"
    return Finding("kernels", "ok", f"triton {triton.__version__}; attention by the {used}")


def _packaged() -> Finding:
    from lceval.models import packaged

    try:
        return Finding("packaged model", "ok", str(packaged.folder()))
    except LcevalError as error:
        return Finding("packaged model", "note", str(error), packaged.INSTALL)


def _data() -> Finding:
    remedy = "set LCEVAL_DATA to a folder with data (`lceval data list` says which); lc_filings_* needs none"
    value = os.environ.get("LCEVAL_DATA")
    if not value:
        return Finding("data folder", "note", "LCEVAL_DATA is not set", remedy)
    folder = Path(value).expanduser()
    if not folder.is_dir():
        return Finding("data folder", "error", f"LCEVAL_DATA={value} is not a folder", remedy)
    from lceval import listing

    sets = [of["dataset"] for of in listing.data() if of["at_hand"] and of["source"] != "shipped"]
    if not sets:
        return Finding("data folder", "note", f"{folder} holds the files of no dataset", remedy)
    return Finding("data folder", "ok", f"{folder}: {', '.join(sets)}")
