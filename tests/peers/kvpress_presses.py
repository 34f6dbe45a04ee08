"""kvpress's presses under lceval's method names and keep shares, for the two scripts beside this file.

Runs in the environment that make_env.sh creates, where lceval is not installed.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import kvpress

# Each press with explicit defaults, so that they are recorded and a new release cannot change them silently.
PRESSES: dict[str, tuple[type, dict[str, Any]]] = {
    "snapkv": (kvpress.SnapKVPress, {"window_size": 64, "kernel_size": 5}),
    "pyramidkv": (kvpress.PyramidKVPress, {"window_size": 64, "kernel_size": 5, "beta": 20}),
    "tova": (kvpress.TOVAPress, {}),
    "knorm": (kvpress.KnormPress, {}),
    "keydiff": (kvpress.KeyDiffPress, {}),
    "streaming": (kvpress.StreamingLLMPress, {"n_sink": 4}),
    "expected_attention": (
        kvpress.ExpectedAttentionPress,
        {"n_future_positions": 512, "n_sink": 4, "use_covariance": True, "use_vnorm": True, "epsilon": 0.0},
    ),
    "kvzip": (
        kvpress.KVzipPress,
        {"layerwise": False, "n_sink": 4, "kvzip_plus_normalization": False, "chunk_size": 2048},
    ),
    "lagkv": (kvpress.LagKVPress, {"n_sink": 4, "lag_size": 128, "cross_scoring": False}),
    "compactor": (
        kvpress.CompactorPress,
        {"sink_size_start": 8, "sink_size_end": 4, "chunk_size": 256, "sketch_dimension": 48, "blending": None},
    ),
}
# As lceval's keys, those that are kept stay at their positions.
FINCH = {"chunk_length": None, "normalize_scores": True, "rerotate_keys": False}
# Presses around another press.
WRAPPERS: dict[str, tuple[type, dict[str, Any]]] = {
    "adakv": (kvpress.AdaKVPress, {"alpha_safeguard": 0.2}),
    "criticalkv": (kvpress.CriticalKVPress, {"epsilon": 1e-4, "first_stage_ratio": 0.5}),
    "chunkkv": (kvpress.ChunkKVPress, {"chunk_length": 20}),
    "block": (kvpress.BlockPress, {"block_size": 128}),
}
# The presses that need no more than a context.
NAMES = ["full", *PRESSES, "adakv"]


def build(name: str, keep: float, of: str = "snapkv", **changed: Any) -> tuple[Any, dict[str, Any]]:
    """The press that keeps the share `keep`, and its parameters for the record; None for `full`.

    Args:
        of: the inner press of a wrapper.
        changed: parameters other than the defaults.
    """
    if name == "full":
        return None, {}
    if name in WRAPPERS:
        cls, defaults = WRAPPERS[name]
        inner, parameters = build(of, keep, **changed)
        return cls(press=inner, **defaults), {"class": cls.__name__, **defaults, "press": parameters}
    if name == "finch":
        parameters = {"compression_ratio": 1 - keep, **FINCH}
        return kvpress.FinchPress(**parameters), {"class": "FinchPress", **parameters}
    if name == "duo":
        # The share of the heads that stream.
        parameters = {"head_compression_ratio": 1 - keep, "on_the_fly_scoring": True}
        return kvpress.DuoAttentionPress(**parameters), {"class": "DuoAttentionPress", **parameters}
    cls, defaults = PRESSES[name]
    parameters = {"compression_ratio": 1 - keep, **defaults, **changed}
    return cls(**parameters), {"class": cls.__name__, **parameters}


def versions() -> dict[str, str]:
    """The package versions that affect the numbers."""
    return {name: version(name) for name in ("kvpress", "transformers", "tokenizers", "torch")}
