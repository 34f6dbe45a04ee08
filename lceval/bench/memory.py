"""Peak memory of a block of code, as the allocator or the operating system saw it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Bytes at the peak of the block, above those before it; None before its end, and where nobody counts them."""

    bytes: int | None = None


@contextmanager
def peak() -> Iterator[Peak]:
    """Measure the block: by CUDA's allocator, or on a CPU under Linux by the resident memory of the process.

    Resident memory includes activations and the workspace of every operator, not tensors of a cache alone.
    """
    measured = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield measured
        measured.bytes = torch.cuda.max_memory_allocated() - before
    elif _resettable():
        before = _resident("VmRSS")
        yield measured
        measured.bytes = max(0, _resident("VmHWM") - before)
    else:
        yield measured


def _resettable() -> bool:
    """Return free memory to the system, and start a new high-water mark; False where the system has none."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
