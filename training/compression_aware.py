"""Compression-aware training: draw an evictor for each context."""

from __future__ import annotations

import dataclasses
import random

from lceval.core.errors import UserError
from lceval.models import recipe
from lceval.models.geometry import Geometry
from lceval.models.policies import EVICTORS, QUANTIZERS, Evictor
from lceval.training.config import CompressionAware
from lceval.training.packing import check_trainable


def check(compression_aware: CompressionAware, geometry: Geometry | None = None) -> None:
    """Check that all evictors support training and the model, which is not known before anything is loaded.

    Raises:
        UserError: not an evictor, or one that does not support training or the model.
    """
    for name in compression_aware.evictors:
        evictor = with_budget(name, compression_aware.keep[1])
        if geometry is not None:
            geometry.check(evictor.stats_spec)


def with_budget(name: str, keep: float) -> Evictor:
    """The evictor of a KV recipe without a budget.

    Args:
        keep: share of the context that is kept.

    Raises:
        UserError: as `recipe.parse`, or the recipe does not evict, or does not support training.
    """
    method, _, rest = name.partition(":")
    text = f"{method}:{keep:.4f}" + (f":{rest}" if rest else "")
    parsed = recipe.parse(method if method in QUANTIZERS else text)
    evictor = check_trainable(parsed.evictor)
    if evictor is None or parsed.quantizer or parsed.sparse_attention:
        raise UserError(f"compression_aware.evictors: {name!r} does not evict; expected one of {', '.join(EVICTORS)}")
    return evictor


def draw(compression_aware: CompressionAware, rng: random.Random, progress: float) -> Evictor | None:
    """An evictor for one context; None: full cache.

    Args:
        progress: fraction of training completed, for the curriculum.
    """
    if rng.random() < compression_aware.full:
        return None
    name = rng.choice(compression_aware.evictors)
    low, high = compression_aware.keep
    if compression_aware.curriculum:
        low = high - (high - low) * min(1.0, 2 * progress)
    evictor = with_budget(name, rng.uniform(low, high))
    if "seed" in {field.name for field in dataclasses.fields(evictor)}:
        evictor = dataclasses.replace(evictor, seed=rng.randrange(1 << 16))  # type: ignore[call-arg]
    return evictor
