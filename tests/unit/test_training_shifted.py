"""Shifted attention in training: agreement with the kernels' reference, receptive fields, full attention in eval."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lceval.core.errors import UserError
from lceval.kernels.shifted import reference
from lceval.training import shifted_attention
from lceval.training.shifted_attention import Segments, attend, by_lengths, even_group


def tensors(heads: int, kv_heads: int, batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v with the strides of a projection, and a gradient of the output."""
    rng = torch.Generator().manual_seed(tokens)
    tensors = [torch.randn(batch, tokens, n, 8, generator=rng, dtype=dtype) for n in (heads, kv_heads, kv_heads, heads)]
    return [x.transpose(1, 2).requires_grad_() for x in tensors]


def truth(q: Tensor, k: Tensor, v: Tensor, segments: Segments, group: int) -> Tensor:
    """The reference, one sequence at a time."""
    o = torch.zeros_like(q)
    for row, start, stop in segments:
        part = (x[row : row + 1, :, start:stop] for x in (q, k, v))
        o[row : row + 1, :, start:stop] = reference(*part, None, group, 0.3)[0]
    return o


@settings(deadline=None, max_examples=25)
@given(
    cuts=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=3),
    gap=st.integers(0, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    half=st.integers(1, 20),
    kernels=st.booleans(),
)
def test_packed_and_padded_sequences_agree_with_the_reference_of_each(
    cuts: list[list[int]], gap: int, heads: tuple[int, int], half: int, kernels: bool
) -> None:
    segments = []
    for row, lengths in enumerate(cuts):
        at = gap
        for length in lengths:
            segments.append((row, at, at + length))
            at += length
    tokens = max(stop for _, _, stop in segments) + gap
    *qkv, do = tensors(*heads, len(cuts), tokens)
    expected = truth(*qkv, segments, 2 * half)
    expected_gradients = torch.autograd.grad(expected, qkv, do)
    output = (by_lengths if kernels else attend)(*qkv, segments, 2 * half, 0.3)
    gradients = torch.autograd.grad(output, qkv, do)
    # Two float32 orders of summation.
    for x, y in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 65, 101])
@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_whole_rows_agree_with_the_reference_at_odd_lengths(tokens: int, share: float) -> None:
    *qkv, _ = tensors(9, 3, 2, tokens)
    group = even_group(tokens, share)
    torch.testing.assert_close(
        attend(*qkv, None, group, 0.3), reference(*qkv, None, group, 0.3)[0], atol=5e-6, rtol=1e-5
    )


def test_a_group_is_a_quarter_rounded_to_even() -> None:
    assert [even_group(n, 0.25) for n in (0, 1, 8, 11, 12, 13, 100, 8192)] == [2, 2, 2, 2, 4, 4, 24, 2048]


