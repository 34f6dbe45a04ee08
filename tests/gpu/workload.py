"""What the GPU check runs on: its sizes, a layer of random keys and values, and a model of Qwen2.5-7B's shape.

Weights are random: speed does not depend on them, and errors are measured against the same weights in a wider dtype.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Shares of the context that the four KV heads of a layer keep: ragged, and one of them empty.
KEPT = (0.8, 0.45, 0.2, 0.0)
KEY_BIAS = 4.0
OUTLIER_EVERY, OUTLIER = 16, 10.0


@dataclass(frozen=True)
class Setup:
    """Device and sizes of a check.

    Attributes:
        device: "cuda" or "cpu".
        small: tiny shapes, to see that every check runs.
    """

    device: str
    small: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, keys and values."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def wide(self) -> torch.dtype:
        """What errors are measured against."""
        return torch.float32 if self.device == "cuda" else torch.float64

    @property
    def head_dim(self) -> int:
        """Of the layer that the kernels run on."""
        return 64 if self.small else 128

    @property
    def layer_tokens(self) -> int:
        """Of the layer that the kernels run on."""
        return 700 if self.small else 20_000

    @property
    def recipe_tokens(self) -> int:
        """Of the context that every recipe compresses."""
        return 640 if self.small else 4000

    @property
    def step_tokens(self) -> tuple[int, ...]:
        """Context lengths at which decoding steps are timed."""
        return (600,) if self.small else (32_768, 131_072)

    @property
    def chunk_tokens(self) -> int:
        """Of a chunk of a long prefill."""
        return 256 if self.small else 8192

    @property
    def step_repeats(self) -> int:
        """Timed steps of a median."""
        return 2 if self.small else 20

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory that nothing refers to back to the device."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def random_layer(setup: Setup, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """k, v [1, 4, S, D], keep [1, 4, S] bool and how many tokens each head keeps. Key channels are off centre."""
    rng = torch.Generator().manual_seed(seed)
    size = (1, len(KEPT), setup.layer_tokens, setup.head_dim)
    k, v = (torch.randn(size, generator=rng) for _ in "kv")
    k += KEY_BIAS * torch.randn(1, len(KEPT), 1, setup.head_dim, generator=rng)
    counts = [round(share * setup.layer_tokens) for share in KEPT]
    order = torch.rand(size[:3], generator=rng).argsort(-1).argsort(-1)
    keep = order < torch.tensor(counts)[:, None]
    return *(x.to(setup.device, setup.dtype) for x in (k, v)), keep.to(setup.device), counts


def random_queries(setup: Setup, *shape: int) -> Tensor:
    """Standard normal numbers in the check's dtype."""
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=rng).to(setup.device, setup.dtype)


def token_ids(tokens: int, seed: int = 0) -> list[int]:
    """Random token ids below 100."""
    return torch.randint(0, 100, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def build_model(setup: Setup) -> Any:
    """A Qwen2 causal LM with random weights, and key biases with outlier channels as Qwen2.5 has them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if setup.small:
        size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 128}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    else:
        size = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
        heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    config = Qwen2Config(
        **size,
        **heads,
        max_position_embeddings=1_010_000,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(setup.dtype)
    try:
        with torch.device(setup.device):
            model = Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias
            bias.normal_(std=KEY_BIAS)
            bias[::OUTLIER_EVERY] *= OUTLIER
    return model.requires_grad_(False)


def relative_error(x: Tensor, expected: Tensor) -> float:
    """||x - expected|| / ||expected||, in float64; 0 where both are nothing."""
    x, expected = x.detach().double(), expected.detach().double()
    difference, size = float((x - expected).norm()), float(expected.norm())
    return difference / size if size > 0 else difference


def exact_attention(q: Tensor, kv: Any, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of one query token a row over all slots of a compressed layer, in float64.

    q: [R, H, D], the rows share the one sequence of `kv`. Returns o [R, H, D] and lse [R, H].
    """
    group = q.shape[1] // kv.lens.shape[1]
    outputs, sums = [], []
    for head in range(kv.lens.shape[1]):
        k, v = (x.double() for x in kv.head(head))
        scores = scaling * q[:, head * group : (head + 1) * group].double() @ k.T
        # A softmax over no slot is empty, and so its product is zeros.
        outputs.append(scores.softmax(-1) @ v)
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs, 1), torch.cat(sums, 1)


def lse_error(lse: Tensor, expected: Tensor) -> float:
    """The largest difference of two log-sum-exps; infinite where they do not agree on which heads are empty."""
    if not torch.equal(torch.isneginf(lse), torch.isneginf(expected)):
        return float("inf")
    return float(torch.nan_to_num(lse.double() - expected.double(), nan=0.0).abs().max())
