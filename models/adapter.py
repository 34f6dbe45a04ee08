"""The dtype of unmerged adapters."""

from __future__ import annotations

from typing import Any

import torch


def cast(model: Any) -> None:
    """Cast the adapter weights of a PEFT model to the dtype of the model, which computes no gradients.

    PEFT loads 16-bit adapters in float32, for training, and lm-eval has no argument to change that. In inference it
    adds casts to every layer of every step, and float32 buffers for a whole prefill chunk.
    """
    for name, parameter in model.named_parameters():
        if model.base_model.prefix in name and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(model.dtype)
