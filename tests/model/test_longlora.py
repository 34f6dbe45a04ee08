"""LongLoRA on the packaged model: receptive fields in training, and full attention in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lceval.training import shifted_attention
from lceval.training.longlora import LongLora, prepare

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model(smollm2: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, attn_implementation=shifted_attention.register())


def own_groups(t: int, group: int) -> set[int]:
    return {s for s in range(t + 1) for shift in (0, group // 2) if (s + shift) // group == (t + shift) // group}


@pytest.mark.parametrize("tokens", [64, 51])
def test_attention_is_causal_and_the_first_layer_attends_to_two_groups_only(model: Any, tokens: int) -> None:
    model.train()
    ids = (torch.arange(tokens) * 97 + 1000)[None]
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True)
    group = shifted_attention.even_group(tokens, 0.25)
    for t in (0, group // 2 - 1, group, 2 * group - 1, tokens - 1):
        first, last = (
            torch.autograd.grad(x[0, t].sum(), embeddings, retain_graph=True)[0][0].abs().sum(-1).nonzero().flatten()
            for x in (out.hidden_states[1], out.logits)
        )
        assert set(first.tolist()) == own_groups(t, group)
        # Across thirty layers, all earlier tokens and no later ones.
        assert last.tolist() == [*range(t + 1)]


def test_evaluation_is_full_attention_bit_for_bit(model: Any) -> None:
    ids = (torch.arange(2 * 51).view(2, 51) * 97) % 40000
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    model.eval()
    with torch.no_grad():
        logits = [model(ids).logits, model(ids, attention_mask=mask).logits]
        with shifted_attention.full_attention(model):
            sdpa = [model(ids).logits, model(ids, attention_mask=mask).logits]
        model.train()
        assert not torch.allclose(model(ids, use_cache=False).logits, sdpa[0], atol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(logits, sdpa, strict=True))


def test_training_lowers_the_loss_and_trains_the_modules_of_the_paper(smollm2: str) -> None:
    model = prepare(AutoModelForCausalLM.from_pretrained(smollm2), LongLora(window_tokens=16384)).train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # q, o: 576 x 576, k, v: 576 x 192, r 8, 30 layers; embeddings 49152 x 576; 61 norms of 576.
    assert trained == 30 * 8 * (2 * (576 + 576) + 2 * (576 + 192)) + 49152 * 576 + 61 * 576
    ids = (torch.arange(96) * 97 + 1000)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] > losses[1] > losses[2]
