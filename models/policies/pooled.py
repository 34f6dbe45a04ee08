"""Selection across heads and layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lceval.kernels.select import top


def top_pooled(scores: Sequence[Tensor], slots: int) -> list[Tensor]:
    """The masks [B, Hkv, S] of the `slots` highest scores of all heads of these layers together.

    Ties keep the earlier token, then the lower layer and head.

    Args:
        scores: per layer [B, Hkv, S]; under `parallelize=True` on several devices.
    """
    # [B, S, layers * Hkv], so that ties keep the earlier token.
    pooled = torch.cat([s.to(scores[0].device) for s in scores], 1).transpose(1, 2)
    keep = top(pooled.flatten(1), slots).view(pooled.shape).transpose(1, 2)
    # The kernels that gather slots read a head's mask as contiguous bytes.
    masks = torch.split(keep.contiguous(), [s.shape[1] for s in scores], 1)
    return [mask.to(s.device) for mask, s in zip(masks, scores, strict=True)]
