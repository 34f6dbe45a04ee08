"""Faults of single samples: memory that does not suffice, and logits that are no numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

OUT_OF_MEMORY = "out of memory"
NOT_FINITE = "the model's logits are NaN or infinite"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """Notes the rows of a generation whose largest logit is ever NaN or infinite.

    Such rows continue with logits of 0, because sampling from NaN aborts all rows of the batch.
    """

    def __init__(self) -> None:
        self._failed: Tensor | None = None

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Logits [B, V] in, logits [B, V] out."""
        failed = ~scores.amax(-1).isfinite()
        self._failed = failed if self._failed is None else self._failed | failed
        return scores.masked_fill(failed[:, None], 0.0)

    def failed(self, rows: int) -> list[bool]:
        """Whether each of `rows` questions failed; a question with several beams fails with any of them."""
        return [False] * rows if self._failed is None else self._failed.view(rows, -1).any(-1).tolist()
