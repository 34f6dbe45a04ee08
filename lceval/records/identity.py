"""The identity of a run: everything that can change its outputs, and nothing else.

A run is resumed, and a result reused, only under the same identity.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

# The fields of lm-eval's EvaluatorConfig. A test fails on a field in neither list.
CHANGES_OUTPUTS = (
    "apply_chat_template",
    "batch_size",
    "device",
    "fewshot_as_multiturn",
    "gen_kwargs",
    "include_path",
    "limit",
    "max_batch_size",
    "metadata",
    "model",
    "model_args",
    "num_fewshot",
    "predict_only",
    "samples",
    "seed",
    "system_instruction",
    "tasks",
    "trust_remote_code",
)
DOES_NOT = (
    "cache_requests",
    "check_integrity",
    "config",
    "confirm_run_unsafe_code",
    "hf_hub_log_args",
    "log_samples",
    "output_path",
    "show_config",
    "trackio_args",
    "use_cache",
    "verbosity",
    "wandb_args",
    "wandb_config_args",
    "write_out",
)
PACKAGES = ("lceval", "lm-eval", "torch", "transformers", "peft", "accelerate", "tokenizers", "triton")
# Arguments of lcft that change no output; all others do.
MEMORY_ONLY = ("prefix_cache_gib",)


def of(config: Any, digests: Mapping[str, str]) -> dict[str, Any]:
    """The identity of an EvaluatorConfig.

    Args:
        config: the parsed configuration, recipe canonical.
        digests: of the files that it names.
    """
    fields = {name: getattr(config, name) for name in CHANGES_OUTPUTS}
    fields["model_args"] = {key: value for key, value in config.model_args.items() if key not in MEMORY_ONLY}
    text = json.dumps({**fields, "hashes": dict(digests), "versions": versions()}, default=str)
    identity: dict[str, Any] = json.loads(text)
    return identity


def fingerprint(identity: dict[str, Any]) -> str:
    """Hex digest of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two identities differ, as `field: old -> new`."""
    changes = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changes.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return changes


def versions() -> dict[str, str]:
    """Installed versions of the packages that affect outputs."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def machine() -> dict[str, Any]:
    """Hardware and threads of this machine. Imports torch."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
