"""criticalkv, chunkkv, lagkv, compactor, finch, duo and block-wise keydiff against slow references."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama
from torch import Tensor

from lceval.core.errors import UserError
from lceval.kernels.softmax import Softmax
from lceval.models import attention, retrieval_heads
from lceval.models.engine import Engine
from lceval.models.policies import EVICTORS, Amount, Evictor, LayerView, StatsSpec, Wrapper
from lceval.models.policies.base import Chunks
from lceval.models.policies.chunkkv import ChunkKV
from lceval.models.policies.compactor import Compactor
from lceval.models.policies.criticalkv import CriticalKV
from lceval.models.policies.duo import Duo, HeadPattern
from lceval.models.policies.finch import Finch
from lceval.models.policies.keydiff import KeyDiff
from lceval.models.policies.knorm import KNorm
from lceval.models.policies.lagkv import LagKV
from lceval.models.policies.rkv import RKV
from lceval.models.policies.streaming import Streaming
from lceval.models.prefill_stats import PrefillStats
from lceval.models.recipe import key_types, parse
from lceval.models.reconstruction import Repetition

HEADS, KV_HEADS, DIM = 4, 2, 6
STREAMING = [0, 1, 18, 19]


def tensors(length: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(length + sum(shape)))


def view(length: int, question: int = 0, **more: Any) -> LayerView:
    """A layer of a context of `length` tokens, then a question."""
    total = length + question
    return LayerView(
        keys=tensors(1, 1, KV_HEADS, total, DIM),
        values=tensors(2, 1, KV_HEADS, total, DIM),
        queries=tensors(3, 1, HEADS, 0, DIM),
        softmax=Softmax(DIM**-0.5),
        layer=0,
        layers=1,
        question=question,
        **more,
    )


def kept(policy: Evictor, layer: LayerView) -> list[list[int]]:
    (mask,) = policy.select([policy.scores(layer)[..., : layer.tokens]])
    return [row.nonzero().squeeze(-1).tolist() for row in mask[0]]


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("first", [0.0, 0.5, 1.0])
def test_criticalkv_keeps_part_by_score_and_the_rest_by_score_times_output_norm(length: int, first: float) -> None:
    norms = torch.rand(1, KV_HEADS, length, generator=torch.Generator().manual_seed(9))
    layer, amount = view(length, output_norms=norms), Amount(12)
    inner = KNorm(amount=amount)
    budget = min(12, length)
    for head, ours in enumerate(kept(CriticalKV(amount=amount, inner=inner, first=first), layer)):
        scores = inner.scores(layer)[0, head].tolist()
        stage = best(scores, max(1, int(first * budget)) if first else 0)
        weighted = [(s + 1e-4) * n for s, n in zip(scores, norms[0, head].tolist(), strict=True)]
        rest = [i for i in sorted(range(length), key=lambda i: -weighted[i]) if i not in stage]
        assert ours == sorted([*stage, *rest[: budget - len(stage)]])


def test_criticalkv_keeps_what_its_inner_evictor_protects() -> None:
    layer = view(40, output_norms=torch.zeros(1, KV_HEADS, 40))
    policy = CriticalKV(amount=Amount(8), inner=Streaming(amount=Amount(8)), first=0.25)
    assert all(ours[:4] == [0, 1, 2, 3] for ours in kept(policy, layer))


@pytest.mark.parametrize("length", [1, 6, 7, 20, 41])
@pytest.mark.parametrize("budget", [1, 5, 12, 17])
def test_chunkkv_keeps_the_chunks_with_the_highest_mean_in_every_head(length: int, budget: int) -> None:
    layer, amount = view(length), Amount(budget)
    inner = KNorm(amount=amount)
    scores = inner.scores(layer)[0].sum(0).tolist()
    chunks = [range(start, min(start + 6, length)) for start in range(0, length, 6)]
    chunks.sort(key=lambda chunk: -statistics.fmean(scores[i] for i in chunk))
    expected = sorted([i for chunk in chunks for i in chunk][:budget])
    assert kept(ChunkKV(amount=amount, inner=inner, length=6), layer) == [expected] * KV_HEADS


@pytest.mark.parametrize("length", [3, 20, 21, 22, 37, 60])
@pytest.mark.parametrize("cross", [False, True])
def test_lagkv_scores_a_partition_on_the_scale_of_the_next(length: int, cross: bool) -> None:
    layer, sinks, lag, budget = view(length), 2, 9, 20
    parts = [range(start, start + lag) for start in range(sinks, length - lag + 1, lag)]
    for head, ours in enumerate(kept(LagKV(amount=Amount(budget), sinks=sinks, lag=lag, cross=cross), layer)):
        # Above every score: the sinks, and the most recent tokens.
        scores = [math.inf if i < sinks else 2.0 + i for i in range(length)]
        for part, after in pairwise(parts):
            spreads = [0.0] * lag
            for states in (layer.keys[0, head].tolist(), layer.values[0, head].tolist()):
                low = [min(states[j][d] for j in after) for d in range(DIM)]
                high = [max(states[j][d] for j in after) for d in range(DIM)]
                scaled = [[(states[i][d] - low[d]) / (high[d] - low[d]) for d in range(DIM)] for i in part]
                weights = [math.exp(statistics.stdev(row)) for row in scaled]
                spreads = [s + w / sum(weights) / 2 for s, w in zip(spreads, weights, strict=True)]
            ranks = [sum(x < y for x in spreads) / lag for y in spreads]
            for i, score in zip(part, spreads if cross else ranks, strict=True):
                scores[i] = score
        assert ours == best(scores, budget)


@pytest.mark.parametrize("length", [3, 12, 30, 50])
@pytest.mark.parametrize("block", [1, 7, 100])
def test_keydiff_reduces_the_context_to_its_budget_block_by_block(length: int, block: int) -> None:
    layer, budget = view(length, question=3), 11
    for head, ours in enumerate(kept(KeyDiff(amount=Amount(budget), block=block), layer)):
        keys = layer.keys[0, head].tolist()
        unit = [[x / math.hypot(*key) for x in key] for key in keys]
        mine = list(range(min(budget, length)))
        for start in range(budget, length, block):
            seen = [*mine, *range(start, min(start + block, length))]
            mean = [sum(unit[i][d] for i in seen) for d in range(DIM)]
            mine = [
                seen[i] for i in best([-sum(a * b for a, b in zip(unit[i], mean, strict=True)) for i in seen], budget)
            ]
        assert ours == mine


@pytest.mark.parametrize("question", [1, 5])
@pytest.mark.parametrize("normalize", [False, True])
def test_finch_keeps_what_the_question_attends_to(question: int, normalize: bool) -> None:
    length = 30
    queries = tensors(4, 1, HEADS, question, DIM)
    layer = view(length, question, question_queries=queries)
    for kv_head, ours in enumerate(kept(Finch(amount=Amount(9), normalize=normalize), layer)):
        scores = [0.0] * length
        for head in range(2 * kv_head, 2 * kv_head + 2):
            for row in range(question):
                keys = layer.keys[0, kv_head, : length + row + 1]
                weights = (keys @ queries[0, head, row] * DIM**-0.5).softmax(-1).tolist()
                factor = length + row if normalize else 1
                scores = [s + factor * w for s, w in zip(scores, weights[:length], strict=True)]
        assert ours == best(scores, 9)


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[:, None] * 10.0 ** -torch.arange(DIM // 2)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


@pytest.mark.parametrize("length", [6, 9, 26, 31, 45])
@pytest.mark.parametrize("steps", [1, 4, 100])
def test_the_attention_within_chunks_does_not_depend_on_how_tokens_arrive(length: int, steps: int) -> None:
    chunks, keys, queries = Chunks(3, 8, 2), tensors(5, 1, KV_HEADS, length, DIM), tensors(6, 1, HEADS, length, DIM)
    stats = PrefillStats(StatsSpec(chunk_attention=frozenset({chunks})), None)
    for start in range(0, length, steps):
        stop = min(start + steps, length)
        stats.update(queries[:, :, start:stop], keys[:, :, :stop], Softmax(1.0))
    received = stats.view(keys, keys, Softmax(1.0), 0, 1).chunk_attention[chunks]
    expected = torch.zeros(KV_HEADS, length - 5)
    for head in range(HEADS):
        for start in range(3, length - 2, 8):
            part = slice(start, min(start + 8, length - 2))
            weights = (queries[0, head, part] @ keys[0, head // 2, part].T).softmax(-1)
            expected[head // 2, start - 3 : part.stop - 3] += weights.sum(0) / 2
    torch.testing.assert_close(received[0], expected)


@pytest.mark.parametrize("length", [2, 12, 13, 14, 40])
def test_compactor_blends_leverage_and_attention_and_keeps_both_ends(length: int) -> None:
    policy = Compactor(amount=Amount(0.5), sketch=3)
    attention_received = torch.rand(1, KV_HEADS, max(0, length - 12), generator=torch.Generator().manual_seed(7))
    layer = view(length, rotary=rotary, chunk_attention={policy.chunks: attention_received})
    scores = policy.scores(layer)[0]
    assert scores[:, :8].isinf().all()
    assert scores[:, -4:].isinf().all()
    if length < 14:
        assert scores.isinf().all()
        return
    middle = range(8, length - 4)
    leverages, attentions = [], []
    sketch = torch.randn(1, KV_HEADS, DIM, 3, generator=torch.Generator().manual_seed(0)) / math.sqrt(3)
    for head in range(KV_HEADS):
        raw = []
        for i in middle:
            key = torch.complex(layer.keys[0, head, i, : DIM // 2], layer.keys[0, head, i, DIM // 2 :])
            key = key * torch.polar(torch.ones(DIM // 2), -i * 10.0 ** -torch.arange(DIM // 2))
            raw.append(torch.cat([key.real, key.imag]))
        keys = torch.stack(raw).double()
        x = (keys - keys.mean(0)) @ sketch[0, head].double()
        leverages.append((x @ torch.linalg.inv(x.T @ x + 0.01 * torch.eye(3, dtype=torch.double)) * x).sum(-1))
        weighted = [
            float(attention_received[0, head, i - 8] * layer.values[0, head, i].norm()) if i in middle else 0.0
            for i in range(7, length - 3)
        ]
        attentions.append(torch.tensor([sum(weighted[i : i + 3]) / 3 for i in range(len(middle))]))
    a, b = (torch.stack(x).float() for x in (leverages, attentions))
    expected = 0.5 * (a - a.mean()) / a.std() + (b - b.mean()) / b.std()
    torch.testing.assert_close(scores[:, 8:-4], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, [[[0], [0]], [[0], [0]]]),
        (4, [[STREAMING, STREAMING], [STREAMING, STREAMING]]),
        # 16 spare slots make one head whole; four more lengthen the end of the next.
        (8, [[STREAMING, [*range(20)]], [STREAMING, STREAMING]]),
        (9, [[STREAMING, [*range(20)]], [[0, 1, *range(14, 20)], STREAMING]]),
        (20, [[[*range(20)]] * 2] * 2),
    ],
)
def test_duo_keeps_the_best_heads_whole_and_spends_exactly_its_budget(
    budget: int, expected: list[list[list[int]]]
) -> None:
    pattern = HeadPattern(((0.2, 0.9), (0.5, 0.2)), sinks=2, recent=2)
    policy = Duo(amount=Amount(budget), pattern=pattern)
    layers = [dataclasses.replace(view(20), layer=layer, layers=2) for layer in range(2)]
    masks = policy.select([policy.scores(layer) for layer in layers])
    ours = [[head.nonzero().squeeze(-1).tolist() for head in mask[0]] for mask in masks]
    assert ours == expected


def test_the_keys_of_a_wrapper_and_of_its_inner_evictor_never_collide() -> None:
    wrappers = {name: cls for name, cls in EVICTORS.items() if issubclass(cls, Wrapper)}
    assert set(wrappers) == {"adakv", "criticalkv", "chunkkv"}
    for name, cls in wrappers.items():
        for inner, inner_cls in EVICTORS.items():
            if Wrapper.takes(inner_cls):
                assert not {*key_types(cls)} & {*key_types(inner_cls)}, (name, inner)


# Retrieval heads ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = llama(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=12,
        max_position_embeddings=4096,
    )
    model.set_attn_implementation(attention.register())
    return Engine(model, model, chunk=0, kernels=False, autocast=nullcontext, repetition=Repetition((5,), (7,)))


def encode(text: str) -> list[int]:
    return [ord(c) % 99 for c in text]


def folder(path: Path, scores: str, **config: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / retrieval_heads.SCORES).write_text(scores)
    (path / retrieval_heads.CONFIG).write_text(json.dumps(config))
    return str(path)


def test_a_pattern_of_the_authors_is_read_and_clipped(engine: Engine, tmp_path: Path) -> None:
    name = folder(tmp_path / "p", "0.25\t1.5\n-1\t0.5\n", sink_size=64, recent_size=256)
    assert retrieval_heads.pattern_of(engine, name, encode) == HeadPattern(((0.25, 1.0), (0.0, 0.5)), 64, 256)


@pytest.mark.parametrize(
    ("scores", "config", "message"),
    [
        ("0.1\t0.2\n", {"sink_size": 1, "recent_size": 1}, "needs a row for each of the 2 full-attention layers"),
        ("0.1\t0.2\n0.1\tnan\n", {"sink_size": 1, "recent_size": 1}, "a finite number for each KV head"),
        ("a\tb\n", {"sink_size": 1, "recent_size": 1}, "is no table of numbers"),
        ("0.1\t0.2\n0.1\t0.2\n", {"sink_size": 1}, "needs sink_size and recent_size"),
        ("0.1\t0.2\n0.1\t0.2\n", {"sink_size": -1, "recent_size": True}, "needs sink_size and recent_size"),
    ],
)
def test_a_damaged_pattern_is_refused(
    engine: Engine, tmp_path: Path, scores: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        retrieval_heads.pattern_of(engine, folder(tmp_path / "p", scores, **config), encode)


def test_heads_are_found_on_a_text_or_a_folder_of_texts(engine: Engine, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("some text, " * 300)
    two.write_text("something else altogether")
    first, second = (retrieval_heads.pattern_of(engine, str(file), encode) for file in (one, two))
    both = retrieval_heads.pattern_of(engine, str(tmp_path), encode)
    assert (first.sinks, first.recent) == (128, 256)
    # 3,300 tokens are two pieces: the folder has three.
    expected = (2 * torch.tensor(first.scores) + torch.tensor(second.scores)) / 3
    torch.testing.assert_close(torch.tensor(both.scores), expected)
    assert parse("duo:0.5").bound(pattern=first) != parse("duo:0.5").bound(pattern=second)
    assert str(parse("duo:0.5").bound(pattern=first)) == "duo:0.5"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="nor a folder of texts"):
        retrieval_heads.pattern_of(engine, str(empty), encode)


@torch.inference_mode()
def test_the_score_is_the_area_under_the_cumulated_attention_of_the_mean_query(engine: Engine) -> None:
    ids = torch.randint(0, 99, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = torch.tensor(retrieval_heads.scores_on(engine, [ids]))
    model = engine.model
    hidden = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    for index, layer in enumerate(model.model.layers):
        x = layer.input_layernorm(hidden[index])
        q = layer.self_attn.q_proj(x).mean(1).view(4, 12)
        k = layer.self_attn.k_proj(x).mean(1).view(2, 12)
        frequencies = 10000.0 ** (-torch.arange(6) / 6)
        for kv_head in range(2):
            areas = []
            for head in (2 * kv_head, 2 * kv_head + 1):
                a, b = (torch.complex(z[:6].double(), z[6:].double()) for z in (q[head], k[kv_head]))
                # The product of a rotated query and key depends on their distance alone.
                distance = torch.arange(499, -1, -1)[:, None] * frequencies
                logits = (a * b.conj() * torch.polar(torch.ones(500, 6).double(), distance.double())).real.sum(-1)
                areas.append((logits / math.sqrt(12)).softmax(-1).cumsum(-1).mean())
            assert float(ours[index, kv_head]) == pytest.approx(float(sum(areas) / 2), abs=1e-4)


@pytest.mark.parametrize("length", [3, 9, 40])
def test_rkv_prefers_attended_tokens_that_are_unlike_the_others(length: int) -> None:
    window = 4
    layer = dataclasses.replace(view(length), queries=tensors(8, 1, HEADS, length, DIM))
    w = min(window, length)
    old = length - w
    for kv_head, ours in enumerate(kept(RKV(amount=Amount(10), window=window, pool=3, mix=0.3), layer)):
        keys = layer.keys[0, kv_head]
        importance = [0.0] * old
        for row in range(old, length):
            logits = [
                max(float(layer.queries[0, head, row] @ keys[i]) * DIM**-0.5 for head in (2 * kv_head, 2 * kv_head + 1))
                for i in range(old)
            ]
            total = sum(math.exp(x) for x in logits)
            importance = [s + math.exp(x) / total / w for s, x in zip(importance, logits, strict=True)]
        pooled = [max(importance[max(0, i - 1) : i + 2]) for i in range(old)]
        unit = [[x / math.hypot(*key) for x in key] for key in keys.tolist()]
        sums = [0.0] * length
        for i in range(length):
            row_of = [
                0.0 if i == j else sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) for j in range(length)
            ]
            row_of[max((j for j in range(length) if row_of[j] > 0.5), default=0)] = 0.0
            sums = [s + x / length for s, x in zip(sums, row_of, strict=True)]
        redundancy = [math.exp(x) / sum(math.exp(y) for y in sums) for x in sums]
        scores = [0.3 * a - 0.7 * b for a, b in zip(pooled, redundancy, strict=False)]
        assert ours == [*best(scores, 10 - w), *range(old, length)]
