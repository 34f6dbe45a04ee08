"""The decoding steps of a batch: on CUDA recorded once, as a CUDA graph, and replayed.

A step of a model is hundreds of launches, which take the host longer than a GPU needs for their work. A recorded step
is one launch. What changes between steps is on the device: tokens, positions, and the length of the tails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lceval.models.compressed import QuestionCache
from lceval.models.engine import Engine
from lceval.models.faults import is_out_of_memory

logger = logging.getLogger(__name__)

# Steps before one is recorded, by which kernels are compiled, and at least after it: less would not pay for recording.
BEFORE = AFTER = 4
# Records what a function computes without running it; the result runs it, into the same tensors.
Record = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """A function's launches as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Steps:
    """Feeds the tokens of its answers to a batch, after the questions.

    Args:
        limit: the maximum number of steps.
        record: how a step is recorded; by default as a CUDA graph on CUDA, else not at all.
    """

    def __init__(self, engine: Engine, cache: QuestionCache, limit: int, record: Record | None = None) -> None:
        self._engine, self._cache = engine, cache
        self._record = record or (cuda_graph if engine.device.type == "cuda" else None)
        self._left, self._steps = limit, 0
        self._replay: Callable[[], None] | None = None
        self._ids: Tensor | None = None
        self._logits: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [B, V] after tokens [B, 1]."""
        self._steps, self._left = self._steps + 1, self._left - 1
        if self._replay is not None:
            assert self._ids is not None
            self._ids.copy_(ids)
            self._cache.count_to(self._cache.first.length + 1)
        elif not self._is_due or not self._recorded(ids):
            return self._engine.forward(self._cache, ids, keep=1)[:, -1]
        assert self._replay is not None
        self._replay()
        assert self._logits is not None
        return self._logits

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed from now on."""
        return self._replay is not None

    @property
    def _is_due(self) -> bool:
        """Whether this step is to be recorded."""
        records = self._record is not None and self._engine.records_steps
        return records and self._steps > BEFORE and self._left >= AFTER and self._cache.steps_alike(self._left + 1)

    def _recorded(self, ids: Tensor) -> bool:
        """Record a step over these tokens; whether it could be."""
        assert self._record is not None
        length, own = self._cache.first.length, ids.clone()

        def step() -> None:
            self._logits = self._engine.forward(self._cache, own, keep=1)[:, -1]

        try:
            self._replay = self._record(step)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # Operations that wait for the device cannot be recorded: some models' routing of experts, or scaled RoPE.
            logger.warning("decoding steps run launch by launch, because they cannot be recorded: %s", error)
            self._engine.records_steps = False
            self._cache.count_to(length)
            return False
        self._ids = own
        return True
