"""KVzip's second pass against a slow definition, and the tokens of a chat template that it never evicts."""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from lceval.core.errors import UserError
from lceval.models import attention, reconstruction
from lceval.models.chat import ChatTokens
from lceval.models.engine import Engine
from lceval.models.policies import Amount, StatsSpec
from lceval.models.policies.kvzip import KVzip
from lceval.models.recipe import Recipe
from lceval.models.reconstruction import Repetition, output_weight

HEADS, KV_HEADS, DIM = 6, 2, 16
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 60,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "max_position_embeddings": 512,
}
# A template that begins <1 2>, then a system message (by default <3>), then <4 5> and the user's message.
CHAT = ChatTokens(opening=(1, 2, 3, 4, 5), system=(1, 2), user=(4, 5), answer=(6, 7))
REPETITION = Repetition((8, 9), (10, 11, 12), CHAT)
MESSAGE = torch.randint(20, 99, (33,), generator=torch.Generator().manual_seed(3)).tolist()
PREFIXES = {"none": (), "default": CHAT.opening, "system": (1, 2, 30, 31, 4, 6, 32, 4, 5)}


def build(sliding: bool = False) -> Any:
    torch.manual_seed(1)
    extra = {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    name = "qwen2" if sliding else "llama"
    config = AutoConfig.for_model(name, **SHAPE, **({**extra, "use_sliding_window": True} if sliding else {}))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def engine(model: Any, base: Any = None, chunk: int = 0) -> Engine:
    base = base or model
    base.set_attn_implementation(attention.register())
    return Engine(model, base, chunk=chunk, kernels=False, autocast=nullcontext, repetition=REPETITION)


def one_pass(model: Any, ids: list[int], inputs: list[int]) -> list[dict[str, Tensor]]:
    """Per layer q, k, v and the attention inputs h of a plain forward pass over the context and one pass's input."""
    seen: list[dict[str, Tensor]] = []

    def eager(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **kwargs: Any) -> Any:
        seen[-1] |= {"q": q[0], "k": k[0], "v": v[0]}
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        visible = torch.ones(q.shape[2], q.shape[2]).tril(0).triu(1 - (kwargs.get("sliding_window") or q.shape[2]))
        weights = (q @ k.transpose(2, 3) * scaling).masked_fill(visible == 0, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2), None

    AttentionInterface.register("slow", eager)
    model.set_attn_implementation("slow")
    with ExitStack() as stack:
        for layer in model.model.layers:
            hook = layer.input_layernorm.register_forward_hook(lambda m, i, out: seen.append({"h": out[0]}))
            stack.callback(hook.remove)
        model(torch.tensor([[*ids, *inputs]]), use_cache=False)
    return seen


def definition(model: Any, ids: list[int], prefix: int, chunk_tokens: int) -> dict[bool, dict[int, Tensor]]:
    """The scores [Hkv, S] of each full-attention layer, plain and plus, by their definitions; 0 for the prefix."""
    layers = [i for i, kind in enumerate(getattr(model.config, "layer_types", None) or ["full_attention"] * 3)
              if kind == "full_attention"]  # fmt: skip
    scores = {plus: {layer: torch.zeros(KV_HEADS, len(ids)) for layer in layers} for plus in (False, True)}
    for start in range(prefix, len(ids), chunk_tokens):
        chunk = range(start, min(start + chunk_tokens, len(ids)))
        later = [10, 11, 12, *ids[max(prefix, start - 8) : start]]
        inputs = [*([8, 9] if start == prefix else later), 6, 7, *ids[chunk.start : chunk.stop]]
        seen = one_pass(model, ids, inputs)
        for layer in layers:
            q, k, v, h = (seen[layer][name] for name in "qkvh")
            w_o = model.model.layers[layer].self_attn.o_proj.weight
            first = list(range(min(max(prefix, 4), start)))
            for head in range(HEADS):
                kv, columns = head * KV_HEADS // HEADS, [*first, *chunk]
                output = [float((w_o[:, head * DIM : (head + 1) * DIM] @ v[kv, i]).norm()) for i in chunk]
                for row in range(len(ids), len(ids) + len(inputs)):
                    logits = q[head, row] @ k[kv, [*columns, *range(len(ids), row + 1)]].T * DIM**-0.5
                    received = logits.softmax(-1)[len(first) : len(columns)]
                    for plus, x in ((False, received), (True, received / h[row].norm() * torch.tensor(output))):
                        part = scores[plus][layer][kv, chunk.start : chunk.stop]
                        part.copy_(torch.maximum(part, x))
    return scores


@torch.inference_mode()
@pytest.mark.parametrize(
    ("prefix", "sliding", "chunk_tokens", "prefill_chunk"),
    [("none", False, 2048, 0), ("none", False, 10, 7), ("default", False, 10, 0), ("system", True, 15, 9)],
)
def test_the_scores_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, prefix: str, sliding: bool, chunk_tokens: int, prefill_chunk: int
) -> None:
    monkeypatch.setattr(reconstruction, "CHUNK", chunk_tokens)
    model, ids = build(sliding), [*PREFIXES[prefix], *MESSAGE]
    spec = StatsSpec(reconstruction=True, reconstruction_plus=True)
    prefill = engine(model, chunk=prefill_chunk).prefill(ids, spec)
    expected = definition(model, ids, len(PREFIXES[prefix]), chunk_tokens)
    for plus, received in ((False, prefill.reconstruction_attention), (True, prefill.reconstruction_plus)):
        assert received is not None
        for scores, slow in zip(received, expected[plus].values(), strict=True):
            torch.testing.assert_close(scores[0], slow, rtol=1e-4, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_precedes_the_users_message_is_kept_in_every_head(prefix: str, plus: bool) -> None:
    policy = KVzip(amount=Amount(15), plus=plus)
    ids = [*PREFIXES[prefix], *MESSAGE]
    context = engine(build()).prefill(ids, policy.stats_spec).compress(Recipe(policy), consume=True)
    protected = set(range(max(4, len(PREFIXES[prefix]))))
    kept = [set(layer.kept_positions(0, head).tolist()) for layer in context.layers for head in range(KV_HEADS)]
    assert all(protected <= head for head in kept)
    assert sum(map(len, kept)) == 15 * len(kept)
    assert len({len(head) for head in kept}) > 1


# Output projections ---------------------------------------------------------------------------------


def test_the_matrix_of_an_output_projection_is_what_it_does_without_its_bias() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 24)
    for projection in (nn.Linear(24, 10), Conv1D(10, 24)):
        nn.init.normal_(projection.bias)
        torch.testing.assert_close(x @ output_weight(projection, x), projection(x) - projection.bias)


