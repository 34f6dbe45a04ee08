"""Learned scores of KV slots: a small map per layer from its attention input to a score of each KV head (KVzap).

A folder has NVIDIA's layout (arXiv 2601.07891, checkpoints `nvidia/KVzap-*`): `config.json` with `input_dim`,
`output_dim`, `n_modules` and `hidden_dim` (null: linear), and safetensors with `layers.N.weight|bias` (linear), or
`layers.N.0.weight|bias` and `layers.N.2.weight|bias` (two layers with a GELU between them).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lceval import packaged
from lceval.core.errors import UserError
from lceval.core.io import read_object
from lceval.models.geometry import Geometry, unsupported
from lceval.models.loading import loading

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DIMENSIONS = ("input_dim", "output_dim", "n_modules")
# What transformers calls the projection of the heads' outputs in an attention module.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
# Models with published scorers; of the two kinds the MLP is the default.
PUBLISHED = {
    "Qwen/Qwen3-8B": "nvidia/KVzap-mlp-Qwen3-8B",
    "Qwen/Qwen3-32B": "nvidia/KVzap-mlp-Qwen3-32B",
    "meta-llama/Llama-3.1-8B-Instruct": "nvidia/KVzap-mlp-Llama-3.1-8B-Instruct",
}


class Scorer(nn.Module):
    """One map per full-attention layer of a model.

    Args:
        input_dim: width of the hidden states.
        output_dim: KV heads of a layer.
        n_modules: full-attention layers.
        hidden_dim: width of the MLPs' hidden layer; None for linear maps.

    Attributes:
        name: where it was loaded from; empty for a new one.
        digest: of its numbers and layout, which identifies it.
    """

    def __init__(self, input_dim: int, output_dim: int, n_modules: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        self.input_dim, self.output_dim, self.n_modules, self.hidden_dim = input_dim, output_dim, n_modules, hidden_dim
        self.name = ""

        def build() -> nn.Module:
            if hidden_dim is None:
                return nn.Linear(input_dim, output_dim)
            return nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, output_dim))

        self.layers = nn.ModuleList(build() for _ in range(n_modules))

    @torch.no_grad()
    def score(self, place: int, hidden: Tensor) -> Tensor:
        """Scores [B, Hkv, T] float32 of tokens whose attention input at full-attention layer `place` is [B, T, d].

        Computed in the dtype of the scorer's weights.
        """
        module = self.layers[place]
        scores: Tensor = module(hidden.to(next(module.parameters()).dtype))
        return scores.float().transpose(1, 2)

    @property
    def dimensions(self) -> dict[str, int | None]:
        """The entries of its `config.json`."""
        return {name: getattr(self, name) for name in (*DIMENSIONS, "hidden_dim")}

    @cached_property
    def digest(self) -> str:
        """Hex digest of dimensions, dtype and weights, as they were when it was first read."""
        digest = hashlib.sha256(json.dumps(self.dimensions).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        """Name and hash, the label of table rows."""
        packaged_one = self.name == str(packaged.scorer_folder())
        return f"{packaged.NAME if packaged_one else Path(self.name).name}@{self.digest[:6]}"

    def save(self, folder: Path) -> None:
        """Write `config.json` and the weights, in their dtype, into a folder, which is made if necessary."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"model_type": "kvzap", **self.dimensions}, indent=2) + "\n")

    def check(self, geometry: Geometry, config: Any) -> None:
        """Check that it fits a model, given the configuration of its text decoder.

        Raises:
            UserError: another number of layers, KV heads or channels.
        """
        for name, value in dimensions_of(geometry, config).items():
            if getattr(self, name) != value:
                raise UserError(
                    f"scorer={self.name}: {name} is {getattr(self, name)}, but {geometry.model_type} has {value}: "
                    "use the scorer of this model"
                )


