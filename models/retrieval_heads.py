"""Which KV heads retrieve (DuoAttention): read from a pattern file, or found on texts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lceval.core.errors import UserError
from lceval.core.io import read_object, read_text
from lceval.models.engine import Engine
from lceval.models.policies.base import StatsSpec
from lceval.models.policies.duo import HeadPattern
from lceval.models.prefill import Prefill
from lceval.models.rotation import rotate, unrotate

SCORES, CONFIG = "full_attention_heads.tsv", "config.json"
# Of kvpress: the tokens that a streaming head keeps where no pattern file says so, and the distance of the attention.
SINKS, RECENT, DISTANCE = 128, 256, 500
# Tokens of a text that are processed together.
PIECE = 2048


def pattern_of(engine: Engine, name: str, encode: Callable[[str], Sequence[int]]) -> HeadPattern:
    """The pattern that the model argument `heads` names.

    Args:
        name: a folder with the authors' files (`full_attention_heads.tsv`, scores by layer and KV head, and
            `config.json` with `sink_size` and `recent_size`), a text, or a folder of texts (`*.txt`).
        encode: tokens of a text.

    Raises:
        UserError: no such file, or one of another layout or model.
    """
    files = files_of(name)
    if files[0].name == SCORES:
        return _stored(engine, Path(name))
    ids = [list(encode(read_text(file))) for file in files]
    pieces = [tokens[start : start + PIECE] for tokens in ids for start in range(0, len(tokens), PIECE)]
    if not pieces:
        raise UserError(f"heads={name}: no text")
    return HeadPattern(scores_on(engine, pieces), SINKS, RECENT)


def files_of(name: str) -> list[Path]:
    """The scores, or the texts, that the model argument `heads` names.

    Raises:
        UserError: neither is there.
    """
    path = Path(name)
    if (path / SCORES).is_file():
        return [path / SCORES]
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"heads={name}: neither a folder with {SCORES}, nor a text, nor a folder of texts (*.txt)")
    return files


def digest(pattern: HeadPattern) -> str:
    """Hex digest of a pattern."""
    return hashlib.sha256(repr(pattern).encode()).hexdigest()


def _stored(engine: Engine, folder: Path) -> HeadPattern:
    config = read_object(folder / CONFIG, "pass a folder of DuoAttention's attention patterns")
    sinks, recent = (config.get(key) for key in ("sink_size", "recent_size"))
    if type(sinks) is not int or type(recent) is not int or min(sinks, recent) < 0:
        raise UserError(f"heads={folder}: {CONFIG} needs sink_size and recent_size, numbers of tokens")
    try:
        rows = [[float(x) for x in line.split()] for line in read_text(folder / SCORES).splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"heads={folder}: {SCORES} is no table of numbers ({error})") from None
    shape = engine.kv_heads
    if [len(row) for row in rows] != shape or not all(math.isfinite(x) for row in rows for x in row):
        raise UserError(
            f"heads={folder}: {SCORES} needs a row for each of the {len(shape)} full-attention layers, and in it a "
            "finite number for each KV head: use the pattern of this model"
        )
    scores = tuple(tuple(min(1.0, max(0.0, x)) for x in row) for row in rows)
    return HeadPattern(scores, sinks, recent)


def scores_on(engine: Engine, texts: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """The score of every KV head, by full-attention layer: how far back its mean query looks, as kvpress measures it.

    The mean query and the mean key of a text, both before RoPE, attend to each other over `DISTANCE` positions. The
    score is the area under the cumulated attention of the last one: 1 if all of it is on the first position. Mean over
    the query heads of a KV head and over the texts.

    Args:
        texts: token ids.

    Raises:
        UserError: a model without RoPE on channels i and i + R/2.
    """
    if engine.geometry.rotary is None:
        raise UserError(
            f"duo finds retrieval heads by RoPE on channels i and i + R/2, which {engine.geometry.model_type} does not "
            "have: pass a pattern as heads=FOLDER"
        )
    totals: Any = 0.0
    for ids in texts:
        prefill = engine.prefill(ids, StatsSpec(queries=len(ids)))
        totals = totals + torch.stack([scores.cpu() for scores in _scores(prefill)]) / len(texts)
    return tuple(tuple(row) for row in totals.tolist())


def _scores(prefill: Prefill) -> list[Tensor]:
    """The scores [Hkv] of each full-attention layer on one text."""
    scores = []
    for layer in prefill.layers:
        if not layer.is_full:
            continue
        rotary, queries = layer.stats.rotary, layer.stats.queries
        assert rotary is not None
        cos, sin = rotary(torch.arange(max(prefill.tokens, DISTANCE), device=queries.device))
        keys = layer.keys[:, :, : prefill.tokens]
        q, k = (
            unrotate(x.float(), cos[: prefill.tokens], sin[: prefill.tokens]).mean(2, keepdim=True)
            for x in (queries, keys)
        )
        q = rotate(q, cos[DISTANCE - 1 : DISTANCE], sin[DISTANCE - 1 : DISTANCE])
        q = q.reshape(keys.shape[1], -1, 1, keys.shape[3])
        k = rotate(k.expand(-1, -1, DISTANCE, -1), cos[:DISTANCE], sin[:DISTANCE])[0]
        attention = (torch.matmul(q, k[:, None].transpose(2, 3)) * layer.softmax.scaling).softmax(-1)
        scores.append(attention.cumsum(-1).mean((1, 2, 3)))
    return scores
