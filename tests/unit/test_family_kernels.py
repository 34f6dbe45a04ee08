"""Models with sinks, capped logits, latents, and keys wider than values: the kernels give the logits of PyTorch.

The cases run in a child process under Triton's interpreter (tests/interpreter.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import families
import interpreter
import pytest
import torch
from torch import Tensor

from lceval.kernels import compact, decode, dispatch, window
from lceval.models import attention
from lceval.models.engine import Engine
from lceval.models.recipe import Recipe, parse
from lceval.models.reconstruction import Repetition

# Sizes that are multiples of 16, as those of checkpoints are.
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "gpt_oss": {},
    "mimo_v2_flash": {"head_dim": 48, "v_head_dim": 32},
    "deepseek_v3": {"qk_rope_head_dim": 16, "head_dim": 16, "qk_head_dim": 32},
}
# The functions that launch kernels, as each recipe is to call them.
SPIES = {
    "decode": (decode, "decode"),
    "quantized": (dispatch, "decode_quantised"),
    "selected": (dispatch, "decode_selected"),
    "window": (window, "_launch"),
    "compact": (compact, "_index"),
}
RECIPES = {
    "full": {"decode"},
    "snapkv:0.6:window=8": {"decode", "window", "compact"},
    "fp8": {"decode"},
    "int4:residual=0": {"quantized"},
    "adakv:0.6:window=8+quest:0.5:skip=0:page=4": {"selected", "window", "compact"},
}
CONTEXT = 150


def answer(engine: Engine, recipe: Recipe, ids: Tensor) -> Tensor:
    """Logits of two questions of five tokens, the last of them alone, after one context."""
    prefill = engine.prefill(ids[0, :CONTEXT].tolist(), recipe.stats_spec)
    cache = prefill.compress(recipe, consume=True).fork(6, kernels=engine.kernels)
    cache.select([0, 0])
    parts = ids[:, CONTEXT:].split([5, 1], 1)
    return torch.cat([engine.forward(cache, part) for part in parts], 1)


@torch.inference_mode()
def case(family: str, text: str) -> dict[str, Any]:
    """How far the logits by kernels are from those without, in their standard deviation, and what was called."""
    model, recipe = families.model(family, **MODELS[family]), parse(text)
    ids = torch.randint(3, 99, (2, CONTEXT + 6), generator=torch.Generator().manual_seed(0))
    attention.install(model)
    logits, called = [], {}
    for kernels in (False, True):
        with ExitStack() as stack:
            spies = {
                name: stack.enter_context(mock.patch.object(module, function, wraps=getattr(module, function)))
                for name, (module, function) in SPIES.items()
            }
            engine = Engine(
                model, model, chunk=0, kernels=kernels, autocast=nullcontext, repetition=Repetition((5,), (7,))
            )
            logits.append(answer(engine, recipe, ids))
            called[kernels] = sorted(name for name, spy in spies.items() if spy.called)
    difference = (logits[0] - logits[1]).abs().max() / logits[0].std()
    return {"difference": difference.item(), "without": called[False], "with": called[True]}


CASES: dict[str, Callable[[], Any]] = {
    f"{family} {text}": partial(case, family, text) for family, text in product(MODELS, RECIPES)
}


@pytest.mark.parametrize(("family", "text"), [*product(MODELS, RECIPES)])
def test_the_kernels_give_the_logits_of_pytorch(family: str, text: str, interpreted: Callable[[str], Any]) -> None:
    result = interpreted(f"{family} {text}")
    assert result["difference"] < 1e-4
    assert result["without"] == []
    # Latents are gathered in PyTorch, which leaves values a view of the keys.
    expected = RECIPES[text] - ({"compact"} if family == "deepseek_v3" else set())
    assert {*result["with"]} >= expected


if __name__ == "__main__":
    interpreter.main(CASES)