@torch.inference_mode()
def test_an_adapter_changes_the_output_projection_as_if_it_were_merged() -> None:
    lora = LoraConfig(r=4, target_modules=["o_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(build(), lora).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    spec = KVzip(amount=Amount(1), plus=True).stats_spec
    both = [
        engine(*of).prefill(MESSAGE, spec).reconstruction_plus for of in ((model, model.get_base_model()), (merged,))
    ]
    assert both[0] is not None
    assert both[1] is not None
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_without_output_projections_is_refused_for_kvzip_plus_only() -> None:
    model = build()
    attentions = [layer.self_attn for layer in model.model.layers]
    attentions[1].mixing = attentions[1].o_proj
    del attentions[1].o_proj
    engine(model).check(Recipe(KVzip(amount=Amount(1))))
    with pytest.raises(
        UserError, match=r"^kvzip with plus=true and criticalkv require an output projection .*llama does not have"
    ):
        engine(model).check(Recipe(KVzip(amount=Amount(1), plus=True)))


# Chat templates -------------------------------------------------------------------------------------

BOT = "{% if add_generation_prompt %}[bot]{% endif %}"
EACH = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}" + BOT
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}[system]Help.[end]{% endif %}" + EACH
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + EACH
IN_THE_TURN = (
    "[user]{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}{{ messages[-1].content }}[end]"
) + BOT


@pytest.mark.parametrize(
    ("template", "system", "prefix"),
    [
        (EACH, "", "[user]"),
        (EACH, "Be [user]", "[system]Be [user][end][user]"),
        (DEFAULT_SYSTEM, "", "[system]Help.[end][user]"),
        (DEFAULT_SYSTEM, "Be brief.", "[system]Be brief.[end][user]"),
        (NO_SYSTEM, "", "[user]"),
        (IN_THE_TURN, "", "[user]"),
        (IN_THE_TURN, "Be\nbrief.", "[user]"),
        (None, "", ""),
    ],
)
def test_the_tokens_around_a_users_message_come_from_the_chat_template(
    template: str | None, system: str, prefix: str
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel()), chat_template=template)
    chat = ChatTokens.of(tokenizer, lambda text: [ord(c) for c in text])
    text = "[end][user]A text."
    if template is not None:
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = [ord(c) for c in text]
    assert text[: chat.prefix_tokens(ids)] == prefix
    assert bytes(chat.answer).decode() == ("" if template is None else "[end][bot]")
    assert chat.prefix_tokens(ids[1:]) == 0
    assert chat.prefix_tokens([]) == 0
