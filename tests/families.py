"""Tiny random models of every causal-LM architecture of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lceval.models.geometry import Geometry, LayerKind

LAYERS = 4
# Sizes under all the names that configurations have for them; a configuration gets those that it knows.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 6),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 24),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 6),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    # Larger than usual: attention that is almost uniform hides differences.
    "initializer_range": 0.1,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "qk_head_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 6,
    "hidden_size_per_layer_input": 16,
}
DEFAULT = object()


def _by_name(names: dict[str, str]) -> dict[str, str]:
    return {name: reason for reason, of_reason in names.items() for name in of_reason.split()}


MIXED = ["linear_attention", "full_attention"] * 2
MLA = {"num_key_value_heads": 6, "head_dim": 8}
LATENT = {"num_key_value_heads": 6}
OWN: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": LATENT,
    "bailing_hybrid": {**LATENT, "layer_types": MIXED, "head_dim": 16},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2},
    "deepseek_v3": MLA,
    "deepseek_v32": LATENT,
    "falcon": {"head_dim": DEFAULT},
    "falcon_h1": {"mamba_d_ssm": 192},
    "gemma2": {"attn_logit_softcapping": 0.5},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": MIXED},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LATENT, "layer_types": MIXED},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"floor_scale": 16, "attn_scale": 0.5},
    "longcat_flash": MLA,
    "mimo_v2_flash": {"num_attention_heads": 8},
    "mistral": {"sliding_window": None},
    "minicpm3": LATENT,
    "sarvam_mla": LATENT,
    "vaultgemma": {"attn_logit_softcapping": 0.5},
    "youtu": MLA,
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}
# What lcft refuses, by the reason that it gives.
REFUSED = _by_name(
    {
        "has indexed_attention layers": "axk2 deepseek_v32 glm_moe_dsa hy_v4",
        "does not run over another cache than its own": """
            bart bigbird_pegasus blenderbot-small doge marian mbart minimax modernbert-decoder pegasus plbart
        """,
        "computes its attention in a way of its own": """
            bert bert-generation camembert data2vec-text diffllama dory electra ernie jetmoe moshi
            roberta roberta-prelayernorm roc_bert whisper xlm-roberta xlm-roberta-xl
        """,
        "has an attention of its own": """
            big_bird bloom cpmant falcon gpt_neox_japanese megatron-bert mpt mvp openai-gpt rembert roformer rwkv trocr
            xglm xlm
        """,
        "has compressed_sparse_attention": "deepseek_v4",
        "is continued by transformers itself otherwise": "bamba jamba recurrent_gemma",
        "has no attention layer": "falcon_mamba mamba",
        "has hybrid_sliding layers": "inkling2_loop_text inkling2_text inkling_text",
    }
)
# What is not tried, by the reason.
NOT_BUILT = _by_name(
    {
        "multimodal or large whatever its configuration": """
            blenderbot blt dots3_note dots3_note_text emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified
            gemma4_unified_assistant git got_ocr2 llama4 mllama moss_transcribe_diarize phi4_multimodal qwen3_5
            qwen3_5_moe
        """,
        "has no configuration of these sizes": """
            cohere_compass_text dbrx dots1 gemma4_assistant gpt_neo mamba2 musicgen musicgen_melody prophetnet qwen4_exp
            qwen4_exp_text reformer xlnet xlstm xmod zamba zaya
        """,
    }
)
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SERVED = [name for name in FAMILIES if name not in {*REFUSED, *NOT_BUILT}]


def configuration(family: str, **shape: Any) -> Any:
    """A small configuration of an architecture. shape: what differs from SMALL and OWN."""
    default = AutoConfig.for_model(family)
    known = {key: value for key, value in SMALL.items() if _has(default, key)}
    own = {**known, **OWN.get(family, {}), **shape}
    return AutoConfig.for_model(family, **{key: value for key, value in own.items() if value is not DEFAULT})


# Models of images and text: the family of the text model one level down.
MULTIMODAL = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
IMAGES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vision_output_dim", "projector_input_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
    **dict.fromkeys(("head_dim", "image_size", "num_position_embeddings"), 16),
    "projector_output_dim": 32,
    "patch_size": 8,
    "out_hidden_size": 96,
}


def multimodal(family: str) -> Any:
    """A model of images and text with random weights, as checkpoints are saved."""
    default = AutoConfig.for_model(family)
    images = getattr(default, "vision_config", None)
    parts: dict[str, Any] = {"text_config": configuration(MULTIMODAL[family]).to_dict()}
    if images is not None:
        parts["vision_config"] = images.to_dict() | {k: v for k, v in IMAGES.items() if hasattr(images, k)}
    config = AutoConfig.for_model(family, image_token_id=98, image_token_index=98, **parts)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def _has(config: Any, key: str) -> bool:
    """Whether a configuration has a size, which may differ from layer to layer (then it has no value)."""
    try:
        value = getattr(config, key, DEFAULT)
    except AmbiguousGlobalPerLayerAttributeError:
        return False
    return value is not DEFAULT and (value is not None or key in ("num_key_value_heads", "head_dim"))


def model(family: str, **shape: Any) -> Any:
    """A model with random weights, the same for the same shape."""
    config = configuration(family, **shape)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def row(model: Any) -> str:
    """The line of an architecture in docs/models.md."""
    geometry, config = Geometry.of(model), model.config.get_text_config()
    kinds = dict.fromkeys(_kind(layer) for layer in geometry.layers)
    notes = [
        *(["learned sinks"] if geometry.sinks else []),
        *(["capped logits"] if geometry.caps else []),
        *(["keys wider than values"] if getattr(config, "v_head_dim", None) and not geometry.latent else []),
        *(["latents"] if geometry.latent else []),
        *(["layers share keys"] if geometry.shares else []),
        *(["positions from the length of the cache"] if geometry.counts_positions else []),
    ]
    compressed = f"{len(geometry.full)} of {len(geometry.layers)}"
    moments = "" if geometry.rotary is None or geometry.caps else "yes"
    return f"| `{config.model_type}` | {', '.join(kinds)} | {compressed} | {moments} | {', '.join(notes)} |"


def _kind(layer: LayerKind) -> str:
    attention = "full" if layer.is_full else "chunks" if layer.chunked else "sliding window" if layer.attends else ""
    return " with ".join(part for part in (attention, "state" if layer.states else "") if part) or "none"


def table() -> str:
    """All lines of docs/models.md, and what is refused or not tried."""
    lines = ["| architecture | layers | compressed | `expected_attention` | notes |", "| --- | --- | --- | --- | --- |"]
    lines += [row(model(family)) for family in SERVED]
    for title, names in (("Refused", REFUSED), ("Not tried", NOT_BUILT)):
        lines += ["", f"### {title}", "| reason | architectures |", "| --- | --- |"]
        for reason in dict.fromkeys(names.values()):
            of_reason = ", ".join(f"`{name}`" for name in names if names[name] == reason)
            lines.append(f"| {reason} | {of_reason} |")
    return "\n".join(lines) + "\n"


PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MARK = "<!-- written by `python tests/families.py` -->\n"

if __name__ == "__main__":
    head, mark, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(head + mark + table())
