"""Whether a model over our cache is the model of transformers, tried on a few tokens when it is loaded.

Architectures differ in more than their configuration says, and attention that is computed wrongly still writes fluent
text. So no model runs unless a context, a question and a step give the logits of transformers' own attention.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from lceval.models import attention
from lceval.models.engine import Engine
from lceval.models.faults import is_out_of_memory
from lceval.models.geometry import unsupported
from lceval.models.policies import StatsSpec
from lceval.models.recipe import Recipe

CONTEXT, QUESTION, LAST = 24, 7, 2
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
    ids = _text(base).to(engine.device)
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
    expected = torch.cat([expected[CONTEXT:-LAST], expected[-1:]]).float()
    if logits.shape != expected.shape or not _error(logits, expected) < tolerance:
        raise unsupported(name, "computes its attention in a way of its own")


def _text(base: Any) -> Tensor:
    """Token ids [1, T] of no special token that the configuration names, such as one that stands for an image."""
    named = (value for key, value in base.config.to_dict().items() if key.endswith(("token_id", "token_index")))
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    drawn = torch.randperm(base.get_input_embeddings().num_embeddings, generator=torch.Generator().manual_seed(0))
    tokens = [token for token in drawn.tolist() if token not in special]
    return torch.tensor([list(islice(cycle(tokens), CONTEXT + QUESTION + LAST))])


def _over_our_cache(engine: Engine, ids: Tensor) -> Tensor:
    """Logits [QUESTION + 1, V] of a question in ids [1, T], and of the very last token."""
    context = engine.prefill(ids[0, :CONTEXT].tolist(), StatsSpec()).compress(Recipe(), consume=True)
    cache = context.fork(QUESTION + LAST, kernels=engine.kernels)
    logits = [engine.forward(cache, ids[:, CONTEXT:-LAST]), engine.forward(cache, ids[:, -LAST:], keep=1)]
    return torch.cat(logits, 1)[0].float()


def _error(logits: Tensor, expected: Tensor) -> float:
    """Distance as a share of the spread, in the median token: rounding can send single tokens to other experts."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((logits - expected).norm(dim=-1) / spread).median())
