"""A decoding step that was recorded once, and is replayed, computes what each step computes.

CUDA graphs need a GPU. Here a recorder stands for them: it repeats the operations of a pass, PyTorch's and the launches
of the kernel, into the same tensors, so whatever a step reads from the host shows. The cases run in a child process
under Triton's interpreter (tests/interpreter.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import families
import interpreter
import pytest
import torch
from tiny_models import SHAPE, llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from lceval.kernels import step
from lceval.kernels.paged import PAGE
from lceval.models import attention
from lceval.models.compressed import QuestionCache
from lceval.models.engine import Engine
from lceval.models.question import QuestionLayer, SteppingLayer
from lceval.models.recipe import parse
from lceval.models.reconstruction import Repetition
from lceval.models.replay import AFTER, BEFORE, Steps
from lceval.models.window_layers import WindowLayer

RECIPES = ("adakv:0.5:window=8", "fp8")
# Sliding windows with sinks, and chunks, of fewer tokens than are written.
FAMILIES = {"gpt_oss": {"sliding_window": 7}, "llama4_text": {"attention_chunk_size": 8}}
CONTEXTS, QUESTIONS, STEPS = (30, 20), ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3]), 9


class Recording(TorchDispatchMode):
    """Records the operations of a block, which leave no trace; `replay` repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        written = [x for x, of in zip(args, schema.arguments, strict=False) if of.alias_info and of.alias_info.is_write]
        self._before += [(x, x.clone()) for x in written]
        out = func(*args, **kwargs)
        if written:
            self.calls.append(lambda: func(*args, **kwargs))
        else:
            self.calls.append(lambda: _copy(out, func(*args, **kwargs)))
        return out

    def launch(self, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        self.calls.append(lambda: kernel[grid](*args, **constants))

    def undo(self) -> None:
        for x, before in reversed(self._before):
            x.copy_(before)

    def replay(self) -> None:
        for call in self.calls:
            call()


def _copy(to: Any, of: Any) -> None:
    for x, new in zip(to, of, strict=True) if isinstance(to, (tuple, list)) else [(to, of)]:
        if x.data_ptr() != new.data_ptr():  # a view needs no repetition
            x.copy_(new)


class Launches:
    """Stands for the kernel: within a recording its launches are recorded instead."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.recording: Recording | None = None

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self.recording.launch, self.kernel, grid) if self.recording else self.kernel[grid]


def recorded(launches: Launches, run: Callable[[], None]) -> Callable[[], None]:
    with Recording() as recording:
        launches.recording = recording
        run()
    launches.recording = None
    recording.undo()
    return recording.replay


def tiny_engine(model: Any = None) -> Engine:
    model = model or llama()
    attention.install(model)
    return Engine(model, model, chunk=0, kernels=True, autocast=nullcontext, repetition=Repetition((5,), (7,)))


def question_cache(engine: Engine, recipe: str, room: int) -> tuple[QuestionCache, torch.Tensor]:
    """Questions of three lengths on two contexts, and their last logits."""
    kv = parse(recipe)
    ids = [torch.randint(0, 99, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in CONTEXTS]
    one, two = (engine.prefill(of, kv.stats_spec).compress(kv, consume=True) for of in ids)
    cache = engine.batch([one, one, two], QUESTIONS, room)
    longest = max(map(len, QUESTIONS))
    padded = torch.tensor([[0] * (longest - len(question)) + question for question in QUESTIONS])
    return cache, engine.forward(cache, padded, keep=1)[:, -1]


@torch.inference_mode()
def room_case() -> dict[str, float]:
    """Whether as many steps as a tail has room for are launches over the same tensors, and one more."""
    cache, logits = question_cache(engine := tiny_engine(), "full", STEPS)
    engine.forward(cache, logits.argmax(-1)[:, None])
    left = PAGE - cache.first.length
    return {"within": float(cache.steps_alike(left)), "beyond": float(cache.steps_alike(left + 1))}


@torch.inference_mode()
def replay_case(recipe: str, family: str = "") -> dict[str, float]:
    """The largest difference between steps that are replayed and that are not, or by PyTorch, and how often a step was
    recorded."""
    engine = tiny_engine(families.model(family, **FAMILIES[family]) if family else None)
    launches, recordings = Launches(step.step_kernel), []
    step.step_kernel = launches

    def record(run: Callable[[], None]) -> Callable[[], None]:
        recordings.append(recorded(launches, run))
        return recordings[-1]

    worst, sides = 0.0, []
    for of, engine.kernels in ((record, True), (None, True), (None, False)):
        cache, logits = question_cache(engine, recipe, STEPS)
        feed = Steps(engine, cache, STEPS, of)
        tokens = logits.argmax(-1)
        results = [feed((tokens + number)[:, None] % 99).clone() for number in range(STEPS)]
        results.append(engine.forward(cache, tokens[:, None], keep=1)[:, -1])  # the cache knows what was replayed
        sides.append(results)
    for of_step in zip(*sides, strict=True):
        worst = max(worst, *((of_step[0] - other).abs().max().item() for other in of_step[1:]))
    return {"difference": worst, "recordings": len(recordings)}


CASES: dict[str, Callable[[], dict[str, float]]] = {recipe: partial(replay_case, recipe) for recipe in RECIPES}
CASES |= {family: partial(replay_case, "full", family) for family in FAMILIES}
CASES["room"] = room_case


@pytest.mark.parametrize("recipe", [*RECIPES, *FAMILIES])
def test_replayed_steps_are_those_that_run_one_by_one(
    recipe: str, interpreted: Callable[[str], dict[str, float]]
) -> None:
    assert STEPS > BEFORE + AFTER
    result = interpreted(recipe)
    assert result["recordings"] == 1
    assert result["difference"] <= 1e-5


def test_no_step_is_recorded_that_would_write_past_the_tails(interpreted: Callable[[str], dict[str, float]]) -> None:
    assert interpreted("room") == {"within": 1.0, "beyond": 0.0}


class Operations(TorchDispatchMode):
    """Counts operations, without those that return a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(of.alias_info and not of.alias_info.is_write for of in func._schema.returns)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize(
    "recipe", ["full", *RECIPES, "int4:residual=10", "snapkv:0.5:window=8+kv8v4:residual=10", *FAMILIES]
)
def test_a_step_is_one_launch_and_one_operation_a_layer(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []
    engine = tiny_engine(families.model(recipe, **FAMILIES[recipe]) if recipe in FAMILIES else None)
    cache, logits = question_cache(engine, "full" if recipe in FAMILIES else recipe, STEPS)
    operations = Operations()
    for layer, function in (
        (SteppingLayer, SteppingLayer.append),
        (QuestionLayer, QuestionLayer.attend),
        (WindowLayer, WindowLayer.attend),
    ):

        def count(*args: Any, function: Any = function) -> Any:
            with operations:
                return function(*args)

        monkeypatch.setattr(layer, function.__name__, count)
    # Counted where no kernel runs, because the interpreter's own operations would count too.
    monkeypatch.setattr(step, "runs_kernels", lambda *_: True)
    monkeypatch.setattr(step, "step_kernel", {(n,): lambda *x, **_: launches.append(x) for n in range(10_000)})
    for _ in range(2):  # the first step builds queues
        operations.count = 0
        launches.clear()
        engine.forward(cache, logits.argmax(-1)[:, None])
    layers = len(engine.geometry.layers)
    assert len(launches) == operations.count == layers


@torch.inference_mode()
def test_a_step_of_qwen2_is_the_operations_that_the_documentation_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, model = (Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "num_hidden_layers": 28})).eval() for _ in range(2))
    ours = tiny_engine(model)
    counts, token = [], torch.tensor([[5]])
    past = theirs(input_ids=token, use_cache=True).past_key_values
    cache, logits = question_cache(ours, "full", STEPS)
    monkeypatch.setattr(step, "runs_kernels", lambda *_: True)
    monkeypatch.setattr(step, "step_kernel", {(n,): lambda *_, **__: None for n in range(10_000)})
    ours.forward(cache, logits.argmax(-1)[:, None])  # builds queues
    for run in (
        lambda: theirs(input_ids=token, cache=past, use_cache=True),
        lambda: ours.forward(cache, logits.argmax(-1)[:, None], keep=1),
    ):
        with Operations() as operations:
            run()
        counts.append(operations.count)
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    assert f"launches {counts[1]} operations, where transformers' own launches {counts[0]:,}\n" in text


if __name__ == "__main__":
    interpreter.main(CASES)
