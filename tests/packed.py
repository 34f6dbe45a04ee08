"""The answers of a packed sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lceval.training.packing import IGNORED, Packing


def answer_nll(model: Any, packed: Mapping[str, Tensor], packing: Packing) -> Tensor:
    """[questions] NLL per token of the answer in each block of a sequence, with gradient."""
    rows = (packed["labels"][0] != IGNORED).nonzero()[:, 0]
    logits = model(
        input_ids=packed["input_ids"],
        position_ids=packed["position_ids"],
        packing=packing,
        logits_to_keep=rows,
        use_cache=False,
    ).logits[0]
    nll = F.cross_entropy(logits, packed["labels"][0][rows], reduction="none")
    block = packed["block"][0][rows]
    return torch.stack([nll[block == number].mean() for number in block.unique()])
