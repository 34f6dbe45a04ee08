"""MLPs from a sample of tokens: their attention inputs are on disk, a file for each layer, and a layer is in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lceval.core.io import read_object, replacing, write_json
from lceval.models.scorer import Scorer
from lceval.training.scorers.scored_contexts import ScoredSlots
from lceval.training.scorers.spec import Mlp

STATE = "sample.json"


class MlpFit:
    """The sampled tokens of the contexts so far.

    Args:
        scorer: MLPs, which `finish` trains.
        folder: folder of the sample and of finished layers; those that are there are continued.
        seed: seed of the sample, of the initial weights and of the batches.
        lengths: tokens of each context.

    Attributes:
        contexts: number of contexts so far.
    """

    def __init__(self, settings: Mlp, scorer: Scorer, folder: Path, seed: int, lengths: Sequence[int]) -> None:
        self._settings, self._scorer, self._folder, self._seed = settings, scorer, folder, seed
        drawn = sampled(settings.tokens, lengths)
        self._starts = [sum(drawn[:place]) for place in range(len(drawn) + 1)]
        self.contexts = int(read_object(folder / STATE, "delete it")["contexts"]) if (folder / STATE).is_file() else 0
        self._files = [
            (
                self._open(f"{place:03}.inputs.npy", scorer.input_dim, "float16"),
                self._open(f"{place:03}.targets.npy", scorer.output_dim, "float32"),
            )
            for place in range(scorer.n_modules)
        ]

    def _open(self, name: str, width: int, dtype: str) -> np.memmap:
        file = self._folder / name
        if self.contexts:
            return np.lib.format.open_memmap(file, mode="r+")
        return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=(self._starts[-1], width))

    def add(self, slots: ScoredSlots) -> None:
        """Add a context."""
        start, end = self._starts[self.contexts : self.contexts + 2]
        order = torch.randperm(len(slots.inputs[0]), generator=_generator(self._seed, self.contexts))
        chosen = order[: end - start].sort().values
        for (x, y), inputs, targets in zip(self._files, slots.inputs, slots.targets, strict=True):
            x[start:end] = inputs.cpu()[chosen].half().numpy()
            y[start:end] = targets.cpu()[chosen].numpy()
        self.contexts += 1

    def save(self) -> None:
        """Write a checkpoint."""
        for file in (file for pair in self._files for file in pair):
            file.flush()
        write_json(self._folder / STATE, {"contexts": self.contexts})

    def finish(self) -> Scorer:
        """The scorer with all layers trained; a layer that was trained before an interruption is read."""
        for place, (module, (x, y)) in enumerate(zip(self._scorer.layers, self._files, strict=True)):
            assert isinstance(module, nn.Sequential)
            file = self._folder / f"{place:03}.safetensors"
            if not file.is_file():
                inputs, targets = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y))
                train_layer(module, inputs, targets, self._settings, _generator(self._seed, place))
                with replacing(file) as out:
                    out.write(save(module.state_dict()))
            module.load_state_dict(load_file(file))
        return self._scorer


def sampled(tokens: int, lengths: Sequence[int]) -> list[int]:
    """How many tokens of each context are sampled: the same number, or all of a shorter context."""
    most = max(1, tokens // len(lengths))
    return [min(most, length) for length in lengths]


def train_layer(module: nn.Sequential, x: Tensor, y: Tensor, settings: Mlp, generator: torch.Generator) -> None:
    """Train the MLP of one layer from new weights.

    Channels and targets are standardized for Adam, and the two affine maps are part of the trained weights afterwards.

    Args:
        x: attention inputs [n, d].
        y: targets [n, h].
    """
    first, last = module[0], module[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    for layer in (first, last):  # as torch.nn.Linear does, from the generator
        bound = layer.in_features**-0.5
        for parameter in (layer.weight, layer.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    mean_x, std_x = _moments(x)
    mean_y, std_y = _moments(y)
    module.requires_grad_(True)
    optimizer = torch.optim.Adam(module.parameters(), lr=settings.learning_rate)
    steps = settings.epochs * math.ceil(len(x) / settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.epochs):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x), settings.batch):
            batch = order[start : start + settings.batch]
            predicted = module((x[batch].float() - mean_x) / std_x)
            loss = nn.functional.mse_loss(predicted, (y[batch] - mean_y) / std_y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    module.requires_grad_(False)
    first.weight.div_(std_x)
    first.bias.sub_(first.weight @ mean_x)
    last.weight.mul_(std_y[:, None])
    last.bias.mul_(std_y).add_(mean_y)


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column; 1 for a constant one."""
    std, mean = torch.std_mean(values.double(), 0, correction=0)
    return mean.float(), torch.where(std > 1e-6 * mean.abs(), std, 1.0).float()  # rounding leaves a constant 1e-8


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 20) + number & 0x7FFF_FFFF_FFFF_FFFF)
