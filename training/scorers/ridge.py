"""Linear maps by ridge regression from sums over tokens, so that no token is stored.

With Z = [X 1] the sum of Z^T [Z Y] has all that the regression of Y on X with an intercept needs:

    W = (X_c^T X_c + a n I)^-1 X_c^T Y_c        b = mean(Y) - mean(X) W

where _c is centred and a is `ridge` times the mean variance of a channel.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lceval.core.io import replacing
from lceval.models.scorer import Scorer
from lceval.training.scorers.scored_contexts import ScoredSlots
from lceval.training.scorers.spec import Linear

SUMS = "sums.safetensors"


class RidgeFit:
    """The sums of the contexts so far, in float64.

    Args:
        scorer: linear maps, which `finish` sets.
        folder: folder of the checkpoint; one that is there is continued.

    Attributes:
        contexts: number of contexts so far.
    """

    def __init__(self, settings: Linear, scorer: Scorer, folder: Path) -> None:
        self._settings, self._scorer, self._file = settings, scorer, folder / SUMS
        self.contexts = 0
        size = scorer.input_dim + 1
        self._sums = torch.zeros(scorer.n_modules, size, size + scorer.output_dim, dtype=torch.float64)
        if self._file.is_file():
            with safe_open(self._file, framework="pt") as stored:
                self._sums, self.contexts = stored.get_tensor("sums"), int(stored.metadata()["contexts"])

    def add(self, slots: ScoredSlots) -> None:
        """Add a context."""
        for place, (inputs, targets) in enumerate(zip(slots.inputs, slots.targets, strict=True)):
            x, y = inputs.double(), targets.double()
            z = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            self._sums[place] += (z.T @ torch.cat([z, y], 1)).cpu()
        self.contexts += 1

    def save(self) -> None:
        """Write a checkpoint."""
        with replacing(self._file) as out:
            out.write(save({"sums": self._sums}, {"contexts": str(self.contexts)}))

    def finish(self) -> Scorer:
        """The scorer with the maps of all contexts."""
        for module, sums in zip(self._scorer.layers, self._sums, strict=True):
            assert isinstance(module, nn.Linear)
            weight, bias = solve(sums, self._settings.ridge)
            module.weight.data.copy_(weight)
            module.bias.data.copy_(bias)
        return self._scorer


def solve(sums: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight [h, d] and bias [h] from the sums [d + 1, d + 1 + h] of one layer."""
    d = sums.shape[0] - 1
    n = sums[d, d]
    mean_x, mean_y = sums[d, :d] / n, sums[d, d + 1 :] / n
    variance = sums[:d, :d] / n - mean_x[:, None] * mean_x
    covariance = sums[:d, d + 1 :] / n - mean_x[:, None] * mean_y
    variance.diagonal().add_(ridge * variance.diagonal().mean())
    weight = torch.linalg.solve(variance, covariance).T
    return weight, mean_y - weight @ mean_x
