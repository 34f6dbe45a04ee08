"""Estimate the tokens, steps and memory of a recipe without loading the model.

Memory is computed, not measured: weights, gradients, AdamW's two moments, and activations saved for backward. Per token
and layer of a gated decoder these are 8 d + 2 d_kv + 5 f values in the weights' dtype: inputs of the norms and
projections, q, k, v, the attention output, and five of width f in the MLP. With LoRA the frozen projections need no
inputs (3 d + f), and LoRA's float32 copies are 5 d + f values. With gradient checkpointing it is d values per layer,
plus the rest for one layer. A test compares the estimate with the tensors that autograd saves. Joint training adds the
scorer in float32, and the attention weights of the tokens that see a context through gates: for every question QUESTION
tokens and the answer, in each query head, three float32 values a slot.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from lceval.core.errors import UserError
from lceval.training.config import Config, LearnedScorer

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GIB = 1 << 30
# Tokens of a question, where it is counted before the data is encoded.
QUESTION = 64


def estimate(recipe: Config) -> dict[str, Any]:
    """Tokens, steps and GiB of a recipe.

    If the model is not available locally but the recipe has its shape, contexts have their nominal length and their
    number is unknown.

    Raises:
        UserError: neither the model's configuration nor its shape is available, or the data is missing.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from lceval.training import compression_aware, longlora, precision
    from lceval.training.sft import lora

    if recipe.compression_aware is not None:
        compression_aware.check(recipe.compression_aware)
    recipe = precision.resolve(recipe)
    config, available = _config(recipe)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model.dtype))
    data = _counted(recipe, model) if available else _nominal(recipe)
    weights = sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        if recipe.longlora:
            tuned = longlora.prepare(model, recipe.longlora)
        else:
            tuned = get_peft_model(model, lora(recipe)) if recipe.lora else model
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    grpo, tokens = recipe.grpo, data["longest_context_tokens"]
    answers, gated, steps = data.pop("answers"), data.pop("gated"), recipe.optim.max_steps
    drawn = steps * recipe.optim.contexts_per_step
    epochs = drawn / data["contexts"] if data["contexts"] else None
    if grpo is not None:  # every sample is a separate sequence
        answers, steps = grpo.completions_per_device * grpo.max_new_tokens, grpo.max_steps
        tokens = grpo.completions_per_device * (tokens + grpo.max_new_tokens)
        drawn = steps * grpo.prompts_per_step * grpo.num_generations
        epochs = steps * grpo.prompts_per_step / data["questions"] if data["questions"] else None
    # Per trained parameter: gradient and two moments. PEFT stores LoRA's matrices in float32, and they are added to the
    # weights; in full fine-tuning gradient and moments have the weights' dtype.
    trained_bytes = 16 if recipe.lora or recipe.longlora else 3 * BYTES[recipe.model.dtype]
    learned = recipe.compression_aware.scorer if recipe.compression_aware else None
    joint = {"scorer": 16 * _scorer_parameters(learned, recipe, config)} if learned and learned.is_trained else {}
    if joint:
        joint["gates"] = gates(config, recipe, tokens, gated)
    memory = {
        **joint,
        "weights": weights * BYTES[recipe.model.dtype],
        "trained": trained * trained_bytes,
        "activations": activations(config, recipe, tokens),
        "logits": answers * config.get_text_config().vocab_size * (BYTES[recipe.model.dtype] + 8),
    }
    return {
        "output": str(recipe.output),
        "dtype": recipe.model.dtype,
        **data,
        "steps": steps,
        "tokens": round(drawn * data["tokens_a_context"]),
        "epochs": epochs,
        "parameters": weights,
        "trained_parameters": trained,
        "memory_gib": {part: n / GIB for part, n in memory.items()},
        "total_gib": sum(memory.values()) / GIB,
    }