def dimensions_of(geometry: Geometry, config: Any) -> dict[str, int]:
    """The DIMENSIONS of a model's scorer, given the configuration of its text decoder."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {"input_dim": config.hidden_size, "output_dim": kv_heads, "n_modules": len(geometry.full)}


def default(pretrained: str) -> str | None:
    """The scorer of a model where none is named: a folder, or a hub name; None if there is none."""
    if packaged.is_packaged(pretrained):
        return str(packaged.scorer_folder())
    return PUBLISHED.get(pretrained)


def load(name: str) -> Scorer:
    """A scorer from a folder, or from the hub.

    Raises:
        UserError: no such scorer, or files that are damaged or of another layout.
    """
    with loading(scorer=name):
        return _load(name)


def _load(name: str) -> Scorer:
    folder = Path(name)
    if not folder.is_dir():
        if not folder.exists() and name.startswith(("/", "./", "../", "~")):
            raise UserError(f"scorer={name}: no such folder")
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=[CONFIG, "*.safetensors"]))
    config = read_object(folder / CONFIG, "name a folder of `lceval train scorer`, or a KVzap checkpoint")
    sizes: dict[str, Any] = {key: config.get(key) for key in (*DIMENSIONS, "hidden_dim")}
    required = [size for key, size in sizes.items() if key in DIMENSIONS or size is not None]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in required):
        raise UserError(f"scorer={name}: {CONFIG} needs the integers {', '.join(DIMENSIONS)}, and hidden_dim or null")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"scorer={name}: the folder has no *.safetensors")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file)
    tensors = sizes["n_modules"] * (2 if sizes["hidden_dim"] is None else 4)
    if len(weights) != tensors:
        raise UserError(f"scorer={name}: the folder has {len(weights)} tensors, and {CONFIG} implies {tensors}")
    with torch.device("meta"):
        scorer = Scorer(**sizes)
    expected = {key: tuple(tensor.shape) for key, tensor in scorer.state_dict().items()}
    stored = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if stored != expected:
        wrong = sorted(key for key in {*stored, *expected} if stored.get(key) != expected.get(key))[0]
        raise UserError(
            f"scorer={name}: {wrong} has shape {stored.get(wrong)}, and {CONFIG} implies {expected.get(wrong)}"
        )
    if not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise UserError(f"scorer={name}: its weights must be finite floating-point numbers")
    scorer.load_state_dict(weights, assign=True)
    scorer.requires_grad_(False)
    scorer.name = name
    return scorer


@contextmanager
def attention_inputs(base: Any, layers: Sequence[int], receive: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the block, call `receive` before each of these layers of a model attends.

    Args:
        base: a causal LM of transformers without adapter wrappers.
        layers: `Geometry.full` of it.
        receive: gets the index of the layer in the model and its attention input [B, T, d] (after the layer's input
            norm, where it has one).

    Raises:
        UserError: attention layers that cannot be told from the model's modules.
    """
    modules = attention_modules(base)
    if not {*layers} <= {*modules}:
        raise unsupported(base.config.model_type, "has attention modules without a layer index")

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(module.layer_idx, args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        for index in layers:
            stack.callback(modules[index].register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def output_projections(base: Any, layers: Sequence[int]) -> dict[int, nn.Module]:
    """The module that maps the heads' outputs to hidden states, of each of these layers by its index in a model.

    Raises:
        UserError: attention layers with no such module, or with one of an unknown name.
    """
    modules = attention_modules(base)
    projections = {
        index: module
        for index in layers
        for name, module in (modules[index].named_children() if index in modules else ())
        if name in OUTPUT_PROJECTIONS
    }
    if len(projections) < len(layers):
        raise UserError(
            f"kvzip with plus=true and criticalkv require an output projection ({', '.join(OUTPUT_PROJECTIONS)}) in "
            f"every attention layer, which {base.config.model_type} does not have: use another evictor, such as snapkv"
        )
    return projections


def attention_modules(base: Any) -> dict[int, Any]:
    """The attention modules of a causal LM by the index of their layer."""
    indexed = [m for m in base.get_decoder().modules() if isinstance(getattr(m, "layer_idx", None), int)]
    attentions = [m for m in indexed if "Attention" in type(m).__name__]
    innermost = [m for m in attentions if not any(inner is not m and inner in attentions for inner in m.modules())]
    return {module.layer_idx: module for module in innermost}
