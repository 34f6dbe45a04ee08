"""Tiny random models in folders, with one token per word: w2 to w98."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def llama(**shape: Any) -> Any:
    """A Llama with random weights, the same for the same shape. shape: what differs from SHAPE."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape})).eval()


def save_model(folder: Path, family: str = "llama", *, seed: int = 1, template: str | None = None, **shape: Any) -> str:
    """Write model and tokenizer; returns the folder's name. template: chat template of the tokenizer."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **shape)).save_pretrained(folder)
    return save_tokenizer(folder, template)


def save_tokenizer(folder: Path, template: str | None = None) -> str:
    """Write the tokenizer of a tiny model; returns the folder's name."""
    words = {"[UNK]": 0, "</s>": 1, **{f"w{n}": n for n in range(2, 99)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)
