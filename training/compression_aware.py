"""Compression-aware fine-tuning: which evictor the answers of a context see it through, drawn for each context."""

from __future__ import annotations

import dataclasses
import random

from lceval.errors import UserError
from lceval.models import recipe
from lceval.models.policies import EVICTORS, QUANTIZERS, Evictor
from lceval.training.config import CompressionAware
from lceval.training.packing import check_trainable


def check(compression_aware: CompressionAware) -> None:
    """Refuse what cannot be drawn, before anything is loaded.

    Raises:
        UserError: not an evictor, or one that cannot be trained.
    """
    for name in compression_aware.evictors:
        evictor(name, compression_aware.keep[1])


def evictor(name: str, keep: float) -> Evictor:
    """The evictor that a recipe string without an amount names, keeping a share.

    Raises:
        UserError: as `recipe.parse`; or it evicts nothing, or it cannot be trained.
    """
    method, _, rest = name.partition(":")
    text = f"{method}:{keep:.4f}" + (f":{rest}" if rest else "")
    found = recipe.parse(method if method in QUANTIZERS else text)
    made = check_trainable(found.evictor)
    if made is None or found.quantizer or found.sparse_attention:
        raise UserError(f"compression_aware.evictors: {name!r} evicts nothing; one of {', '.join(EVICTORS)}")
    return made


def draw(compression_aware: CompressionAware, rng: random.Random, progress: float) -> Evictor | None:
    """What one context's answers see it through; None is all of it.

    Args:
        progress: the share of the training that is done, for the curriculum.
    """
    if rng.random() < compression_aware.full:
        return None
    name = rng.choice(compression_aware.evictors)
    low, high = compression_aware.keep
    if compression_aware.curriculum:
        low = high - (high - low) * min(1.0, 2 * progress)
    made = evictor(name, rng.uniform(low, high))
    if "seed" in {field.name for field in dataclasses.fields(made)}:
        made = dataclasses.replace(made, seed=rng.randrange(1 << 16))  # type: ignore[call-arg]
    return made