def visible(t: int, shift: int, group: int) -> set[int]:
    """The tokens that a query attends to, including itself."""
    return {s for s in range(t + 1) if (s + shift) // group == (t + shift) // group}


@pytest.mark.parametrize("tokens", [64, 61, 53])
def test_gradients_flow_to_exactly_the_tokens_of_a_heads_group(tokens: int) -> None:
    group = even_group(tokens, 0.25)
    q, k, v, _ = tensors(3, 3, 1, tokens)
    o = attend(q, k, v, None, group, 0.3)
    for t in (0, 1, group // 2, group, tokens // 2, tokens - 2, tokens - 1):
        for head in range(3):
            dk, dv = torch.autograd.grad(o[0, head, t].sum(), (k, v), retain_graph=True)
            expected = visible(t, 0 if head == 0 else group // 2, group)
            assert set(dv[0, head].abs().sum(-1).nonzero().flatten().tolist()) == expected
            if len(expected) > 1:  # a single visible token has weight 1, whatever its key
                assert set(dk[0, head].abs().sum(-1).nonzero().flatten().tolist()) == expected
            assert not dv[0, [h for h in range(3) if h != head]].any()


def model(attention: str, layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=36,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def reached(llama: Any, ids: Tensor, t: int, **kwargs: Any) -> list[int]:
    """The tokens of the first row whose embeddings affect the logits at t."""
    embeddings = llama.get_input_embeddings()(ids).detach().requires_grad_()
    logits = llama(inputs_embeds=embeddings, use_cache=False, **kwargs).logits
    (gradient,) = torch.autograd.grad(logits[0, t].sum(), embeddings)
    assert not gradient[1:].any()
    return gradient[0].abs().sum(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize("tokens", [48, 45])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_layer_attends_to_both_groups_and_is_causal(tokens: int, checkpointing: bool) -> None:
    llama = model(shifted_attention.register()).train()
    if checkpointing:
        llama.activation_checkpointing_enable({"use_reentrant": False})
    group = even_group(tokens, 0.25)
    ids = torch.arange(tokens)[None] % 50
    for t in (0, group - 1, group, tokens // 2, tokens - 1):
        assert reached(llama, ids, t) == sorted(visible(t, 0, group) | visible(t, group // 2, group))
    with shifted_attention.full_attention(llama):
        assert reached(llama, ids, tokens - 1) == [*range(tokens)]
    assert reached(llama, ids, tokens - 1)[0] > 0


def test_the_receptive_field_of_two_layers_is_the_union_of_groups() -> None:
    ids = torch.arange(48)[None]
    llama = model(shifted_attention.register(), layers=2).train()
    one = visible(24, 0, 12) | visible(24, 6, 12)
    two = set().union(*(visible(s, 0, 12) | visible(s, 6, 12) for s in one))
    assert set(reached(llama, ids, 24)) == two > one


def test_the_model_respects_padding_and_packing() -> None:
    llama = model(shifted_attention.register(tokens=4)).train()
    ids = (torch.arange(20) + 1)[None]
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 15:] = 0
    assert reached(llama, ids, 9, attention_mask=mask) == [6, 7, 8, 9]
    left = mask.flip(1)  # the first token is number 5
    alone = llama(input_ids=ids[:, 5:], use_cache=False).logits
    positions = (left.cumsum(1) - 1).clamp(min=0)
    padded = llama(input_ids=ids, attention_mask=left, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(padded[:, 5:], alone, atol=1e-5, rtol=1e-5)
    packed = torch.tensor([[*range(7), *range(13)]])
    both = llama(input_ids=ids, position_ids=packed, use_cache=False).logits
    for start, stop in ((0, 7), (7, 20)):
        alone = llama(input_ids=ids[:, start:stop], use_cache=False).logits
        torch.testing.assert_close(both[:, start:stop], alone, atol=1e-5, rtol=1e-5)


def test_evaluation_is_sdpa_bit_for_bit() -> None:
    shifted_model, sdpa = model(shifted_attention.register(), 2).eval(), model("sdpa", 2).eval()
    ids = torch.arange(46).view(2, 23)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    packed = torch.tensor([[*range(9), *range(14)]]).expand(2, -1)
    for kwargs in ({}, {"attention_mask": mask}, {"position_ids": packed, "use_cache": False}):
        assert torch.equal(shifted_model(ids, **kwargs).logits, sdpa(ids, **kwargs).logits)
    generated = [m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (shifted_model, sdpa)]
    assert torch.equal(*generated)
    trained = model(shifted_attention.register(), 2).train()(ids, use_cache=False).logits
    assert not torch.allclose(trained, sdpa(ids).logits, atol=1e-4)


@pytest.fixture
def no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise AssertionError("a mask was built")

    monkeypatch.setattr(shifted_attention, "sdpa_mask", fail)


@pytest.mark.usefixtures("no_masks")
def test_training_builds_no_mask() -> None:
    llama = model(shifted_attention.register()).train()
    ids = torch.ones(2, 16, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    llama(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()


def test_an_unsupported_mask_or_cache_is_an_error() -> None:
    llama = model(shifted_attention.register()).train()
    ids = torch.ones(1, 6, dtype=torch.long)
    with pytest.raises(UserError, match="has its own mask"):
        llama(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool), use_cache=False)
    cache = llama(ids, use_cache=True).cache
    with pytest.raises(UserError, match="requires whole sequences"):
        llama(ids, cache=cache)
