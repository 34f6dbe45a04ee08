"""Which questions a batch can hold: as many as the free memory has room for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import psutil
import torch

from lceval.models.engine import Engine
from lceval.models.prefix import Job

# The rest is for activations of a question, logits and fragments.
USABLE = 0.9
# Times the keys and values of a context: the prefill's own, and as much again for copies, scores and activations.
PREFILL = 2
# Where a container (cgroup v2) reads its memory limit and use.
CONTAINER = Path("/sys/fs/cgroup")


def has_room(engine: Engine, waiting: Collection[Job], job: Job, *, prefilled: bool) -> bool:
    """Whether a question has room beside those that wait in a batch, whose contexts are in memory already.

    Args:
        prefilled: whether its context is too. If not, the whole prefill is counted.
    """
    tokens = sum(other.room for other in waiting) + job.room
    tokens += 0 if prefilled else PREFILL * job.boundary
    needed = tokens * engine.token_bytes + (len(waiting) + 1) * engine.state_bytes
    return needed <= USABLE * free_bytes({*engine.layer_devices})


def free_bytes(devices: Collection[torch.device]) -> int:
    """Bytes that tensors spread evenly over these devices can take. All are of one kind."""
    if any(device.type == "cuda" for device in devices):
        return len(devices) * min(_free_on_gpu(device) for device in devices)
    limits = int(psutil.virtual_memory().available), _free_in_container()
    return min(limit for limit in limits if limit is not None)


def _free_on_gpu(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    # What PyTorch's allocator holds and no tensor uses.
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _free_in_container() -> int | None:
    """Bytes below the container's limit, without files that are only cached; None without a limit."""
    try:
        limit, use = ((CONTAINER / name).read_text() for name in ("memory.max", "memory.stat"))
    except OSError:
        return None
    used = dict(line.split() for line in use.splitlines())
    return max(0, int(limit) - int(used["anon"])) if limit.strip().isdecimal() else None
