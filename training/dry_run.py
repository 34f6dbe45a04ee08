"""What a recipe will take, without loading the model: tokens, steps, memory.

Memory is counted, not measured: weights, gradients, AdamW's two moments, and what backward needs to remember. For a
token and a layer of a gated decoder that is, in units of the weights' type, 8 d + 2 d_kv + 5 f numbers: inputs of the
norms and of the projections, q, k, v, what attention put out, and five of the width f in the MLP. Under LoRA the
frozen projections need no inputs (3 d + f), and its float32 copies of them are 5 d + f numbers. With checkpointing it
is d numbers a layer, and one layer's share of the rest. A test holds the count against the tensors that autograd saves.
"""

from __future__ import annotations

from typing import Any

from lceval.training.config import Config

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GIB = 1 << 30


def estimate(recipe: Config) -> dict[str, Any]:
    """Tokens, steps and GiB of a recipe.

    Raises:
        UserError: the model's configuration or the data is not at hand.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lceval.models import packaged
    from lceval.models.lcft import LCFT
    from lceval.training import robust
    from lceval.training.run import plan
    from lceval.training.sft import lora

    if recipe.robust is not None:
        robust.check(recipe.robust)
    name = packaged.resolve(recipe.model.pretrained)
    config = AutoConfig.from_pretrained(name, revision=recipe.model.revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model.dtype))
    planned = plan(recipe, LCFT(model, tokenizer=name))
    weights = sum(p.numel() for p in model.parameters())
    trained = weights
    if (how := lora(recipe)) is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            tuned = get_peft_model(model, how)
        trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    longest = max(c.tokens for c in planned.contexts)
    answers = max(sum(len(t.answer) for t in c.turns) for c in planned.contexts)
    memory = {
        "weights": weights * BYTES[recipe.model.dtype],
        "trained": trained * _per_trained(recipe),
        "activations": activations(config, recipe, longest),
        "logits": answers * config.vocab_size * (BYTES[recipe.model.dtype] + 8),
    }
    steps, optim = recipe.optim.steps, recipe.optim
    return {
        "output": str(recipe.output),
        "contexts": len(planned.contexts),
        "questions": planned.questions,
        "held_out_contexts": len(planned.held_out),
        "tokens_a_context": round(planned.tokens),
        "longest_context_tokens": longest,
        "steps": steps,
        "tokens": round(steps * optim.contexts * planned.tokens),
        "epochs": steps * optim.contexts / len(planned.contexts),
        "parameters": weights,
        "trained_parameters": trained,
        "memory_gib": {part: n / GIB for part, n in memory.items()},
        "total_gib": sum(memory.values()) / GIB,
    }


def _per_trained(recipe: Config) -> int:
    """Bytes of gradient and moments of a trained parameter, and of the parameter itself where LoRA adds it.

    PEFT keeps LoRA's matrices in float32; in full fine-tuning gradient and moments have the weights' type.
    """
    return 16 if recipe.lora else 3 * BYTES[recipe.model.dtype]


def activations(config: Any, recipe: Config, tokens: int) -> int:
    """Bytes that backward needs of a sequence of `tokens` tokens."""
    text = config.get_text_config()
    d, f = text.hidden_size, text.intermediate_size
    size = BYTES[recipe.model.dtype]
    dim = getattr(text, "head_dim", None) or d // text.num_attention_heads
    layer = size * (8 * d + 2 * dim * text.num_key_value_heads + 5 * f)
    if recipe.lora is not None and size < 4:
        layer += 4 * (5 * d + f) - size * (3 * d + f)
    layers = text.num_hidden_layers
    per_token = layers * d * size + layer if recipe.optim.checkpointing else layers * layer
    return int(tokens * per_token)


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    memory = ", ".join(f"{part} {gib:.2f}" for part, gib in report["memory_gib"].items())
    return "\n".join(
        [
            f"{report['contexts']} contexts with {report['questions']} questions, "
            f"{report['tokens_a_context']:,} tokens each "
            f"(longest {report['longest_context_tokens']:,}); {report['held_out_contexts']} held out",
            f"{report['steps']} steps, {report['tokens']:,} tokens, {report['epochs']:.1f} epochs",
            f"{report['trained_parameters']:,} of {report['parameters']:,} parameters are trained",
            f"about {report['total_gib']:.1f} GiB on one device: {memory}",
        ]
    )
