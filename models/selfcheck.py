"""Whether a model over our cache is the model of transformers, tried on a few tokens when it is loaded.

Architectures differ in more than their configuration says, and attention that is computed wrongly still writes fluent
text. So no model runs unless a context, a question and a step give the logits of transformers' own attention.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from lceval.models import attention, chunkwise
from lceval.models.engine import Engine
from lceval.models.faults import is_out_of_memory
from lceval.models.geometry import unsupported
from lceval.models.policies import StatsSpec
from lceval.models.recipe import Recipe

CONTEXT, QUESTION, LAST = 24, 7, 3
# Tokens of a context over which kernels are compiled: some slots are evicted, some quantized, some chosen.
WARM_UP = 300
# Distance as a share of the logits' spread, by bits. Rounding to 16 bits alone reaches 6% in small random models.
TOLERANCE = {32: 1e-4, 16: 0.1}


@torch.inference_mode()
def verify(engine: Engine, base: Any) -> None:
    """Compare the logits of a question over an uncompressed context with those of transformers.

    Args:
        base: the transformers model of `engine`, which attends through our attention function.

    Raises:
        UserError: they differ, or the model does not run over our cache at all.
    """
    name = base.config.get_text_config().model_type
    ids = torch.tensor([_text(base, CONTEXT + QUESTION + LAST)], device=engine.device)
    base.set_attn_implementation("eager")
    try:
        with engine.autocast():
            expected = base(input_ids=ids, use_cache=False).logits[0]
    finally:
        base.set_attn_implementation(attention.NAME)
    try:
        logits = _over_our_cache(engine, ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise unsupported(name, f"does not run over another cache than its own ({error})") from error
    # Autocast computes in 16 bits over weights of 32, and some models compute logits of 32 over weights of 16.
    bits = min(torch.finfo(dtype).bits for dtype in (engine.dtype, expected.dtype))
    tolerance = TOLERANCE[min(bits, 32)]
    expected = torch.cat([expected[CONTEXT:-LAST], expected[-2:]]).float()
    if logits.shape != expected.shape or not _error(logits, expected) < tolerance:
        raise unsupported(name, "computes its attention in a way of its own")


@torch.inference_mode()
def warm_up(engine: Engine, base: Any, kv: Recipe) -> None:
    """Run a context, a question and steps under a recipe, so that its kernels are compiled before anything is timed."""
    ids = _text(base, WARM_UP)
    if kv.reads_in_chunks:
        context, _ = chunkwise.read(engine, ids, kv)
    else:
        context = engine.prefill(ids, kv.stats_spec).compress(kv, consume=True)
    cache = engine.batch([context], [ids[:QUESTION]], LAST)
    for tokens in (ids[:QUESTION], *zip(ids[:LAST])):
        engine.forward(cache, torch.tensor([tokens], device=engine.device), keep=1)


def _text(base: Any, tokens: int) -> list[int]:
    """Ids of no special token that the configuration names, such as one that stands for an image."""
    named = (value for key, value in base.config.to_dict().items() if key.endswith(("token_id", "token_index")))
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    drawn = torch.randperm(base.get_input_embeddings().num_embeddings, generator=torch.Generator().manual_seed(0))
    return list(islice(cycle(token for token in drawn.tolist() if token not in special), tokens))


def _over_our_cache(engine: Engine, ids: Tensor) -> Tensor:
    """Logits [QUESTION + 2, V] of a question in ids [1, T], and of the last two tokens, each at the end of a pass."""
    context = engine.prefill(ids[0, :CONTEXT].tolist(), StatsSpec()).compress(Recipe(), consume=True)
    cache = context.fork(QUESTION + LAST, kernels=engine.kernels)
    question, *steps = torch.split(ids[:, CONTEXT:], [QUESTION, LAST - 1, 1], 1)
    logits = [engine.forward(cache, question), *(engine.forward(cache, step, keep=1) for step in steps)]
    return torch.cat(logits, 1)[0].float()


def _error(logits: Tensor, expected: Tensor) -> float:
    """Distance as a share of the spread, in the median token: rounding can send single tokens to other experts."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((logits - expected).norm(dim=-1) / spread).median())
