"""The hardware and software that a measurement depends on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from lceval.records.identity import versions


def machine() -> dict[str, Any]:
    """Processor, threads, accelerator and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())


def device() -> str:
    """The device that models run on: cuda if available, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"
