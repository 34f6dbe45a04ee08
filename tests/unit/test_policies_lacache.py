"""LaCache's ladder against a token-by-token reference, and step-wise eviction against a longer prefill."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lceval.kernels.select import top
from lceval.kernels.softmax import Softmax
from lceval.models.policies.base import Amount, LayerView, StepEvictor, StepView
from lceval.models.policies.lacache import LaCache, Ladder
from lceval.models.policies.streaming import Streaming

spans = st.integers(1, 20).flatmap(lambda span: st.tuples(st.just(span), st.integers(0, span - 1)))


def kept_by(policy: StepEvictor, length: int, layer: int = 0, layers: int = 1) -> list[int]:
    nothing = torch.zeros(1, 1, length, 1)
    scores = policy.scores(LayerView(nothing, nothing, nothing, Softmax(1.0), layer, layers))
    return policy.select([scores])[0][0, 0].nonzero().squeeze(-1).tolist()


def told_token_by_token(policy: LaCache, budget: int, seen: int, layer: int, layers: int) -> list[int]:
    """Compact a whole rung at each overflow; remaining room goes to its evicted tokens, newest first."""
    stay = math.ceil(policy.span / (policy.span - policy.overlap))
    rung = max(1 + math.ceil((layers - policy.span) / (policy.span - policy.overlap)), stay + 1)
    first = layer % (rung - stay + 1)
    spared = min(layers, budget - policy.sinks - rung)
    cache: list[int] = []
    dropped: list[int] = []
    cursor = policy.sinks
    for token in range(seen):
        cache.append(token)
        if len(cache) <= budget:
            continue
        if spared < 0:
            del cache[min(policy.sinks, budget)]
            continue
        if cursor + rung > budget - spared:
            cursor = policy.sinks
        slots = cache[cursor : cursor + rung]
        dropped = slots[:first] + slots[first + stay :]
        cache[cursor : cursor + rung] = slots[first : first + stay]
        cursor += stay
    room = min(seen, budget) - len(cache)
    return sorted(cache + dropped[len(dropped) - room :])


@settings(deadline=None)
@given(spans, st.integers(0, 8), st.integers(1, 80), st.integers(0, 400), st.integers(1, 40), st.data())
def test_the_ladder_keeps_what_compaction_keeps(
    span: tuple[int, int], sinks: int, budget: int, seen: int, layers: int, data: st.DataObject
) -> None:
    policy = LaCache(amount=Amount(budget), sinks=sinks, span=span[0], overlap=span[1])
    layer = data.draw(st.integers(0, layers - 1))
    expected = told_token_by_token(policy, budget, seen, layer, layers)
    assert len(expected) == min(seen, budget)
    assert kept_by(policy, seen, layer, layers) == expected


def test_the_first_compaction_by_hand() -> None:
    """Six layers, span 3, overlap 1: rungs of 1 + ceil(3/2) = 3 tokens, of which ceil(3/2) = 2 are kept."""
    ladder = Ladder(20, 4, 3, 2, 0, 6)
    ladder.advance(20)
    assert ladder.kept.tolist() == list(range(20))
    ladder.advance(23)
    assert ladder.kept.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 10, 11, *range(13, 23)]
    policy = LaCache(amount=Amount(20), span=3, overlap=1)
    assert kept_by(policy, 23, layer=0, layers=6) == ladder.kept.tolist()
    assert kept_by(policy, 23, layer=1, layers=6) == [0, 1, 2, 3, 5, 6, 8, 9, 11, 12, *range(13, 23)]


@pytest.mark.parametrize(("span", "overlap"), [(16, 0), (9, 3)])
def test_all_layers_together_span_more_of_the_context_than_one(span: int, overlap: int) -> None:
    policy = LaCache(amount=Amount(128), span=span, overlap=overlap)
    kept = [set(kept_by(policy, 400, layer, 32)) for layer in range(32)]
    assert all(set(range(4)) | set(range(400 - 32, 400)) <= one for one in kept)
    assert len(set().union(*kept)) > 1.5 * 128


@settings(deadline=None)
@given(
    st.sampled_from([Streaming, LaCache]),
    st.integers(1, 60),
    st.integers(0, 120),
    st.lists(st.integers(1, 9), max_size=30),
    st.integers(0, 30),
)
def test_steps_keep_what_a_prefill_of_the_same_length_would(
    cls: type[StepEvictor], budget: int, context: int, chunks: list[int], fork_at: int
) -> None:
    policy, layer, layers = cls(amount=Amount(budget), when="always"), 3, 12
    kept = torch.tensor(kept_by(policy, context, layer, layers), dtype=torch.int64)
    memory: dict[str, object] = {}
    seen = context
    for number, chunk in enumerate(chunks):
        if number == fork_at:
            memory = copy.deepcopy(memory)
        kept = torch.cat([kept, torch.arange(seen, seen + chunk)])
        seen += chunk
        positions = kept.expand(2, 3, -1)
        view = StepView(positions, torch.empty(0), torch.empty(0), seen, layer, layers, budget, memory)
        mask = top(policy.step_scores(view), budget)
        assert mask.eq(mask[:1, :1]).all()
        kept = kept[mask[0, 0]]
    assert kept.tolist() == kept_by(policy, seen, layer, layers)


def test_a_copied_memory_is_independent() -> None:
    policy = LaCache(amount=Amount(40), when="always")

    def step(seen: int, memory: dict[str, object]) -> list[int]:
        positions = torch.arange(seen).expand(1, 1, seen)
        view = StepView(positions, torch.empty(0), torch.empty(0), seen, 0, 12, 40, memory)
        return top(policy.step_scores(view), 40)[0, 0].nonzero().squeeze(-1).tolist()

    ours: dict[str, object] = {}
    step(100, ours)
    theirs = copy.deepcopy(ours)
    step(150, theirs)
    assert step(101, ours) == kept_by(policy, 101, 0, 12)
    # A question rolled back to an earlier length restarts its ladder.
    assert step(90, theirs) == kept_by(policy, 90, 0, 12)


@pytest.mark.parametrize("budget", [64, 32768])
def test_a_long_context_is_processed_once_for_all_layers_of_a_phase(budget: int) -> None:
    """128k tokens over 30 layers; processed pass by pass, since token by token would take minutes."""
    policy = LaCache(amount=Amount(budget))
    kept = {layer: kept_by(policy, 131072, layer, 30) for layer in (0, 1, 2, 3, 4, 29)}
    assert kept[0] == kept[4]
    assert kept[1] == kept[29]
    assert kept[0] != kept[1]
    assert all(len(x) == budget for x in kept.values())