def _config(recipe: Config) -> tuple[Any, bool]:
    """The model's configuration, and whether the model is available locally."""
    from transformers import AutoConfig

    from lceval import packaged

    try:
        config = AutoConfig.from_pretrained(
            packaged.resolve(recipe.model.pretrained), revision=recipe.model.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        if recipe.model.shape is None:
            raise UserError(
                f"cannot read the configuration of {recipe.model.pretrained} ({str(error).splitlines()[0]:.80}): "
                "set model.pretrained to a local folder, or set model.shape"
            ) from None
        return AutoConfig.for_model(**recipe.model.shape), False
    return config, True


def _counted(recipe: Config, model: Any) -> dict[str, Any]:
    """Size of the encoded data."""
    from lceval import packaged
    from lceval.models.lcft import LCFT
    from lceval.training.train import build

    training_set = build(recipe, LCFT(model, tokenizer=packaged.resolve(recipe.model.pretrained)))
    return {
        "contexts": len(training_set.lengths),
        "questions": training_set.questions,
        "held_out_contexts": len(training_set.held_out),
        "tokens_a_context": round(fmean(training_set.lengths)),
        "longest_context_tokens": max(training_set.lengths),
        "answers": max([c.predicted for c in training_set.contexts] + [len(s) for s in training_set.sequences]),
        "gated": max((sum(len(p.question) + len(p.answer) for p in c.pairs) for c in training_set.contexts), default=0),
    }


def _nominal(recipe: Config) -> dict[str, Any]:
    """Upper bounds on the size of the data from the recipe."""
    from lceval.tasks import catalogue

    tokens = recipe.texts.tokens if recipe.texts else round(recipe.data.length_k * 1024)
    known = [catalogue.datasets()[name] for name in recipe.data.datasets]
    answer = max(catalogue.new_tokens(d.modes[mode]) for d in known for mode in recipe.data.modes)
    questions = recipe.data.questions or max(d.per_context for d in known)
    return {
        "contexts": None,
        "questions": None,
        "held_out_contexts": recipe.eval_contexts,
        "tokens_a_context": tokens,
        "longest_context_tokens": tokens,
        "answers": tokens if recipe.texts else answer * questions,
        "gated": (QUESTION + answer) * questions,
    }


def activations(config: Any, recipe: Config, tokens: int) -> int:
    """Bytes of activations saved for backward for a sequence of `tokens` tokens."""
    text = config.get_text_config()
    d, f = text.hidden_size, text.intermediate_size
    size = BYTES[recipe.model.dtype]
    dim = getattr(text, "head_dim", None) or d // text.num_attention_heads
    layer = size * (8 * d + 2 * dim * text.num_key_value_heads + 5 * f)
    if recipe.lora is not None and size < 4:
        layer += 4 * (5 * d + f) - size * (3 * d + f)
    layers = text.num_hidden_layers
    per_token = layers * d * size + layer if recipe.optim.gradient_checkpointing else layers * layer
    return int(tokens * per_token)


def gates(config: Any, recipe: Config, tokens: int, gated: int) -> int:
    """Bytes saved for backward where `gated` tokens see a context of `tokens` tokens through gates."""
    text = config.get_text_config()
    layers = 1 if recipe.optim.gradient_checkpointing else int(text.num_hidden_layers)
    return 3 * 4 * gated * tokens * int(text.num_attention_heads) * layers


def _scorer_parameters(learned: LearnedScorer, recipe: Config, config: Any) -> int:
    """Those of the scorer it starts from, or of MLPs of 512 (KVzap's) where that is not in a local folder."""
    import torch

    from lceval.models import scorer as scorers

    name = learned.init or scorers.default(recipe.model.pretrained)
    if name is not None and Path(name).is_dir():
        scorer = scorers.load(name)
    else:
        text = config.get_text_config()
        with torch.device("meta"):
            scorer = scorers.Scorer(text.hidden_size, text.num_key_value_heads, text.num_hidden_layers, 512)
    return sum(parameter.numel() for parameter in scorer.parameters())


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    memory = ", ".join(f"{part} {gib:.2f}" for part, gib in report["memory_gib"].items())
    if report["contexts"] is None:
        data = (
            f"contexts of at most {report['tokens_a_context']:,} tokens (nominal: the model is not available locally)"
        )
        epochs = ""
    else:
        data = (
            f"{report['contexts']} contexts with {report['questions']} questions, "
            f"mean {report['tokens_a_context']:,} tokens (longest {report['longest_context_tokens']:,}); "
            f"{report['held_out_contexts']} held out"
        )
        epochs = f", {report['epochs']:.1f} epochs"
    return "\n".join(
        [
            data,
            f"{report['steps']} steps, {report['tokens']:,} tokens{epochs}",
            f"{report['trained_parameters']:,} of {report['parameters']:,} parameters trainable "
            f"(weights in {report['dtype']})",
            f"about {report['total_gib']:.1f} GiB on one device: {memory}",
        ]
    )
