"""A saved context against its prefill: what it costs to open a file instead of reading the text again.

The context is random tokens, because speed does not depend on their content. The file was just written, so the
operating system reads it from memory; a disk adds its own time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lceval.bench.decoding import SEED
from lceval.bench.machine import device, machine
from lceval.core.errors import UserError
from lceval.models.asking import LoadedModel

T = TypeVar("T")
QUESTION = "\n\nWhat is this text about?"
NEW_TOKENS = 16


def bench(pretrained: str, kv: str, *, tokens: int, **model_args: Any) -> dict[str, Any]:
    """Seconds of prefill and compression, of saving, and of opening.

    `identify_s` is the hash of the model's files, which a process computes once, for its first file; `speedup`
    includes it.

    Args:
        kv: KV recipe.
        tokens: context length, chat template included.

    Raises:
        UserError: a bad recipe, or a context that does not fit the model.
    """
    if tokens < 1:
        raise UserError("bench context requires at least one token")
    model = LoadedModel(pretrained, kv, device=device(), **model_args)
    ids = torch.randint(0, model.lcft.vocab_size, (tokens,), generator=torch.Generator().manual_seed(SEED)).tolist()
    context, prefill_s = _timed(lambda: model.compress_tokens(ids))
    answer = context.ask(QUESTION, max_new_tokens=NEW_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "context.safetensors")
        _, identify_s = _timed(lambda: model.settings)
        _, save_s = _timed(lambda: context.save(file))
        opened, open_s = _timed(lambda: model.open(file))
        file_bytes = file.stat().st_size
    return {
        "bench": "context",
        "model": pretrained,
        "recipe": str(model.lcft.recipe),
        "context_tokens": tokens,
        "kv_bytes": context.kv_bytes,
        "file_bytes": file_bytes,
        "prefill_s": prefill_s,
        "save_s": save_s,
        "identify_s": identify_s,
        "open_s": open_s,
        "speedup": prefill_s / (identify_s + open_s),
        "same_answer": opened.ask(QUESTION, max_new_tokens=NEW_TOKENS) == answer,
        "machine": machine(),
    }


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start
