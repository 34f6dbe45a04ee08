"""Products of a few rows with the weights of a model, on all threads of a CPU.

MKL, by which PyTorch multiplies in float32, runs a product of one row on a single thread, and those of a few rows
hardly better: a decoding step then reads the weights at a third of the memory's bandwidth. As a batch of products with
blocks of output channels they run on all threads (`lceval bench decode` measures a step).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# More rows are threaded by MKL itself.
MOST_ROWS = 8
BLOCKS_PER_THREAD = 2
# Weights of fewer numbers, such as those of an adapter, take no longer than the calls.
SMALLEST = 1 << 16


class FewRows:
    """Lets the linear layers of a model multiply in blocks while it is `active`.

    Args:
        model: a model on any device; only layers in float32 on a CPU are affected, whose output channels divide.
    """

    def __init__(self, model: nn.Module) -> None:
        self._is_active = False
        for module in model.modules():
            # A layer of an adapter or of quantized weights has a class, or a weight, of its own.
            if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
                module.forward = partial(self._multiply, module)  # type: ignore[method-assign]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block layers multiply in blocks."""
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False

    def _multiply(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """As the layer's forward pass. x: [..., C]."""
        weight, rows = layer.weight, x.numel() // x.shape[-1]
        blocks = BLOCKS_PER_THREAD * torch.get_num_threads()
        if (
            not self._is_active
            or rows > MOST_ROWS
            or blocks == BLOCKS_PER_THREAD
            or weight.shape[0] % blocks
            or weight.numel() < SMALLEST
            or not (weight.device.type == "cpu" and weight.dtype == x.dtype == torch.float32)
        ):
            return F.linear(x, weight, layer.bias)
        channels = weight.shape[1]
        split = weight.view(blocks, -1, channels).transpose(1, 2)
        out = torch.bmm(x.reshape(1, rows, channels).expand(blocks, -1, -1), split)
        out = out.transpose(0, 1).reshape(*x.shape[:-1], -1)
        return out if layer.bias is None else out + layer.bias
